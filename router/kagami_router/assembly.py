"""Builds what serves a model: texts, shards, scheduler, loop, and what the routes see of them.

The only place that reads the arguments and knows all the parts; `app.py` has their life.
"""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path

from kagami_proto.errors import GenerationFailed
from kagami_proto.model_files import read_optional_object
from kagami_proto.span_names import SpanName
from kagami_proto.tracing import Tracing, span
from kagami_proto.values import DevicePolicy
from kagami_router.api.schemas.native import Info
from kagami_router.api.web.app_state import TGI_VERSION, AppState
from kagami_router.cli import RouterArgs, own_version
from kagami_router.request.validation import RequestLimits, Validation
from kagami_router.scheduler.config import (
    DEFAULT_MAX_WAITING_TOKENS,
    DEFAULT_WAITING_SERVED_RATIO,
    SchedulerConfig,
)
from kagami_router.serving.batching_loop import BatchingLoop
from kagami_router.serving.infer import Infer
from kagami_router.serving.permits import Permits
from kagami_router.shards.messages import Pool, ShardInfo
from kagami_router.shards.session import ShardSession, WarmupLimits
from kagami_router.telemetry.metrics import Capacity, Metrics
from kagami_router.text import chat_template, tokenizer
from kagami_router.text.chat_template import ChatTemplate, MissingTemplate
from kagami_router.text.encode_queue import EncodeQueue
from kagami_router.text.tokenizer import SpecialTokens, Tokenizer
from kagami_router.text.turn_end import turn_end_ids
from kagami_router.tools.answer_form import MarkedForm, find_form
from kagami_router.tools.chat_format import ChatFormat
from kagami_router.tools.formats import find_format
from kagami_router.tools.harmony import HarmonyForm, find_harmony
from kagami_router.tools.reasoning import find_reasoning
from kagami_router.tools.response_template import ResponseTemplate, read_template

logger = logging.getLogger(__name__)


class StartError(Exception):
    """The router cannot serve with these arguments, files or shards."""


def check_arguments(args: RouterArgs) -> None:
    """What can be known to be wrong before a shard is asked; TGI's texts."""
    given_input, given_total = args.max_input_tokens, args.max_total_tokens
    if given_input is not None and given_total is not None and given_input >= given_total:
        raise StartError("`max_input_tokens` must be < `max_total_tokens`")
    for name, value in (
        ("validation_workers", args.validation_workers),
        ("max_batch_size", args.max_batch_size),
        ("max_concurrent_requests", args.max_concurrent_requests),
        ("max_batch_prefill_tokens", args.max_batch_prefill_tokens),
    ):
        if value == 0:
            raise StartError(f"`{name}` must be > 0")


async def assemble(
    stack: AsyncExitStack, args: RouterArgs, tracing: Tracing, metrics: Metrics
) -> tuple[BatchingLoop, AppState]:
    """All that serving needs, warm; what has to be closed again is on `stack`."""
    threads = stack.enter_context(ThreadPoolExecutor(args.validation_workers, "tokenize"))
    queue = EncodeQueue(threads, args.validation_workers)
    folder = Path(args.tokenizer_name)
    try:
        with span(tracing.tracer, SpanName.ROUTER_LOAD_TOKENIZER):
            encoder = await asyncio.to_thread(tokenizer.load, folder, queue)
            given = Path(args.tokenizer_config_path) if args.tokenizer_config_path else None
            tokens = tokenizer.special_tokens(folder, given)
            template = chat_template.load(folder, tokens, given)
            stack.callback(template.close)
            chat_format = _chat_format(args, template, encoder, tracing)
    except (OSError, ValueError) as error:
        raise StartError(str(error)) from error
    session = await _open_session(stack, args, tracing, metrics)
    facts, pool_tokens = session.facts, _num_tokens(session.pool)
    limits = plan_limits(
        args,
        max_positions=facts.max_positions,
        pool_tokens=pool_tokens,
        vocab_size=facts.vocab_size,
    )
    metrics.model_ready(_capacity(args, limits, session.pool), lambda: session.scheduler.stats())
    loop = BatchingLoop(
        session,
        tokenizer=encoder.backend,
        eos_token_ids=await _eos_token_ids(facts, tokens, template, encoder),
        metrics=metrics,
        tracing=tracing,
    )
    metrics.watch_spans(lambda: loop.spans_dropped)
    state = AppState(
        infer=Infer(loop, metrics, max_concurrent_requests=args.max_concurrent_requests),
        tokenize_permits=Permits(args.max_concurrent_requests),
        validation=Validation(
            encoder,
            limits,
            None if args.disable_grammar_support else session.compile_grammar,
            tracer=tracing.tracer,
        ),
        chat_format=chat_format,
        info=_info(args, limits, facts, pool_tokens),
        decoder=loop.decoder,
        compute_type=args.compute_type,
        is_healthy=lambda: loop.is_healthy,
        special_tokens=tokens.named(),
    )
    return loop, state


