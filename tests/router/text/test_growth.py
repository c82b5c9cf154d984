"""A tokenizer whose rules multiply a text is refused when it is loaded."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.fakes.byte_tokenizer import byte_tokenizer, byte_tokenizer_with_start
from tests.fakes.pieces import swallow_like
from tokenizers import Regex, Tokenizer, decoders, normalizers, processors

from kagami_launcher.convert.sentencepiece_model import write_tokenizer
from kagami_router.text import tokenizer as loading
from kagami_router.text.encode_queue import EncodeQueue
from kagami_router.text.growth import check_growth

Change = Callable[[Tokenizer], None]


def normalizing(*steps: normalizers.Normalizer) -> Change:
    def change(tokenizer: Tokenizer) -> None:
        tokenizer.normalizer = normalizers.Sequence([*steps])

    return change


def decoding(*steps: decoders.Decoder) -> Change:
    def change(tokenizer: Tokenizer) -> None:
        tokenizer.decoder = decoders.Sequence([*steps])

    return change


def framing(*pieces: str) -> Change:
    def change(tokenizer: Tokenizer) -> None:
        tokenizer.post_processor = processors.Sequence(
            [processors.TemplateProcessing(single=[*pieces], special_tokens=[("a", 1)])]
        )

    return change


TENFOLD = normalizers.Replace("a", "a" * 10)
HOSTILE: dict[str, tuple[Change, str]] = {
    "one rule": (normalizing(normalizers.Replace("a", "b" * 65)), "65 times as long"),
    "a rule and another": (normalizing(TENFOLD, TENFOLD), "its normalizer may make a text 100"),
    "rules in rules": (
        normalizing(normalizers.Sequence([TENFOLD]), normalizers.Sequence([TENFOLD])),
        "100 times",
    ),
    "a hundred rules": (normalizing(*[TENFOLD] * 100), "1000000000 times as long or more"),
    "an expression": (normalizing(normalizers.Replace(Regex(""), "b" * 64)), "65 times"),
    "something in front": (normalizing(normalizers.Prepend("a" * 1025)), "adds 1025 characters"),
    "something that grows in front": (
        normalizing(normalizers.Prepend("a" * 200), TENFOLD),
        "adds 2000 characters",
    ),
    "the decoder": (decoding(decoders.Replace("a", "a" * 65)), "its decoder may make a text 65"),
    "many tokens around": (framing(*["a"] * 1025, "$A"), "adds 1025 tokens in `single`"),
    "the text twice": (framing("$A", "$A"), "repeats a text in `single`"),
}


@pytest.mark.parametrize(("change", "why"), HOSTILE.values(), ids=HOSTILE)
def test_rules_that_multiply_a_text_are_refused(tmp_path: Path, change: Change, why: str) -> None:
    hostile = byte_tokenizer()
    change(hostile)
    hostile.save(str(tmp_path / "tokenizer.json"))
    with ThreadPoolExecutor(1) as threads, pytest.raises(ValueError, match=why) as refusal:
        loading.load(tmp_path, EncodeQueue(threads, 1))
    assert str(refusal.value).startswith(f"{tmp_path}/tokenizer.json is no tokenizer: ")


def test_rules_of_real_tokenizers_are_fine(tmp_path: Path) -> None:
    check_growth(byte_tokenizer())
    check_growth(byte_tokenizer_with_start())
    (tmp_path / "tokenizer.model").write_bytes(swallow_like(tmp_path))
    write_tokenizer(tmp_path, tmp_path)
    check_growth(Tokenizer.from_file(str(tmp_path / "tokenizer.json")))
    usual = byte_tokenizer()
    usual.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Replace("``", '"'),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Replace(" ", "▁"),
        ]
    )
    check_growth(usual)


def test_a_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)
    with (
        ThreadPoolExecutor(1) as threads,
        pytest.raises(ValueError, match="has 1099511627776 bytes, the limit is 268435456"),
    ):
        loading.load(tmp_path, EncodeQueue(threads, 1))
