"""Tokens become text and events, over a fake shard and alone."""

from pathlib import Path

import pytest
from tests.fakes.byte_tokenizer import byte_tokenizer
from tests.fakes.fake_shard import EOS, generated
from tests.fakes.submitted import Submitted
from tests.router.serving.test_batching_loop import PROMPT, collect, end_of, new_request, serving

from kagami_proto.errors import GenerationFailed, KagamiError
from kagami_router.request.token_log import TokenLog
from kagami_router.request.values import End, FinishReason, Token
from kagami_router.scheduler.prefix_cache import PrefixKey
from kagami_router.scheduler.sequence import Sequence
from kagami_router.scheduler.step import Event, TokenSampled, VectorComputed
from kagami_router.serving.text_writer import TextWriter
from kagami_router.text.detokenize import TextDecoder


async def test_end_of_sequence_ends_and_is_no_text(tmp_path: Path) -> None:
    async with serving(tmp_path, eos_every=5) as served:
        events = await collect(Submitted(served.loop, new_request(max_new_tokens=40)))
        end = end_of(events)
    assert end.finish_reason is FinishReason.EOS_TOKEN
    assert events[-1].token[:2] == (EOS, "<eos>")
    assert events[-1].token.special
    assert "<eos>" not in end.generated_text


async def test_end_of_sequence_can_be_ignored(tmp_path: Path) -> None:
    async with serving(tmp_path, eos_every=5) as served:
        request = new_request(max_new_tokens=40, ignore_eos=True)
        end = end_of(await collect(Submitted(served.loop, request)))
    assert (end.finish_reason, end.num_generated) == (FinishReason.LENGTH, 40)


@pytest.mark.parametrize("keep_stop", [True, False])
async def test_a_stop_string_ends_even_on_the_last_token(tmp_path: Path, keep_stop: bool) -> None:
    text = bytes(generated(PROMPT, 8)).decode()
    async with serving(tmp_path) as served:
        request = new_request(max_new_tokens=8, stop=(text[5:8],), keep_stop=keep_stop)
        end = end_of(await collect(Submitted(served.loop, request)))
    assert end.finish_reason is FinishReason.STOP_SEQUENCE
    assert end.generated_text == (text if keep_stop else text[:5])
    assert end.stop == text[5:8]


async def test_text_held_back_for_a_stop_string_is_not_lost(tmp_path: Path) -> None:
    text = bytes(generated(PROMPT, 8)).decode()
    async with serving(tmp_path) as served:
        request = new_request(max_new_tokens=8, stop=(text[5:] + "!",), keep_stop=False)
        events = await collect(Submitted(served.loop, request))
    assert end_of(events).generated_text == text
    assert events[-1].tail == text[5:]


@pytest.mark.parametrize("keep_stop", [True, False])
@pytest.mark.parametrize("num_before", [0, 2])
async def test_a_special_token_can_complete_a_stop_string(
    tmp_path: Path, keep_stop: bool, num_before: int
) -> None:
    *ids, eos = generated(PROMPT, 40, eos_every=5)
    assert eos == EOS
    text = bytes(ids).decode()
    stop = text[len(text) - num_before :] + "<eos>"
    async with serving(tmp_path, eos_every=5) as served:
        request = new_request(max_new_tokens=40, ignore_eos=True, stop=(stop,), keep_stop=keep_stop)
        end = end_of(await collect(Submitted(served.loop, request)))
    assert end.finish_reason is FinishReason.STOP_SEQUENCE
    assert end.generated_text == (text if keep_stop else text[: len(text) - num_before])


async def test_text_that_a_special_token_frees_goes_out_with_it(tmp_path: Path) -> None:
    *ids, _ = generated(PROMPT, 40, eos_every=5)
    text = bytes(ids).decode()
    async with serving(tmp_path, eos_every=5) as served:
        request = new_request(
            max_new_tokens=40, ignore_eos=True, stop=(text[-1] + "!",), keep_stop=False
        )
        events = await collect(Submitted(served.loop, request))
    assert events[len(ids)].token.special
    assert events[len(ids)].tail == text[-1]
    end_of(events)


async def test_prompt_logprobs_and_top_tokens_come_with_their_text(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        request = new_request(b"abc", 1, prompt_logprobs=True, top_n_tokens=2)
        (event,) = await collect(Submitted(served.loop, request))
    assert event.end is not None
    assert [tuple(token)[:3] for token in event.prefill] == [
        (97, "a", None),
        (98, "b", -1.0),
        (99, "c", -1.0),
    ]
    assert [[top.text for top in token.top_tokens] for token in event.prefill] == [
        [],
        ["b", "A"],
        ["c", "A"],
    ]
    assert [token.id for token in event.top_tokens] == [event.token.id, 0]


class PanicException(BaseException):
    """What the tokenizers library raises where it did not expect its input."""


@pytest.mark.parametrize("bug", [ZeroDivisionError, PanicException])
async def test_a_bug_in_one_text_ends_that_request_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: type[BaseException]
) -> None:
    def step(self: object, token_id: int) -> str:
        raise bug

    async with serving(tmp_path) as served:
        broken = Submitted(served.loop, new_request(b"broken"))
        monkeypatch.setattr(served.loop._writer._open[1].detokenizer.__class__, "step", step)
        with pytest.raises(GenerationFailed, match="internal error"):
            await collect(broken)
        monkeypatch.undo()
        assert len(await collect(Submitted(served.loop, new_request()))) == 8


