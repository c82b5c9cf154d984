"""The state that handlers use, and whether the server is ready."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from aiohttp import web

from kagami_proto.errors import Unavailable
from kagami_router.api.schemas.native import Info
from kagami_router.request.validation import Validation
from kagami_router.serving.infer import Infer
from kagami_router.serving.permits import Permits
from kagami_router.telemetry.metrics import Metrics
from kagami_router.text.detokenize import TextDecoder
from kagami_router.tools.chat_format import ChatFormat

# The TGI release whose behaviour this server has; some clients refuse versions below 2.1.
TGI_VERSION = "3.3.7"


@dataclass(frozen=True, slots=True)
class AppState:
    """The state of a ready server; handlers pass on only the parts that are needed."""

    infer: Infer
    tokenize_permits: Permits
    """Of the routes that tokenize and do not generate"""
    validation: Validation
    decoder: TextDecoder
    chat_format: ChatFormat
    info: Info
    compute_type: str
    is_healthy: Callable[[], bool]
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """Name -> text, as tokenizer_config.json has them"""
    created: int = field(default_factory=lambda: int(time.time()))
    """When the model was ready, in seconds since the epoch."""

    @property
    def system_fingerprint(self) -> str:
        """OpenAI's name for the configuration that made an answer."""
        return f"{self.info.version}-kagami-{self.info.kagami_version}"

    def served_model(self, asked: str | None) -> str:
        """The model name in an answer: the one asked for, or ours for None and `tgi`."""
        return asked if asked and asked != "tgi" else self.info.model_id


class Readiness:
    """Whether the server takes work: not while the model loads, not after `close`."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self._state: AppState | None = None
        self._is_stopping = False

    def open(self, state: AppState) -> None:
        """The model is loaded: take work from now on."""
        self._state = state

    def close(self) -> Infer | None:
        """Take no new work from now on; returns the `Infer` to drain, None before `open`."""
        self._is_stopping = True
        return self._state.infer if self._state else None

    @property
    def state(self) -> AppState:
        """Raises `Unavailable` unless the server takes work."""
        if self._is_stopping:
            raise Unavailable("The server is shutting down")
        if self._state is None:
            raise Unavailable("The model is still loading")
        return self._state

    @property
    def is_healthy(self) -> bool:
        """Whether a request sent now would make progress."""
        return not self._is_stopping and self._state is not None and self._state.is_healthy()

    @property
    def model_id(self) -> str | None:
        """The name of the model; None before `open`."""
        return self._state.info.model_id if self._state else None


READINESS = web.AppKey("readiness", Readiness)


def state_of(request: web.Request) -> AppState:
    """The state for this request; raises `Unavailable` unless the server takes work."""
    return request.app[READINESS].state
