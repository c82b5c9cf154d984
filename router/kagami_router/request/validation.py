"""Validation: what a route asks becomes a `ValidRequest`, or an `InvalidRequest` with TGI's text.

The rules stand in TGI's order, the first that fails wins. Behind this file nothing is checked
again. Knows limits and text; knows no HTTP and no route.
"""

import random
import struct
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from opentelemetry import trace

from kagami_proto.errors import ContextOverflow, InvalidRequest, MalformedBody
from kagami_proto.span_names import Key, SpanName
from kagami_proto.tracing import NO_TRACING, span
from kagami_proto.values import (
    MAX_GRAMMAR_BYTES,
    MAX_SMALL_GRAMMAR_BYTES,
    Grammar,
    SamplingParams,
)
from kagami_router.request.prompt import Prompt
from kagami_router.request.values import StoppingParams, ValidRequest, Watch
from kagami_router.text.tokenizer import INLINE_CHARACTERS, TextToken, Tokenizer
from kagami_router.text.turns import Turns

MAX_SEED = 2**64 - 1
MAX_LOGIT_BIAS = 100  # OpenAI's: never, or always
# A text that no answer is generated for may be so long, whatever the model's context is: documents
# are tokenized to be cut. Tokenizing takes some 300 bytes of memory for each token.
MIN_TEXT_TOKENS = 32_768
_FLOAT = struct.Struct("<f")  # the native form has no overflow, it packs infinity
# Colder is the same as greedy in float32, and a logit divided by less can overflow.
MIN_TEMPERATURE = 1e-4
# Beyond, a factor says no more than "never" or "always", and a logit can overflow in float32.
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 1e-4, 1e4
# Grammars that may wait for one caller to be compiled.
MAX_WAITING_GRAMMARS = 64


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What one request may ask of this server."""

    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_input_tokens: int
    max_total_tokens: int
    max_client_batch_size: int
    vocab_size: int
    """Ids a request may name are below it."""

    @property
    def max_text_tokens(self) -> int:
        """Of a text that is only tokenized, or cut by `truncate`."""
        return max(MIN_TEXT_TOKENS, self.max_total_tokens)


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """What a route asks of one generation, unchecked; None = not given."""

    best_of: int | None = None
    do_sample: bool = False
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    min_p: float | None = None
    max_new_tokens: int | None = None
    may_be_shortened: bool = False
    """More `max_new_tokens` than the context leaves are not refused: the answer ends there."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    keep_stop: bool = True
    ignore_eos: bool = False
    new_watch: Callable[[], Watch] | None = None
    """As `StoppingParams` says"""
    truncate: int | None = None
    prompt_logprobs: bool = False
    seed: int | None = None
    top_n_tokens: int | None = None
    grammar: Grammar | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    watermark: bool = False
    unsupported: Mapping[str, object] = field(default_factory=dict)
    """Fields that this server knows but cannot serve, by name; None, false, empty = neutral."""

    @property
    def is_sampling_asked(self) -> bool:
        """Any of the parameters is there that go with sampling, whatever its value."""
        return self.do_sample or any(
            value is not None
            for value in (self.temperature, self.top_k, self.top_p, self.typical_p, self.min_p)
        )

    @property
    def num_samples(self) -> int:
        """Sequences to generate; `best_of: 0` is 1, in streams too."""
        return max(1, self.best_of or 1)


CompileGrammar = Callable[[Grammar], Awaitable[None]]