def _chat_format(
    args: RouterArgs,
    template: ChatTemplate | MissingTemplate,
    encoder: Tokenizer,
    tracing: Tracing,
) -> ChatFormat:
    """How the model writes calls and thoughts: as its files show, or as the operator says."""
    marked = MarkedForm(
        find_format(template, encoder.backend, args.tool_call_parser),
        find_reasoning(template, encoder.backend, args.reasoning_parser),
    )
    own = None
    if args.tool_call_parser is None and args.reasoning_parser is None:
        own = _response_template(args)
    form = find_form(own, marked, reads_tools=template.reads_tools)
    if form is marked and args.tool_call_parser is None and args.reasoning_parser is None:
        form = find_harmony(template.source, encoder.backend, marked.tool_format) or form
    if isinstance(form, HarmonyForm):
        logger.info("Tool calls and reasoning stand on channels (harmony)")
    elif form is marked:
        tools = marked.tool_format
        is_told = "" if tools.is_known else " (explained in the prompt)"
        thoughts = "none" if marked.reasoning is None else marked.reasoning.form.name
        logger.info(
            "Form of tool calls: %s%s; form of reasoning: %s", tools.form.name, is_told, thoughts
        )
    else:
        logger.info("Tool calls and reasoning are read as the model's response_template says")
    return ChatFormat(template, form, tracing.tracer)


def _response_template(args: RouterArgs) -> ResponseTemplate | None:
    """The checkpoint's; one that cannot be read is left out."""
    given = Path(args.tokenizer_config_path) if args.tokenizer_config_path else None
    path = Path(args.tokenizer_name) / "tokenizer_config.json"
    if given is not None and given.suffix != ".jinja":
        path = given
    spec = read_optional_object(path).get("response_template")
    try:
        return None if spec is None else read_template(spec)
    except ValueError as error:
        logger.warning("%s: %s. It is not used", path, error)
        return None


async def _eos_token_ids(
    facts: ShardInfo,
    tokens: SpecialTokens,
    template: ChatTemplate | MissingTemplate,
    encoder: Tokenizer,
) -> frozenset[int]:
    """The ids that end a text: the shard read the model's files; the tokenizer's ids are added."""
    ids = facts.eos_token_ids | await turn_end_ids(tokens.eos, template, encoder.backend)
    texts = {token_id: encoder.backend.id_to_token(token_id) for token_id in sorted(ids)}
    if ids:
        shown = ", ".join(f"{token_id} {text}" for token_id, text in texts.items())
        logger.info("A text ends with one of these tokens: %s", shown)
    else:
        logger.warning("No token ends a text: every answer takes `max_new_tokens`")
    return ids


async def _open_session(
    stack: AsyncExitStack, args: RouterArgs, tracing: Tracing, metrics: Metrics
) -> ShardSession:
    """The shards, connected and warm."""

    def configure(facts: ShardInfo, pool: Pool) -> SchedulerConfig:
        logger.info("Setting max batch total tokens to %d", _num_tokens(pool))
        return _scheduler_config(args, pool, facts.policy)

    session = ShardSession(
        args.master_shard_uds_path,
        WarmupLimits(
            max_step_tokens=_max_step_tokens(args),
            max_batch_size=_max_batch_size(args),
            max_total_tokens=args.max_total_tokens or 0,
            max_pool_tokens=args.max_batch_total_tokens or 0,
        ),
        configure,
        tracer=tracing.tracer,
    )
    metrics.watch_shards(session.are_up)
    try:
        return await stack.enter_async_context(session)
    except GenerationFailed as error:
        raise StartError(f"Unable to warmup the Python model shards: {error}") from error


def _num_tokens(pool: Pool) -> int:
    return (pool.num_blocks - 1) * pool.block_size  # block 0 is scratch


