"""Small SentencePiece models: trained as Llama's, and with Japanese added as Swallow's."""

import io
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as spm

ENGLISH = """The quick brown fox jumps over the lazy dog while the sun sets behind the mountains.
Large language models are trained on a great deal of text and answer questions about the world.
A server keeps the weights in memory and gives every request its turn, step by step.
def fibonacci(n):    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)
for index in range(10):        print(index, values[index], "done")
What is the highest mountain in Japan? Mount Fuji is the highest mountain in Japan, at 3,776 m.
In 1969, people walked on the moon; in 2024, models talk about it: 0123456789.
http://localhost:8080/generate {"inputs": "hello", "parameters": {"max_new_tokens": 20}}"""
JAPANESE = """日本で一番高い山はなんですか？富士山です。
富士山は、静岡県と山梨県にまたがる標高3,776mの山です。
吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。
大規模言語モデルは、たくさんの文章から言葉の使い方を学びます。
東京の天気は晴れ、明日は雨が降るでしょう。電車は九時に出発します。
こんにちは、私の名前は太郎です。日本語の文章を書いています。
ベストアンサーに選ばれた回答。日本で一番高い山は富士山です。日本の首都は東京です。"""
SAMPLES = (
    "",
    " ",
    "  ",
    "The capital of France is",
    " leading, trailing ",
    "a  b   c    d     e      f       g        h         i",
    " " * 17 + "x" + " " * 33,
    "日本で一番高い山はなんですか？",
    "日本で一番高い山は富士山です。\n\n吾輩は猫である。名前はまだ無い。",
    "東京  と 大阪　全角の空白",
    "ﾊﾝｶｸ と ＦＵＬＬＷＩＤＴＨ ①②③ ㍿ が が",
    "鬱蒼たる薔薇と麒麟、𠮷野家で𩸽を食べる",
    "🍕🎉 I love pizza 👩‍👩‍👧‍👦 and 🏳️‍🌈 flags 🇯🇵",
    "def f(x):\n\treturn {\n\t\t'a': x,\r\n    }\n\n\n# done\n",
    "aaaaaaaaaaaaaaaaaaaaaaa  ーーーーーーーーーーー。。。。。",
    "▁already▁there ▁ ▁▁",
    "<0x0A> <0xE6> <unk> in text",
    "e\u0301 caf\u00e9 \u200b\u00a0\ufeff zero\x00null",
    "1234567890 3,776m 0.5e-3",
    "https://example.org/?q=日本語&x=%20",
)


def train(folder: Path, text: str, *, vocab_size: int, **options: Any) -> bytes:
    """A model with Llama 2's settings; `options` change them."""
    corpus = folder / "corpus.txt"
    corpus.write_text(text * 3, encoding="utf-8")
    model = io.BytesIO()
    defaults = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "character_coverage": 1.0,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_writer=model, vocab_size=vocab_size, **(defaults | options)
    )
    return model.getvalue()


def swallow_like(folder: Path) -> bytes:
    """An English model, and behind its pieces those of a Japanese one, with their own scores."""
    english = spm.ModelProto.FromString(train(folder, ENGLISH, vocab_size=600))
    japanese = spm.ModelProto.FromString(train(folder, JAPANESE, vocab_size=620))
    known = {piece.piece for piece in english.pieces}
    english.pieces.extend(
        piece
        for piece in japanese.pieces
        if piece.type == piece.NORMAL and piece.piece not in known
    )
    return english.SerializeToString()