class Validation:
    """Holds the limits, the tokenizer that prompts are measured with, and the way to a grammar.

    `compile_grammar` returns when every shard has it ready, and raises `InvalidRequest` where it
    cannot be compiled; None = grammars are switched off.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        limits: RequestLimits,
        compile_grammar: CompileGrammar | None = None,
        *,
        tracer: trace.Tracer = NO_TRACING.tracer,
    ) -> None:
        self._tokenizer = tokenizer
        self._tracer = tracer
        self._compile_grammar = compile_grammar
        # One small and one large at a time: the model loses no more than two cores, and a small one
        # does not wait for a large one.
        self._small_grammars, self._large_grammars = (
            Turns(
                "grammars",
                max_waiting=MAX_WAITING_GRAMMARS,
                max_size=MAX_WAITING_GRAMMARS * MAX_GRAMMAR_BYTES,
            )
            for _ in range(2)
        )
        self.limits = limits

    def check_stream(self, params: GenerationParams) -> None:
        """What only one whole answer can carry; comes before the permit."""
        if params.num_samples > 1:
            raise InvalidRequest(
                "`best_of` != 1 is not supported when streaming tokens", field="best_of"
            )
        if params.prompt_logprobs:
            raise InvalidRequest(
                "`decoder_input_details` == true is not supported when streaming tokens",
                field="decoder_input_details",
            )

    def check_best_of(self, params: GenerationParams) -> None:
        """How many samples one call may draw; comes before the permits they take."""
        limit = self.limits.max_best_of
        if params.num_samples > 1 and limit == 1:
            raise InvalidRequest("`best_of` != 1 is not allowed for this endpoint", field="best_of")
        if params.num_samples > limit:
            raise InvalidRequest(
                f"`best_of` must be > 0 and <= {limit}. Given: {params.best_of}", field="best_of"
            )

    def check_params(self, params: GenerationParams) -> None:
        """What can be refused without the prompt; for a route that has to work to make one."""
        self._sampling(params)
        self._check_counts(params)
        self._check_logit_bias(params)
        for index, token_id in enumerate(params.stop_token_ids):
            self._token_id(token_id, "stop_token_ids", index)

    async def token_prompt(self, ids: Sequence[object], place: str) -> Prompt:
        """The ids that a client gave at `place` of its body; raises `InvalidRequest`."""
        limits = self.limits
        if len(ids) > limits.max_input_tokens:  # before any work that grows with them
            error = _too_many_tokens(limits, len(ids))
            error.field = place
            raise error
        known = tuple(self._token_id(token_id, place, index) for index, token_id in enumerate(ids))
        return Prompt(known, await self._tokenizer.decode(known))

    async def tokens(self, text: str, place: str, *, add_special_tokens: bool) -> list[TextToken]:
        """The tokens of a text that nothing is generated for; raises `InvalidRequest`."""
        self._check_text(text, place)
        tokens = await self._tokenizer.spans(text, add_special_tokens=add_special_tokens)
        self._check_text_length(len(tokens), place)
        return tokens

    async def count_tokens(self, text: str, place: str) -> int:
        """How many tokens a rendered conversation has; raises `InvalidRequest`."""
        self._check_text(text, place)
        return len(await self._tokenizer.encode(text, add_special_tokens=False))

    async def text_of(self, ids: Sequence[object], place: str) -> str:
        """The text of token ids; raises `InvalidRequest`."""
        self._check_text_length(len(ids), place)
        known = [self._token_id(token_id, place, index) for index, token_id in enumerate(ids)]
        return await self._tokenizer.decode(known)

    def _check_text(self, text: str, place: str) -> None:
        """Refuse what surely is too long before it is tokenized."""
        if len(text) > INLINE_CHARACTERS:
            self._check_text_length(self._tokenizer.at_least(text), place, "at least ")

    def _check_text_length(self, count: int, place: str, about: str = "") -> None:
        limit = self.limits.max_text_tokens
        if count > limit:
            raise InvalidRequest(
                f"`{place}` must have at most {limit} tokens. Given: {about}{count}", field=place
            )

    def _token_id(self, given: object, place: str, index: int) -> int:
        if not isinstance(given, int) or isinstance(given, bool):
            raise MalformedBody(f"{place}[{index}]: expected a token id", field=f"{place}[{index}]")
        size = self.limits.vocab_size
        if not 0 <= given < size:
            raise InvalidRequest(
                f"`{place}[{index}]` must be a token id, >= 0 and < {size}. Given: {given}",
                field=f"{place}[{index}]",
            )
        return given

    async def validate(
        self,
        prompt: str | Prompt,
        params: GenerationParams,
        *,
        add_special_tokens: bool,
        caller: str = "",
    ) -> ValidRequest:
        """The one way to a `ValidRequest`; raises `InvalidRequest`."""
        with span(self._tracer, SpanName.VALIDATE) as opened:
            valid = await self._validate(prompt, params, add_special_tokens, caller)
            opened.set_attribute(Key.PROMPT_TOKENS, len(valid.prompt_ids))
            return valid

    async def _validate(
        self,
        prompt: str | Prompt,
        params: GenerationParams,
        add_special_tokens: bool,
        caller: str,
    ) -> ValidRequest:
        sampling = self._sampling(params)
        self._check_counts(params)
        self._check_logit_bias(params)
        text, given_ids = (prompt, None) if isinstance(prompt, str) else (prompt.text, prompt.ids)
        if not (text if given_ids is None else given_ids):
            raise InvalidRequest("`inputs` cannot be empty", field="inputs")
        self._check_truncate(params.truncate)
        if given_ids is None and params.truncate is None and len(text) > INLINE_CHARACTERS:
            # Refused before it is tokenized, if it surely is too long.
            self._max_new_tokens(self._tokenizer.at_least(text), params, is_exact=False)
        prompt_ids = given_ids or await self._encode(text, params.truncate, add_special_tokens)
        max_new_tokens = self._max_new_tokens(len(prompt_ids), params)
        if params.grammar is not None:
            await self.ready_grammar(params.grammar, caller)
        _check_supported(params)
        return ValidRequest(
            prompt=Prompt(tuple(prompt_ids), text),
            sampling=sampling,
            stopping=StoppingParams(
                max_new_tokens=max_new_tokens,
                stop=tuple(text for text in params.stop if text),  # "" would end at once
                # A grammar ends by EOS: nothing else may follow it.
                ignore_eos=params.ignore_eos and params.grammar is None,
                keep_stop=params.keep_stop,
                token_ids=frozenset(params.stop_token_ids),
                new_watch=params.new_watch,
            ),
            top_n_tokens=params.top_n_tokens or 0,
            prompt_logprobs=params.prompt_logprobs,
            grammar=params.grammar,
            caller=caller,
        )

    @property
    def has_grammars(self) -> bool:
        """Whether outputs can be held to a grammar."""
        return self._compile_grammar is not None

    async def ready_grammar(self, grammar: Grammar, caller: str = "") -> None:
        """Have a grammar compiled on every shard; raises `InvalidRequest`, `Overloaded`.

        Small ones pass large ones, and callers take turns.
        """
        if self._compile_grammar is None:
            raise InvalidRequest("grammar is not supported")
        size = grammar.num_bytes
        if size > MAX_GRAMMAR_BYTES:
            raise InvalidRequest(
                f"grammar is not valid: it has {size} bytes, more than {MAX_GRAMMAR_BYTES}"
            )
        is_small = size <= MAX_SMALL_GRAMMAR_BYTES
        turns = self._small_grammars if is_small else self._large_grammars
        started = time.monotonic()
        async with turns.turn(caller, size):
            await self._compile_grammar(grammar)
        compile_ms = (time.monotonic() - started) * 1e3
        trace.get_current_span().set_attribute(Key.GRAMMAR_MS, compile_ms)

    def _sampling(self, params: GenerationParams) -> SamplingParams:
        """How tokens are chosen, and whether the sequence samples at all."""
        if params.num_samples > 1 and not params.is_sampling_asked:
            raise InvalidRequest("you must use sampling when `best_of` is > 1", field="best_of")
        temperature = _float32("temperature", params.temperature, 1.0)
        if temperature <= 0:
            raise InvalidRequest("`temperature` must be strictly positive", field="temperature")
        repetition_penalty = _float32("repetition_penalty", params.repetition_penalty, 1.0)
        if repetition_penalty <= 0:
            raise InvalidRequest(
                "`repetition_penalty` must be strictly positive", field="repetition_penalty"
            )
        frequency_penalty = _additive_penalty("frequency_penalty", params.frequency_penalty)
        presence_penalty = _additive_penalty("presence_penalty", params.presence_penalty)
        top_p = _share("top_p", params.top_p)
        typical_p = _share("typical_p", params.typical_p)
        min_p = _float32("min_p", params.min_p, 0.0)
        if not 0.0 <= min_p <= 1.0:
            raise InvalidRequest(
                f"`min_p` must be >= 0.0 and <= 1.0. Given: {params.min_p}", field="min_p"
            )
        if params.top_k is not None and params.top_k <= 0:
            raise InvalidRequest("`top_k` must be strictly positive", field="top_k")
        do_sample = (
            params.do_sample
            or temperature != 1.0
            or any(value is not None for value in (params.top_k, params.top_p, params.typical_p))
            or min_p > 0.0
        )
        return SamplingParams(
            do_sample=do_sample,
            seed=_seed(params.seed, do_sample),
            temperature=max(temperature, MIN_TEMPERATURE),
            top_k=params.top_k or 0,
            top_p=top_p,
            typical_p=typical_p,
            min_p=min_p,
            repetition_penalty=min(
                max(repetition_penalty, MIN_REPETITION_PENALTY), MAX_REPETITION_PENALTY
            ),
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            logit_bias=params.logit_bias,
            watermark=params.watermark,
        )

    def _check_counts(self, params: GenerationParams) -> None:
        """Lengths and counts, against the server's limits."""
        limits = self.limits
        if params.max_new_tokens == 0:
            raise InvalidRequest(
                "`max_new_tokens` must be strictly positive", field="max_new_tokens"
            )
        if len(params.stop) > limits.max_stop_sequences:
            raise InvalidRequest(
                f"`stop` supports up to {limits.max_stop_sequences} stop sequences."
                f" Given: {len(params.stop)}",
                field="stop",
            )
        if params.seed is not None and params.num_samples > 1:
            raise InvalidRequest("`seed` must not be set when `best_of` > 1", field="seed")
        if (params.top_n_tokens or 0) > limits.max_top_n_tokens:
            raise InvalidRequest(
                f"`top_n_tokens` must be >= 0 and <= {limits.max_top_n_tokens}."
                f" Given: {params.top_n_tokens}",
                field="top_n_tokens",
            )

    def _check_logit_bias(self, params: GenerationParams) -> None:
        size = self.limits.vocab_size
        for token_id, bias in params.logit_bias:
            if not 0 <= token_id < size:
                raise InvalidRequest(
                    f"`logit_bias` has ids of the vocabulary, >= 0 and < {size}. Given: {token_id}",
                    field="logit_bias",
                )
            if not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
                raise InvalidRequest(
                    f"`logit_bias` must be >= -{MAX_LOGIT_BIAS} and <= {MAX_LOGIT_BIAS}."
                    f" Given: {bias} for the id {token_id}",
                    field="logit_bias",
                )

    def _check_truncate(self, truncate: int | None) -> None:
        """To how many tokens the prompt may be cut."""
        limit = self.limits.max_input_tokens
        if truncate is not None and not 0 < truncate <= limit:
            raise InvalidRequest(
                f"`truncate` must be strictly positive and less than {limit}. Given: {truncate}",
                field="truncate",
            )

    async def _encode(
        self, prompt: str, truncate: int | None, add_special_tokens: bool
    ) -> list[int]:
        """The last `truncate` tokens of the prompt, all of them without it."""
        if truncate is not None:
            self._check_text(prompt, "inputs")
        prompt_ids = await self._tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        if not prompt_ids:
            raise InvalidRequest("`inputs` has no tokens", field="inputs")
        return prompt_ids if truncate is None else prompt_ids[-truncate:]

    def _max_new_tokens(
        self, num_input: int, params: GenerationParams, *, is_exact: bool = True
    ) -> int:
        """How many tokens it may get; the rest of the context if nobody says."""
        limits = self.limits
        rest = max(0, limits.max_total_tokens - num_input)
        max_new = rest if params.max_new_tokens is None else params.max_new_tokens
        if params.may_be_shortened:
            max_new = min(max_new, rest)
        if num_input + max_new > limits.max_total_tokens:
            is_prompt = num_input > limits.max_input_tokens
            raise ContextOverflow(
                f"`inputs` tokens + `max_new_tokens` must be <= {limits.max_total_tokens}. Given:"
                f" {_at_least(is_exact)}{num_input} `inputs` tokens and {max_new} `max_new_tokens`",
                num_prompt=num_input,
                num_answer=0 if is_prompt else max_new,
                limit=limits.max_input_tokens if is_prompt else limits.max_total_tokens,
                is_exact=is_exact,
            )
        if num_input > limits.max_input_tokens:
            raise _too_many_tokens(limits, num_input, is_exact=is_exact)
        return max_new