def _capacity(args: RouterArgs, limits: RequestLimits, pool: Pool) -> Capacity:
    return Capacity(
        max_input_tokens=limits.max_input_tokens,
        max_total_tokens=limits.max_total_tokens,
        pool_tokens=_num_tokens(pool),
        max_step_tokens=_max_step_tokens(args),
        max_batch_size=_max_batch_size(args),
        weight_bytes=pool.weight_bytes,
        kv_token_bytes=pool.kv_token_bytes,
        bandwidth=pool.bandwidth,
    )


def _max_batch_size(args: RouterArgs) -> int:
    return args.max_batch_size or args.max_concurrent_requests


def _max_step_tokens(args: RouterArgs) -> int:
    """Prompt tokens in one step; every running sequence must find room for its next token."""
    return max(args.max_batch_prefill_tokens, _max_batch_size(args))


def _scheduler_config(args: RouterArgs, pool: Pool, policy: DevicePolicy) -> SchedulerConfig:
    return SchedulerConfig(
        num_blocks=pool.num_blocks,
        block_size=pool.block_size,
        max_step_tokens=_max_step_tokens(args),
        max_batch_size=_max_batch_size(args),
        waiting_served_ratio=args.waiting_served_ratio,
        max_waiting_tokens=args.max_waiting_tokens,
        prefix_caching=args.prefix_caching,
        max_steps_in_flight=policy.steps_in_flight,
        cache_grows_to=cache_grows_to(args, pool.num_blocks, policy.cache_share),
    )


def cache_grows_to(args: RouterArgs, num_blocks: int, share: float) -> int | None:
    """Up to how many blocks of cached prefixes the pool's memory is taken for them; None: all.

    Where a block takes memory when it is first used, running sequences always may take it, and
    prefixes that may never come again up to `share`. A pool size that was given means all of it.
    """
    if share >= 1.0 or args.max_batch_total_tokens is not None:
        return None
    return int(num_blocks * share)


def plan_limits(
    args: RouterArgs, *, max_positions: int, pool_tokens: int, vocab_size: int
) -> RequestLimits:
    """The lengths that are accepted: as given, else what model (0 = unknown) and pool can hold."""
    most = min(max_positions or pool_tokens, pool_tokens)
    max_total = most if args.max_total_tokens is None else args.max_total_tokens
    if max_total > pool_tokens:
        raise StartError(f"Not enough memory to handle `max_total_tokens={max_total}`")
    max_input = max_total - 1 if args.max_input_tokens is None else args.max_input_tokens
    if not 0 < max_input < max_total:
        raise StartError("`max_input_tokens` must be < `max_total_tokens`")
    if max_positions and max_total > max_positions:
        logger.warning(
            "`max_total_tokens` is beyond the model's positions",
            extra={"max_total_tokens": max_total, "max_positions": max_positions},
        )
    if args.max_input_tokens is None:
        logger.info("Maximum input tokens defaulted to %d", max_input)
    if args.max_total_tokens is None:
        logger.info("Maximum total tokens defaulted to %d", max_total)
    return RequestLimits(
        max_best_of=args.max_best_of,
        max_stop_sequences=args.max_stop_sequences,
        max_top_n_tokens=args.max_top_n_tokens,
        max_input_tokens=max_input,
        max_total_tokens=max_total,
        max_client_batch_size=args.max_client_batch_size,
        vocab_size=vocab_size,
    )


def _info(args: RouterArgs, limits: RequestLimits, facts: ShardInfo, pool_tokens: int) -> Info:
    return Info(
        model_id=args.served_model_name or args.tokenizer_name,
        model_sha=None,
        model_pipeline_tag=None,
        max_concurrent_requests=args.max_concurrent_requests,
        max_best_of=limits.max_best_of,
        max_stop_sequences=limits.max_stop_sequences,
        max_input_tokens=limits.max_input_tokens,
        max_total_tokens=limits.max_total_tokens,
        validation_workers=args.validation_workers,
        max_client_batch_size=limits.max_client_batch_size,
        router="text-generation-router",
        version=TGI_VERSION,
        sha=None,
        docker_label=args.docker_label,
        model_dtype=facts.dtype,
        model_device_type=facts.device_type,
        max_input_length=limits.max_input_tokens,
        waiting_served_ratio=DEFAULT_WAITING_SERVED_RATIO
        if args.waiting_served_ratio is None
        else args.waiting_served_ratio,
        max_batch_total_tokens=pool_tokens,
        max_waiting_tokens=DEFAULT_MAX_WAITING_TOKENS
        if args.max_waiting_tokens is None
        else args.max_waiting_tokens,
        max_batch_size=args.max_batch_size,
        kagami_version=own_version(),
        model_quantization=facts.quantization or None,
    )
