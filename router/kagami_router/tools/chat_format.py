"""How the model that is served reads a chat: its template, and the form of its tool calls."""

from dataclasses import dataclass

from opentelemetry import trace

from kagami_proto.tracing import NO_TRACING
from kagami_router.text.chat_template import ChatTemplate, MissingTemplate
from kagami_router.tools.formats import ToolFormat


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """What turns messages and tools into a prompt."""

    template: ChatTemplate | MissingTemplate
    tool_format: ToolFormat
    tracer: trace.Tracer = NO_TRACING.tracer
    """Records how long rendering takes"""
