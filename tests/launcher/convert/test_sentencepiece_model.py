"""The sentencepiece library is the judge: tokenizer.json gives its ids and its text."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as spm
from tests.fakes.broken_files import mutants
from tests.fakes.pieces import ENGLISH, JAPANESE, SAMPLES, swallow_like, train
from tokenizers import Tokenizer

from kagami_launcher.convert.files import ConversionRefused
from kagami_launcher.convert.sentencepiece_model import Settings, build, read_model, write_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return swallow_like(tmp_path_factory.mktemp("spm"))


def converted(folder: Path, model: bytes, **config: Any) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(model)
    settings = {"tokenizer_class": "LlamaTokenizer", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    write_tokenizer(folder, folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def judge_of(model: bytes) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def random_texts(count: int) -> list[str]:
    """Pieces of the corpus, runs of spaces and strange characters, in any order."""
    source = random.Random(0)
    parts = [
        *(ENGLISH + JAPANESE).split(),
        *"  ▁ー。aのABé🍣𠮷\t\n",
        "    ",
        "   ",
        "です",
        "ab" * 5,
    ]
    return ["".join(source.choices(parts, k=source.randint(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("text", SAMPLES)
def test_the_ids_are_sentencepieces(tmp_path: Path, model: bytes, text: str) -> None:
    text = text.replace("<unk>", "unk")  # a special token: the slow tokenizer takes it out before
    assert ids(converted(tmp_path, model), text) == judge_of(model).encode(text)


def test_the_ids_of_two_thousand_random_texts_are_too(tmp_path: Path, model: bytes) -> None:
    tokenizer, judge = converted(tmp_path, model), judge_of(model)
    for text in random_texts(2000):
        assert ids(tokenizer, text) == judge.encode(text), text


def test_ids_become_the_same_text_again(tmp_path: Path, model: bytes) -> None:
    tokenizer, judge = converted(tmp_path, model), judge_of(model)
    for text in (*SAMPLES, *random_texts(300)):
        found = ids(tokenizer, text.replace("<unk>", "unk"))
        assert tokenizer.decode(found) == judge.decode(found)


def test_a_text_begins_with_bos(tmp_path: Path, model: bytes) -> None:
    tokenizer = converted(tmp_path, model)
    assert tokenizer.encode("富士山").ids == [1, *ids(tokenizer, "富士山")]
    assert converted(tmp_path, model, add_bos_token=False).encode("富士山").ids[0] != 1
    both = converted(tmp_path, model, add_eos_token=True).encode("富士山").ids
    assert (both[0], both[-1]) == (1, 2)


@pytest.mark.parametrize("legacy", [True, False])
def test_text_after_a_special_token_has_a_space_before_it_only_in_legacy(
    tmp_path: Path, model: bytes, legacy: bool
) -> None:
    tokenizer, judge = converted(tmp_path, model, legacy=legacy), judge_of(model)
    bare = spm.ModelProto.FromString(model)
    bare.normalizer_spec.add_dummy_prefix = False
    second = judge if legacy else judge_of(bare.SerializeToString())
    found = ids(tokenizer, "富士山</s>The dog")
    assert found == [*judge.encode("富士山"), 2, *second.encode("The dog")]


def test_added_tokens_keep_their_ids(tmp_path: Path, model: bytes) -> None:
    end = judge_of(model).vocab_size()
    added = {str(end): {"content": "<|im_end|>", "special": True}}
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": end + 1}))
    tokenizer = converted(tmp_path, model, added_tokens_decoder=added)
    judge = judge_of(model)
    assert ids(tokenizer, "a<|im_end|>b<tool>") == [
        *judge.encode("a"),
        end,
        *judge.encode("b"),
        end + 1,
    ]
    assert tokenizer.decode([end, end + 1]) == "<tool>"


def test_added_tokens_with_gaps_are_refused(tmp_path: Path, model: bytes) -> None:
    with pytest.raises(ConversionRefused, match="`<far>` has id 9999"):
        converted(tmp_path, model, added_tokens_decoder={"9999": {"content": "<far>"}})


@pytest.mark.parametrize(
    "options",
    [
        {"byte_fallback": False, "vocab_size": 350},
        {"add_dummy_prefix": False},
        {"split_digits": False, "character_coverage": 0.98},
    ],
    ids=["unknowns", "no prefix", "rare characters"],
)
def test_other_settings_give_sentencepieces_ids(tmp_path: Path, options: dict[str, Any]) -> None:
    model = train(tmp_path, ENGLISH + JAPANESE, **{"vocab_size": 600, **options})
    tokenizer, judge = converted(tmp_path, model), judge_of(model)
    for text in (*SAMPLES, *random_texts(300)):
        text = text.replace("<unk>", "unk").replace("<0x", "0x")
        assert ids(tokenizer, text) == judge.encode(text), text


def test_user_defined_pieces_are_taken_whole(tmp_path: Path) -> None:
    model = train(
        tmp_path, ENGLISH, vocab_size=600, add_dummy_prefix=False, user_defined_symbols=["<turn>"]
    )
    tokenizer = converted(tmp_path, model, tokenizer_class="GemmaTokenizer", bos_token="<s>")
    judge = judge_of(model)
    text = "a <turn>The dog<turn>"
    assert ids(tokenizer, text) == judge.encode(text)
    assert tokenizer.decode(ids(tokenizer, text)) == text


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes text"),
        ({"remove_extra_whitespaces": True}, "normalizes text"),
        ({"user_defined_symbols": ["<turn>"]}, "user-defined pieces and adds a leading space"),
        ({"model_type": "unigram", "vocab_size": 340}, "does not split by merges"),
    ],
)
def test_what_tokenizer_json_cannot_do_is_refused(
    tmp_path: Path, options: dict[str, Any], why: str
) -> None:
    model = train(tmp_path, ENGLISH, **{"vocab_size": 600, **options})
    with pytest.raises(ConversionRefused, match=why):
        converted(tmp_path, model)


def test_a_tokenizer_class_with_rules_of_its_own_is_refused(tmp_path: Path, model: bytes) -> None:
    with pytest.raises(ConversionRefused, match="`T5Tokenizer` is not one that is known"):
        converted(tmp_path, model, tokenizer_class="T5Tokenizer")


@pytest.mark.parametrize("content", [b"version https://git-lfs", b"\x0a\xff\xff\xff\x7f"])
def test_a_broken_file_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ConversionRefused, match=r"tokenizer\.model"):
        converted(tmp_path, content)


def test_the_model_is_read_as_protobuf_reads_it(model: bytes) -> None:
    ours, theirs = read_model(model), spm.ModelProto.FromString(model)
    assert [(piece.text, piece.score, piece.kind) for piece in ours.pieces] == [
        (piece.piece, piece.score, piece.type) for piece in theirs.pieces
    ]
    assert ours.has_byte_fallback
    assert ours.adds_dummy_prefix
    assert not ours.removes_extra_spaces
    assert build(ours, Settings()).get_vocab_size() == len(theirs.pieces)


# --- hostile files --------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def field(number: int, wire_type: int, content: bytes) -> bytes:
    return varint(number << 3 | wire_type) + content


def message(number: int, content: bytes) -> bytes:
    return field(number, 2, varint(len(content)) + content)


TRAINER = message(2, field(3, 0, varint(2)))  # BPE
SCORE = b"\x15" + bytes(4)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (field(1, 2, varint(2**60)), "a field of 1152921504606846976 bytes"),
        (field(1, 2, varint(2**63)) + bytes(9), "a field of 9223372036854775808 bytes, and its me"),
        (b"\x80" * (1 << 20), "more than 64 bits"),
        (b"\x08" + b"\xff" * (1 << 20), "more than 64 bits"),
        (b"\x0a\x80", "ends in the middle of a number"),
        (field(1, 0, varint(5)), "5 in place of bytes"),
        (field(1, 3, b""), "wire type 3"),
        (message(1, field(1, 0, varint(7))), "7 in place of bytes"),
        (message(1, message(1, b"\xff")), "can't decode byte 0xff"),
        (message(1, field(2, 0, varint(7))), "7 in place of bytes"),
        (message(1, b"\x15" + b"\x00\x00\xc0\x7f"), "a score of"),  # NaN
        (message(1, message(2, b"long score")), "a score of"),
        (message(1, SCORE + message(3, b"x")), "in place of a number"),
        (message(2, message(3, b"x")), "in place of a number"),
        (TRAINER + message(3, field(4, 0, b"\0")), "has no unknown piece"),
        (TRAINER + message(1, b"") * ((1 << 20) + 1), "more than 1048576 pieces"),
    ],
)
def test_a_message_that_lies_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    with pytest.raises(ConversionRefused, match=why):
        converted(tmp_path, content)
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.model").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConversionRefused, match=r"tokenizer\.model has 1099511627776 bytes, the l"):
        write_tokenizer(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"tokenizer_class": ["LlamaTokenizer"]}, "tokenizer class a list of 1 is not"),
        ({"added_tokens_decoder": [1]}, "`added_tokens_decoder` is a list of 1"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "`added_tokens_decoder`: `x` is"),
        ({"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}, "`added_tokens_decoder`: `999"),
        ({"added_tokens_decoder": {"5": {}}}, "`added_tokens_decoder`: `5` is a dict of 0"),
        ({"added_tokens_decoder": {"5": 7}}, "`added_tokens_decoder`: `5` is 7"),
        ({"added_tokens_decoder": {"5": {"content": []}}}, "`added_tokens_decoder`: `5` is a dict"),
        ({"bos_token": "no such token"}, "`no such token` is to stand in every text"),
    ],
)
def test_settings_of_another_shape_are_refused(
    tmp_path: Path, model: bytes, config: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConversionRefused, match=why):
        converted(tmp_path, model, **config)


@pytest.mark.parametrize(
    "config",
    [
        {"additional_special_tokens": 5},
        {"additional_special_tokens": [None, {}, 5, []]},
        {"bos_token": 5, "eos_token": [], "unk_token": {"content": {}}},
        {"legacy": "x", "add_bos_token": [], "add_eos_token": {"a": 1}},
    ],
)
def test_settings_that_say_nothing_are_as_if_absent(
    tmp_path: Path, model: bytes, config: dict[str, Any]
) -> None:
    assert converted(tmp_path, model, **config).get_vocab_size() > 0


def test_added_tokens_json_of_another_shape_is_refused(tmp_path: Path, model: bytes) -> None:
    (tmp_path / "added_tokens.json").write_text('{"<a>": [5]}')
    with pytest.raises(ConversionRefused, match=r"added_tokens\.json: `<a>` is a list of 1"):
        converted(tmp_path, model)


def test_a_piece_that_would_be_cut_a_million_times_is_refused(tmp_path: Path) -> None:
    long = "a" * 100_000
    pieces = message(1, message(1, b"<unk>") + SCORE + field(3, 0, b"\x02"))
    pieces += message(1, message(1, long.encode()) + SCORE)
    with pytest.raises(ConversionRefused, match="pieces of up to 100000 characters"):
        converted(tmp_path, TRAINER + message(3, field(4, 0, b"\0")) + pieces)


def test_many_control_pieces_are_added_at_once(tmp_path: Path) -> None:
    """One by one they take their square: 20,000 took a minute."""
    control = [
        message(1, message(1, b"<%d>" % number) + SCORE + b"\x18\x03") for number in range(20_000)
    ]
    unknown = message(1, message(1, b"<unk>") + SCORE + b"\x18\x02")
    content = TRAINER + message(3, field(4, 0, b"\0")) + unknown + b"".join(control)
    started = time.monotonic()
    tokenizer = converted(tmp_path, content, add_bos_token=False)
    assert time.monotonic() - started < 20
    assert tokenizer.encode("<7><19999>").ids == [8, 20_000]


def test_every_mutant_of_a_model_is_refused_or_converted(tmp_path: Path, model: bytes) -> None:
    outcomes = set()
    for number, content in mutants(model, 300):
        try:
            converted(tmp_path, content)
            outcomes.add("converted")
        except ConversionRefused:
            outcomes.add("refused")
        except BaseException as error:
            error.add_note(f"mutant {number}")
            raise
    assert outcomes == {"converted", "refused"}