def samples(request: ValidRequest, count: int) -> list[ValidRequest]:
    """`count` generations of one prompt: the request itself, then its twins with other seeds.

    Randomness is a function of (seed, position), so neighbouring seeds are unrelated.
    """
    return [request] + [
        replace(
            request,
            sampling=replace(request.sampling, seed=(request.sampling.seed + offset) & MAX_SEED),
        )
        for offset in range(1, count)
    ]


def _too_many_tokens(
    limits: RequestLimits, count: int, *, is_exact: bool = True
) -> ContextOverflow:
    limit = limits.max_input_tokens
    return ContextOverflow(
        f"`inputs` must have less than {limit} tokens. Given: {_at_least(is_exact)}{count}",
        num_prompt=count,
        num_answer=0,
        limit=limit,
        is_exact=is_exact,
    )


def _at_least(is_exact: bool) -> str:
    return "" if is_exact else "at least "


def _check_supported(params: GenerationParams) -> None:
    """What is known but not served yet."""
    for name, value in params.unsupported.items():
        if value:
            raise InvalidRequest(f"`{name}` is not supported yet", field=name)


def _float32(name: str, value: float | None, default: float) -> float:
    """What the shard will see of `value`: 1e-60 is 0 there."""
    if value is None:
        return default
    try:
        rounded: float = _FLOAT.unpack(_FLOAT.pack(value))[0]
    except OverflowError:
        raise InvalidRequest(f"`{name}` is out of range. Given: {value}", field=name) from None
    return rounded


def _additive_penalty(name: str, value: float | None) -> float:
    penalty = _float32(name, value, 0.0)
    if not -2.0 <= penalty <= 2.0:
        raise InvalidRequest(f"`{name}` must be >= -2.0 and <= 2.0", field=name)
    return penalty


def _share(name: str, value: float | None) -> float:
    if value is None:
        return 1.0
    share = _float32(name, value, 1.0)
    if not 0.0 < share < 1.0:
        raise InvalidRequest(f"`{name}` must be > 0.0 and < 1.0", field=name)
    return share


def _seed(given: int | None, do_sample: bool) -> int:
    if given is not None:
        if given > MAX_SEED:
            raise InvalidRequest(f"`seed` must be <= {MAX_SEED}. Given: {given}", field="seed")
        return given
    return random.getrandbits(64) if do_sample else 0
