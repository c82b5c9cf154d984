"""Structured output: which tokens a grammar lets a sequence say next.

A grammar is compiled once, beside the steps, and cached; every sequence gets a copy of the
result. The masks of a step are computed on a thread while its forward pass runs. The work itself,
lexer and Earley parser over the vocabulary's trie, is `llguidance`'s.
"""

import json
import math
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from decimal import Decimal
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import tokenizers
import torch
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from kagami_proto.errors import InvalidRequest
from kagami_proto.panics import LibraryPanicked, exception_of
from kagami_proto.values import (
    MAX_GRAMMAR_BYTES,
    MAX_SMALL_GRAMMAR_BYTES,
    Grammar,
    GrammarKind,
)

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# Small grammars and large ones are kept apart: large ones of one client do not push out the small
# ones of others. Measured, a compiled grammar takes up to 150 bytes for each of its source: what is
# kept of either kind takes some 75 MB at most, and a small one up to 1 MB.
MAX_KEPT = 128
MAX_KEPT_BYTES = 512 * 1024
MAX_ERROR_CHARACTERS = 300
# What `llguidance` says of a grammar that allows no first token.
_IMPOSSIBLE = ("NoExtension", "NoExtensionBias")
# The expression of a multiple of n has n states, and is built before any limit counts:
# 0.1 s and 14 MB at this size (measured: 8 s and 400 MB at 1,000,000). Powers of ten cost nothing.
MAX_MULTIPLE = 20_000
# Each pattern is compared with each other one: 0.05 s for 100 (measured: 33 s for 900).
MAX_PATTERN_PROPERTIES = 100
_PATTERN_PROPERTIES = "patternProperties"
_JSON = "%json "
_MAX_DIGITS = 30  # of a number that is looked at: far beyond what is allowed
_MULTIPLE_OF = re.compile(r'"multipleOf"\s*:\s*(-?[0-9][0-9.eE+-]*)')
# Where one of these stands, one number may have to obey several schemas.
_COMBINING = re.compile(r'"(?:allOf|anyOf|oneOf|\$ref)"')
# One space where JSON allows any white space: a small model would write blanks for ever.
# TGI's schemas allow just that.
_JSON_OPTIONS: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": ",[ ]?",
    "key_separator": ":[ ]?",
    "coerce_one_of": True,
}
_WORD_BITS = 32
# A grammar too large for the parser shows it at its first branches: `{`, `"`, the first names.
_TRIED_TOKENS = 4
# Masks of ordinary grammars take microseconds: a few threads are plenty.
_MAX_MASK_THREADS = 4


class GrammarState:
    """Where one sequence stands in its grammar."""

    __slots__ = ("matcher",)

    def __init__(self, matcher: LLMatcher, generated_ids: Sequence[int]) -> None:
        self.matcher = matcher
        if generated_ids:
            matcher.consume_tokens(list(generated_ids))

    def take(self, token_id: int) -> None:
        """The sequence has said this token."""
        self.matcher.consume_token(token_id)

    @property
    def error(self) -> str:
        """Why the sequence cannot go on; empty if it can."""
        return _one_line(self.matcher.get_error()) if self.matcher.is_error() else ""


class Banned(NamedTuple):
    """What the grammars of some rows of a step forbid."""

    rows: Sequence[int]
    mask: Tensor
    """`[len(rows), vocab_size]` bool, on the CPU"""


