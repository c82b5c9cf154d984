"""Everything about the server rather than about a generation: health, info, metrics, tokenize.

Also `Front`, what all handlers serve from, and `Door`, which has one when the model is warm.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
from aiohttp import hdrs, web
from opentelemetry import trace

from kagami_proto.errors import NotFound, Unavailable, Unhealthy
from kagami_proto.tracing import NO_TRACING
from kagami_router.api.schemas.encoding import encode
from kagami_router.api.schemas.native import GenerateRequest, Info, SimpleToken
from kagami_router.api.schemas.openai import Model, ModelList
from kagami_router.api.web.middleware import read_body
from kagami_router.request.validation import Validation
from kagami_router.serving.infer import Infer
from kagami_router.telemetry.metrics import Metrics
from kagami_router.text.chat_template import ChatTemplate, MissingTemplate
from kagami_router.text.detokenize import TextDecoder
from kagami_router.text.tokenizer import TextToken, Tokenizer
from kagami_router.tools.formats import ToolFormat

# The release whose behaviour clients find here; some refuse to work below 2.1.
TGI_VERSION = "3.3.7"
MAX_NAME_SHOWN = 100
PROMETHEUS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Front:
    """What a warm server serves from."""

    infer: Infer
    validation: Validation
    tokenizer: Tokenizer
    decoder: TextDecoder
    template: ChatTemplate | MissingTemplate
    tool_format: ToolFormat
    info: Info
    compute_type: str
    is_healthy: Callable[[], bool]
    tracer: trace.Tracer = NO_TRACING.tracer
    created: int = field(default_factory=lambda: int(time.time()))
    """When the model was ready, in seconds since the epoch."""

    @property
    def system_fingerprint(self) -> str:
        """What OpenAI's answers name the configuration that made them."""
        return f"{self.info.version}-kagami-{self.info.kagami_version}"

    def served_model(self, asked: str | None) -> str:
        """The name that an answer carries: the client's own, or ours for none and `tgi`."""
        return asked if asked and asked != "tgi" else self.info.model_id


class Door:
    """Closed while the model loads and once the server stops; between, it leads to the `Front`."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self._front: Front | None = None
        self._is_stopping = False

    def open(self, front: Front) -> None:
        """The model is warm."""
        self._front = front

    def close(self) -> Infer | None:
        """No new work from now on; returns what has to be drained."""
        self._is_stopping = True
        return self._front.infer if self._front else None

    @property
    def front(self) -> Front:
        """Raises `Unavailable` unless the server takes work."""
        if self._is_stopping:
            raise Unavailable("The server is shutting down")
        if self._front is None:
            raise Unavailable("The model is still loading")
        return self._front

    @property
    def is_healthy(self) -> bool:
        """Whether a request sent now would make progress."""
        return not self._is_stopping and self._front is not None and self._front.is_healthy()

    @property
    def model_id(self) -> str | None:
        """The name of the model, once it is known."""
        return self._front.info.model_id if self._front else None


DOOR = web.AppKey("door", Door)

_TOKENIZE = msgspec.json.Decoder(GenerateRequest)


def front_of(request: web.Request) -> Front:
    """What to serve this request from; raises `Unavailable`."""
    return request.app[DOOR].front


def json_response(
    answer: msgspec.Struct | Sequence[msgspec.Struct], **headers: str
) -> web.Response:
    """`answer` as JSON, with these headers."""
    return web.Response(body=encode(answer), content_type="application/json", headers=headers)


async def health(request: web.Request) -> web.Response:
    """200 without a body if a request would be served, else 503."""
    if not request.app[DOOR].is_healthy:
        raise Unhealthy("unhealthy")
    return web.Response()


async def alive(request: web.Request) -> web.Response:
    """200 without a body as long as the process answers."""
    return web.Response()


async def info(request: web.Request) -> web.Response:
    """The server's facts."""
    return json_response(front_of(request).info)


async def models(request: web.Request) -> web.Response:
    """The one model, as OpenAI lists it."""
    return json_response(ModelList("list", [_model(front_of(request))]))


async def model(request: web.Request) -> web.Response:
    """The one model, by its name."""
    front, name = front_of(request), request.match_info["name"]
    if name != front.info.model_id:
        raise NotFound(f"The model `{name[:MAX_NAME_SHOWN]}` does not exist")
    return json_response(_model(front))


def _model(front: Front) -> Model:
    name = front.info.model_id
    return Model(name, "model", front.created, name)


async def metrics(request: web.Request) -> web.Response:
    """The Prometheus text, from the first moment on."""
    text = request.app[DOOR].metrics.render()
    return web.Response(body=text.encode(), headers={hdrs.CONTENT_TYPE: PROMETHEUS_TYPE})


async def tokenize(request: web.Request) -> web.Response:
    """Ids, texts and byte offsets of `inputs`."""
    body = await read_body(request, _TOKENIZE)
    spans = await front_of(request).tokenizer.spans(body.inputs, add_special_tokens=True)
    return json_response(simple_tokens(spans))


def simple_tokens(spans: list[TextToken]) -> list[SimpleToken]:
    """Tokens as /tokenize lists them."""
    return [SimpleToken(*span) for span in spans]
