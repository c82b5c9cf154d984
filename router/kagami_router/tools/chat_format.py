"""How the served model reads a chat: its template, and the forms of its calls and thoughts."""

from dataclasses import dataclass

from opentelemetry import trace

from kagami_proto.tracing import NO_TRACING
from kagami_router.text.chat_template import ChatTemplate, MissingTemplate
from kagami_router.tools.formats import ToolFormat
from kagami_router.tools.reasoning import ReasoningFormat


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """Converts messages and tools to a prompt."""

    template: ChatTemplate | MissingTemplate
    tool_format: ToolFormat
    reasoning: ReasoningFormat | None = None
    """None: the model does not think before it answers"""
    tracer: trace.Tracer = NO_TRACING.tracer
    """Records how long rendering takes"""
