"""How the served model reads a chat: its template, and the form of its answers."""

from dataclasses import dataclass

from opentelemetry import trace

from kagami_proto.tracing import NO_TRACING
from kagami_router.text.chat_template import ChatTemplate, MissingTemplate
from kagami_router.tools.answer_form import AnswerForm


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """Converts messages and tools to a prompt."""

    template: ChatTemplate | MissingTemplate
    form: AnswerForm
    tracer: trace.Tracer = NO_TRACING.tracer
    """Records how long rendering takes"""
