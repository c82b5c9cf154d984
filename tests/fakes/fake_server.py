"""The router's HTTP side on a loopback port, over a fake loop and a tokenizer of single bytes."""

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import ClientResponse, ClientSession, web
from tests.fakes.byte_tokenizer import byte_tokenizer_with_start
from tests.fakes.fake_loop import COLON, EOS, FAILED, FakeLoop

from kagami_proto.errors import Overloaded
from kagami_proto.tracing import NO_TRACING, Tracing
from kagami_router.api.routes import make_app
from kagami_router.api.schemas.native import Info
from kagami_router.api.web.app_state import AppState, Readiness
from kagami_router.api.web.connections import Runner
from kagami_router.api.web.time_limits import TimeLimits
from kagami_router.request.validation import CompileGrammar, RequestLimits, Validation
from kagami_router.serving.infer import Infer
from kagami_router.serving.permits import Permits
from kagami_router.telemetry.metrics import Metrics
from kagami_router.text.chat_template import ChatTemplate, MissingTemplate
from kagami_router.text.detokenize import TextDecoder
from kagami_router.text.encode_queue import EncodeQueue
from kagami_router.text.tokenizer import SpecialTokens, Tokenizer
from kagami_router.tools.answer_form import MarkedForm
from kagami_router.tools.chat_format import ChatFormat
from kagami_router.tools.formats import find_format
from kagami_router.tools.reasoning import find_reasoning

LIMITS = RequestLimits(
    max_best_of=2,
    max_stop_sequences=4,
    max_top_n_tokens=5,
    max_input_tokens=63,
    max_total_tokens=64,
    max_client_batch_size=4,
    vocab_size=300,
)
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOKENS = SpecialTokens("<s>", "</s>", {})


def info(limits: RequestLimits) -> Info:
    return Info(
        model_id="M",
        model_sha=None,
        model_pipeline_tag=None,
        max_concurrent_requests=4,
        max_best_of=limits.max_best_of,
        max_stop_sequences=limits.max_stop_sequences,
        max_input_tokens=limits.max_input_tokens,
        max_total_tokens=limits.max_total_tokens,
        validation_workers=1,
        max_client_batch_size=limits.max_client_batch_size,
        router="text-generation-router",
        version="3.3.7",
        sha=None,
        docker_label=None,
        model_dtype="torch.float32",
        model_device_type="cpu",
        max_input_length=limits.max_input_tokens,
        waiting_served_ratio=0.0,
        max_batch_total_tokens=64,
        max_waiting_tokens=0,
        max_batch_size=None,
        kagami_version="0.1.0",
        model_quantization=None,
    )


class ScriptedDecoder(TextDecoder):
    """Tokens of scripts stand for what they say, those of prompts for their byte."""

    def piece(self, token_id: int) -> str | bytes:
        scripted = {one.id: one.text for one in (EOS, FAILED, COLON)} | {40: "Hi", 41: "!"}
        return scripted.get(token_id) or super().piece(token_id)


@dataclass(eq=False)
class FakeServer:
    url: str
    readiness: Readiness
    state: AppState
    loop: FakeLoop
    http: ClientSession
    num_permits: int

    def has_all_permits(self) -> bool:
        """Whether no call holds a permit any more."""
        try:
            with self.state.infer.permits(self.num_permits):
                return True
        except Overloaded:
            return False

    def post(self, path: str, body: object, **options: object):
        return self.http.post(path, json=body, **options)


@asynccontextmanager
async def serving(
    loop: FakeLoop | None = None,
    *,
    limits: RequestLimits = LIMITS,
    template: ChatTemplate | MissingTemplate | None = None,
    max_concurrent_requests: int = 4,
    is_open: bool = True,
    key: str | None = None,
    origins: tuple[str, ...] = (),
    payload_limit: int = 2_000_000,
    aip_routes: tuple[str | None, str | None] = (None, None),
    compile_grammar: CompileGrammar | None = None,
    tracing: Tracing = NO_TRACING,
    traces_content: bool = False,
    time_limits: TimeLimits = TimeLimits(),  # noqa: B008 - it is frozen
    caller_header: str = "",
) -> AsyncIterator[FakeServer]:
    loop = loop or FakeLoop()
    template = template or ChatTemplate(TEMPLATE, TOKENS)
    metrics = Metrics()
    with ThreadPoolExecutor(1) as threads:
        tokenizer = Tokenizer(byte_tokenizer_with_start(), EncodeQueue(threads, 1))
        state = AppState(
            infer=Infer(loop, metrics, max_concurrent_requests=max_concurrent_requests),
            validation=Validation(tokenizer, limits, compile_grammar, tracer=tracing.tracer),
            tokenize_permits=Permits(max_concurrent_requests),
            decoder=ScriptedDecoder(tokenizer.backend, frozenset({1})),
            chat_format=ChatFormat(
                template,
                MarkedForm(
                    find_format(template, tokenizer.backend),
                    find_reasoning(template, tokenizer.backend),
                ),
                tracing.tracer,
            ),
            info=info(limits),
            compute_type="1-fake",
            is_healthy=lambda: loop.is_healthy,
        )
        readiness = Readiness(metrics)
        if is_open:
            readiness.open(state)
        app = make_app(
            readiness,
            payload_limit=payload_limit,
            allowed_origins=origins,
            key=key,
            aip_routes=aip_routes,
            tracing=tracing,
            traces_content=traces_content,
            caller_header=caller_header,
        )
        runner = Runner(app, shutdown_timeout=0.1, limits=time_limits)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            async with ClientSession(url) as http:
                yield FakeServer(url, readiness, state, loop, http, max_concurrent_requests)
        finally:
            await runner.cleanup()


async def flat_error(response: ClientResponse) -> dict[str, str]:
    """An error's text and TGI's type, from either family's shape."""
    answer = await response.json()
    error = answer["error"]
    text = error["message"] if isinstance(error, dict) else error
    return {"error": text, "error_type": answer["error_type"]}


async def events_of(response: ClientResponse) -> list[str]:
    """The events of a stream, without the comments that clients skip, and "" behind the last."""
    blocks = (await response.text()).split("\n\n")
    return [block for block in blocks if not block.startswith(":")]
