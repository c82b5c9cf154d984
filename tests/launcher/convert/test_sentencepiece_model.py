"""The sentencepiece library is the judge: tokenizer.json gives its ids and its text."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as spm
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
    with pytest.raises(ConversionRefused, match="<far> has id 9999"):
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