class Closed(list[tuple[int, End | KagamiError]]):
    """Remembers which sequences ended, and how."""

    def __call__(self, sequence: Sequence, how: End | KagamiError) -> None:
        self.append((sequence.id, how))


def new_writer(closed: Closed) -> TextWriter:
    return TextWriter(TextDecoder(byte_tokenizer(), frozenset({EOS})), frozenset({EOS}), closed)


def open_sequence(writer: TextWriter, **changes: object) -> Sequence:
    request = new_request(b"abc", 20, **changes)
    sequence = Sequence(1, request, TokenLog(b"abc"), PrefixKey(b"abc"), 22, added_at=0.0)
    sequence.scheduled_at = 0.0
    writer.open(sequence, object())
    writer._open[1].device_before_s = 0.0
    return sequence


def sampled(sequence: Sequence, *ids: int) -> list[Event]:
    return [TokenSampled(sequence, token_id, -0.5, (), False) for token_id in ids]


def test_what_one_step_brings_behind_the_end_is_no_part_of_the_answer() -> None:
    closed = Closed()
    writer = new_writer(closed)
    sequence = open_sequence(writer)
    outcomes = writer.write(sampled(sequence, *b"de", EOS, *b"fg"), 1.0)
    ((number, end),) = closed
    assert (number, len(outcomes)) == (1, 3)
    assert isinstance(end, End)
    assert (end.generated_text, end.num_generated) == ("de", 3)


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_a_token_that_was_named_ends_a_text(ignore_eos: bool) -> None:
    closed = Closed()
    writer = new_writer(closed)
    named = {"token_ids": frozenset(b"z"), "ignore_eos": ignore_eos}
    outcomes = writer.write(sampled(open_sequence(writer, **named), *b"xyzw"), 1.0)
    ((_, end),) = closed
    assert isinstance(end, End)
    assert (end.finish_reason, end.num_generated) == (FinishReason.EOS_TOKEN, 3)
    assert len(outcomes) == 3


class SeesLetters:
    """Has enough when it has seen these texts."""

    def __init__(self, *texts: str) -> None:
        self._left = list(texts)

    def is_enough(self, token: Token, tail: str) -> bool:
        if token.text + tail in self._left:
            self._left.remove(token.text + tail)
        return not self._left


@pytest.mark.parametrize(
    ("changes", "said"), [({}, "xyx"), ({"stop": ("yxz",), "keep_stop": False}, "xyxz")]
)
def test_what_watches_a_text_ends_it(changes: dict[str, object], said: str) -> None:
    closed = Closed()
    writer = new_writer(closed)
    seen = ("z",) if changes else ("x", "x")
    watched = {"new_watch": lambda: SeesLetters(*seen)} | changes
    outcomes = writer.write(sampled(open_sequence(writer, **watched), *b"xyxzw"), 1.0)
    ((_, end),) = closed
    assert isinstance(end, End)
    if not changes:
        assert (end.generated_text, end.num_generated) == (said, 3)
        assert (end.finish_reason, end.stop) == (FinishReason.STOP_SEQUENCE, None)
    else:  # the stop string was complete before
        assert (end.generated_text, end.stop) == ("x", "yxz")
    assert len(outcomes) == len(said)


def test_each_sequence_has_its_own_watch() -> None:
    writer = new_writer(Closed())
    made: list[SeesLetters] = []

    def new_watch() -> SeesLetters:
        made.append(SeesLetters("x"))
        return made[-1]

    for _ in range(2):
        open_sequence(writer, new_watch=new_watch)
    assert len(made) == 2


def test_a_vector_ends_a_stream_of_text_with_a_clear_failure() -> None:
    closed = Closed()
    writer = new_writer(closed)
    sequence = open_sequence(writer, wants_vector=True)
    ((_, error),) = writer.write([VectorComputed(sequence, (0.5,))], 1.0)
    assert isinstance(error, GenerationFailed)
    assert str(error) == "vectors are not served"
    assert closed == [(1, error)]


def test_a_sequence_that_was_closed_gets_nothing_more() -> None:
    closed = Closed()
    writer = new_writer(closed)
    sequence = open_sequence(writer)
    assert writer.close(1)
    assert not writer.close(1)
    assert writer.write(sampled(sequence, *b"de"), 1.0) == []
    assert closed == []