class Grammars:
    """Compiles grammars for one vocabulary and fills the masks of steps; close it at the end.

    `compile` may be called on any thread, at the same time for the same grammar: it is compiled
    once. Which grammars are bad is remembered too.
    """

    def __init__(self, folder: Path, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Of the `tokenizer.json` of a model folder; `vocab_size` is the width of the logits.

        The file is read for the first grammar: that takes 0.3 s and some 70 MB, which a start,
        and a server that nobody asks for a grammar, do without.
        """
        self._vocab_size = vocab_size
        self._load = partial(_load_tokenizer, folder, vocab_size, tuple(eos_token_ids))
        self._loaded: tuple[LLTokenizer | None, str] | None = None
        self._loading = Lock()
        self._limits = LLParserLimits(verbose_errors=False)
        self._lock = Lock()
        self._small, self._large = _Kept(), _Kept()
        self._thread = ThreadPoolExecutor(1, "grammar masks")
        self._executor = LLExecutor(max(1, min(_MAX_MASK_THREADS, (os.cpu_count() or 1) // 2)))

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def compile(self, grammar: Grammar) -> LLMatcher:
        """What `grammar` compiles to, for nobody's own use; raises `InvalidRequest`."""
        _check_cost(grammar)  # before it is kept
        with self._lock:
            kept = self._kept(grammar)
            future = kept.get(grammar)
            is_new = future is None
            if future is None:
                future = kept.add(grammar)
        if is_new:
            self._settle(future, grammar)
        compiled = future.result()
        if isinstance(compiled, str):
            raise InvalidRequest(compiled)
        return compiled

    @property
    def _tokenizer(self) -> LLTokenizer:
        """The vocabulary; raises `InvalidRequest` with why this model can have no grammars."""
        with self._loading:
            if self._loaded is None:
                self._loaded = self._load()
        tokenizer, reason = self._loaded
        if tokenizer is None:
            raise InvalidRequest(reason)
        return tokenizer

    def _settle(self, future: Future[LLMatcher | str], grammar: Grammar) -> None:
        try:
            future.set_result(self._compiled(grammar))
        except InvalidRequest as error:
            # The text alone: an exception that is kept grows by a traceback with every raise.
            future.set_result(str(error))
        except BaseException as raised:
            failure = exception_of(raised)
            if isinstance(failure, LibraryPanicked):
                future.set_result(str(failure))
                return
            future.set_exception(failure)
            self._forget(grammar)
            raise

    def start(self, grammar: Grammar, generated_ids: Sequence[int]) -> GrammarState:
        """The state of a sequence that has said `generated_ids`; raises `InvalidRequest`."""
        return GrammarState(self.compile(grammar).deep_copy(), generated_ids)

    @contextmanager
    def filling(self, states: Sequence[GrammarState | None]) -> Iterator[Future[Banned | None]]:
        """The masks of a step's rows, computed while the body of the context runs."""
        rows = [row for row, state in enumerate(states) if state is not None]
        matchers = [state.matcher for state in states if state is not None]
        future: Future[Banned | None] = (
            self._thread.submit(self._fill, rows, matchers) if rows else nothing_to_fill()
        )
        try:
            yield future
        finally:
            future.exception()  # a matcher belongs to its sequence again

    def _fill(self, rows: Sequence[int], matchers: Sequence[LLMatcher]) -> Banned:
        num_words = -(-self._tokenizer.vocab_size // _WORD_BITS)
        words = np.zeros((len(rows), num_words), dtype=np.int32)
        row_bytes = num_words * words.itemsize
        if len(rows) == 1:
            matchers[0].unsafe_compute_mask_ptr(words.ctypes.data, row_bytes)
        else:
            numbered = [(matcher, index) for index, matcher in enumerate(matchers)]
            self._executor.unsafe_compute_mask_ptr(
                numbered, words.ctypes.data, row_bytes, len(rows)
            )
        bits = np.unpackbits((~words).view(np.uint8), axis=1, bitorder="little")
        return Banned(rows, torch.from_numpy(bits[:, : self._vocab_size]).view(torch.bool))

    def _compiled(self, grammar: Grammar) -> LLMatcher:
        tokenizer = self._tokenizer
        try:
            source = _to_llguidance(grammar)
        except ValueError as error:
            raise InvalidRequest(_one_line(str(error))) from error
        matcher = LLMatcher(tokenizer, source, log_level=0, limits=self._limits)
        self._try_out(matcher.deep_copy())
        return matcher

    def _try_out(self, matcher: LLMatcher) -> None:
        """Raise `InvalidRequest` for what does not compile, or grows too large as it begins."""
        for _ in range(_TRIED_TOKENS):
            if not matcher.is_error() and not matcher.is_stopped():
                mask = self._fill([0], [matcher]).mask[0]
                matcher.consume_token(int(mask.int().argmin()))
        if matcher.is_error():
            reason = _one_line(matcher.get_error())
            raise InvalidRequest("nothing obeys it" if reason in _IMPOSSIBLE else reason)

    def _forget(self, grammar: Grammar) -> None:
        with self._lock:
            self._kept(grammar).forget(grammar)

    def _kept(self, grammar: Grammar) -> "_Kept":
        return self._small if grammar.num_bytes <= MAX_SMALL_GRAMMAR_BYTES else self._large


class _Kept:
    """What was asked for last: `MAX_KEPT` grammars, of `MAX_KEPT_BYTES` of sources together."""

    def __init__(self) -> None:
        self._futures: OrderedDict[Grammar, Future[LLMatcher | str]] = OrderedDict()
        self._num_bytes = 0

    def get(self, grammar: Grammar) -> "Future[LLMatcher | str] | None":
        """What it compiles to, if that is known or somebody is about it."""
        future = self._futures.get(grammar)
        if future is not None:
            self._futures.move_to_end(grammar)
        return future

    def add(self, grammar: Grammar) -> "Future[LLMatcher | str]":
        """A place for a new one; those not asked for longest are forgotten for it."""
        future = self._futures[grammar] = Future()
        self._num_bytes += grammar.num_bytes
        while len(self._futures) > MAX_KEPT or self._num_bytes > MAX_KEPT_BYTES:
            self.forget(next(iter(self._futures)))
        return future

    def forget(self, grammar: Grammar) -> None:
        """Leave it to those who use it."""
        if self._futures.pop(grammar, None) is not None:
            self._num_bytes -= grammar.num_bytes


def nothing_to_fill() -> Future[Banned | None]:
    """The masks of a step without grammars."""
    future: Future[Banned | None] = Future()
    future.set_result(None)
    return future


def _check_cost(grammar: Grammar) -> None:
    """Raise `InvalidRequest` for what would take too much time or memory to compile."""
    size = grammar.num_bytes
    if size > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(f"it has {size} bytes, more than {MAX_GRAMMAR_BYTES}")
    if grammar.kind is GrammarKind.REGEX:
        return
    _check_patterns(grammar.source)
    _check_multiples(grammar.source)


def _check_patterns(source: str) -> None:
    """All patterns of properties together; the patterns of one object are compared with another."""
    if _PATTERN_PROPERTIES not in source:
        return
    # The schemas of tools stand in a Lark text, each on one line.
    texts = [line.partition(_JSON)[2] for line in source.splitlines() if _JSON in line] or [source]
    total = sum(_num_patterns(text) for text in texts)
    if total > MAX_PATTERN_PROPERTIES:
        raise InvalidRequest(
            f"`{_PATTERN_PROPERTIES}` of all its objects together may have"
            f" {MAX_PATTERN_PROPERTIES} patterns. Given: {total}"
        )


def _num_patterns(schema: str) -> int:
    try:
        left = [json.loads(schema)]
    except (ValueError, RecursionError):
        return 0  # does not compile anyhow
    total = 0
    while left:
        part = left.pop()
        if isinstance(part, dict):
            patterns = part.get(_PATTERN_PROPERTIES)
            total += len(patterns) if isinstance(patterns, dict) else 0
            left += part.values()
        elif isinstance(part, list):
            left += part
    return total


def _check_multiples(source: str) -> None:
    """The numbers of `multipleOf`."""
    is_combined = _COMBINING.search(source) is not None
    total, common = 0, 1
    for text in _MULTIPLE_OF.findall(source):
        multiple = _without_tens(text)
        # Several in one grammar add up, several that one number has to obey multiply.
        total += multiple
        common = math.lcm(common, multiple) if is_combined else 1
        if max(total, common) > MAX_MULTIPLE:
            raise InvalidRequest(
                f"`multipleOf` of all its numbers together may be {MAX_MULTIPLE}, powers of ten"
                f" left out. Given: {text[:MAX_ERROR_CHARACTERS]}"
            )


def _without_tens(number: str) -> int:
    """3 for 0.03 and for 300; 1 for what is no number."""
    try:
        digits = Decimal(number).as_tuple().digits
    except ArithmeticError:
        return 1
    return int("".join(map(str, digits[:_MAX_DIGITS])).rstrip("0") or "1")


def _to_llguidance(grammar: Grammar) -> str:
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            return LLMatcher.grammar_from_json_schema(grammar.source, overrides=_JSON_OPTIONS)
        case GrammarKind.REGEX:
            return LLMatcher.grammar_from_regex(grammar.source)
        case GrammarKind.LARK:
            return LLMatcher.grammar_from_lark(grammar.source)


def _load_tokenizer(
    folder: Path, vocab_size: int, eos_token_ids: Sequence[int]
) -> tuple[LLTokenizer | None, str]:
    """The vocabulary as `llguidance` wants it, or why this model can have no grammars."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None, "this model has no tokenizer.json"
    if not eos_token_ids:
        return None, "this model names no end-of-sequence token, so that no grammar could end"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    # Some heads have fewer rows than the tokenizer has tokens, many have more.
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    try:
        return LLTokenizer(
            tokenizer.to_str(),
            n_vocab=max(vocab_size, largest + 1),
            eos_token=list(eos_token_ids),
        ), ""
    except ValueError as error:
        return None, f"this model's tokenizer cannot be used for grammars: {_one_line(str(error))}"


def _one_line(text: str) -> str:
    line = " ".join(text.removesuffix("<non-verbose/>").split())
    return line if len(line) <= MAX_ERROR_CHARACTERS else f"{line[:MAX_ERROR_CHARACTERS]}…"
