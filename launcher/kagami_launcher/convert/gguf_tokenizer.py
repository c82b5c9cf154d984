"""The text half of a conversion: a GGUF file's metadata and its tokenizer.

A GGUF file carries only the name of its tokenizer's splitting rule. The table `_SPLITS` says what
the names mean. Other names are refused, because a wrong rule gives wrong ids without an error
(transformers 5.23 has no entry for "smollm" and does not split its digits).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeGuard

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as pre

from kagami_launcher.convert.files import ConversionRefused, shown
from kagami_launcher.convert.gguf_file import Value
from kagami_launcher.convert.sentencepiece_model import merges_from_scores

# A context of Llama 4's is 10,485,760 tokens, the largest of any count.
_MAX_COUNT = 2**31 - 1
_MAX_FLOAT = 3e38  # of 32 bits


class Metadata:
    """The key-values of a GGUF file, each of the type that it must have.

    `count`, `real` and `kind` are asked for without the architecture's name; a default that is not
    given means that the file has to have the key.
    """

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = values
        self.architecture = self.text("general.architecture", "")

    def text(self, key: str, default: str) -> str:
        value = self._values.get(key)
        if value is None:
            return default
        return _decoded(key, value)

    def texts(self, key: str) -> list[str]:
        """All of an array of text; empty if there is none."""
        return [_decoded(key, item) for item in self._array(key)]

    def numbers(self, key: str) -> list[float]:
        """All of an array of finite numbers; empty if there is none."""
        values = self._array(key)
        if not all(_is_finite(value) for value in values):
            raise ConversionRefused(f"`{key}` is not an array of finite numbers")
        return values

    def _array(self, key: str) -> list[Any]:
        value = self._values.get(key, [])
        if not isinstance(value, list):
            raise ConversionRefused(f"`{key}` is {shown(value)}, expected an array")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._values.get(key, default)
        if not isinstance(value, bool):
            raise ConversionRefused(f"`{key}` is {shown(value)}, expected true or false")
        return value

    def count(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number from `least` to 2^31 - 1."""
        key = f"{self.architecture}.{name}"
        value = self._values.get(key, default)
        if type(value) is not int or not least <= value <= _MAX_COUNT:
            raise ConversionRefused(
                f"`{key}` is {shown(value)}, expected one number from {least} to {_MAX_COUNT}"
            )
        return value

    def real(self, name: str, default: float) -> float:
        """A finite number above 0."""
        key = f"{self.architecture}.{name}"
        value = self._values.get(key, default)
        if not _is_finite(value) or not 0 < value < _MAX_FLOAT:
            raise ConversionRefused(
                f"`{key}` is {shown(value)}, expected one finite number above 0"
            )
        return float(value)

    def kind(self, name: str, default: str) -> str:
        return self.text(f"{self.architecture}.{name}", default)

    def token_id(self, role: str) -> int | None:
        """The id of the token of this role; it is one of the vocabulary."""
        key = f"tokenizer.ggml.{role}_token_id"
        value = self._values.get(key)
        if value is None:
            return None
        num_tokens = len(self._array("tokenizer.ggml.tokens"))
        if type(value) is not int or not 0 <= value < num_tokens:
            raise ConversionRefused(
                f"`{key}` is {shown(value)}, and the vocabulary has {num_tokens} tokens"
            )
        return value


def _decoded(key: str, value: object) -> str:
    if not isinstance(value, bytes):
        raise ConversionRefused(f"`{key}` is {shown(value)}, expected text")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise ConversionRefused(f"`{key}` is {shown(value)}, which is not UTF-8") from error


def _is_finite(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _by_regex(pattern: str) -> Any:
    return pre.Sequence(
        [
            pre.Split(Regex(pattern), behavior="isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _by_digits(_: str) -> Any:
    return pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False, use_regex=True)]
    )


def _by_gpt2(_: str) -> Any:
    return pre.ByteLevel(add_prefix_space=False, use_regex=True)


# tokenizer.ggml.pre -> how text is cut before the merges (llama.cpp's llama-vocab.cpp).
_SPLITS: Mapping[str, tuple[Callable[[str], Any], str]] = MappingProxyType(
    {
        "smollm": (_by_digits, ""),
        "starcoder": (_by_digits, ""),
        "refact": (_by_digits, ""),
        "gpt-2": (_by_gpt2, ""),
        "default": (_by_gpt2, ""),
        "llama3": (_by_regex, _LLAMA3),
        "llama-v3": (_by_regex, _LLAMA3),
        "llama-bpe": (_by_regex, _LLAMA3),
        "qwen2": (_by_regex, _QWEN2),
    }
)

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
# Tokens that end a generation beside the file's own eos; llama.cpp knows them by text, too.
_END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")


def build_tokenizer(metadata: Metadata) -> Tokenizer:
    """The fast tokenizer that the file's vocabulary and merges describe."""
    tokens = vocabulary(metadata)
    kind = metadata.text("tokenizer.ggml.model", "")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, tokens)
    else:
        raise ConversionRefused(f"tokenizer model {shown(kind)} is not supported yet")
    added = [
        AddedToken(token, normalized=False, special=token_type == _CONTROL)
        for token, token_type in zip(tokens, _token_types(metadata, tokens), strict=False)
        if token_type in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)  # one by one takes their square
    bos = metadata.token_id("bos")
    if bos is not None and metadata.flag("tokenizer.ggml.add_bos_token", kind == "llama"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"],
            pair=[tokens[bos], "$A", tokens[bos], "$B"],
            special_tokens=[(tokens[bos], bos)],
        )
    return tokenizer


def vocabulary(metadata: Metadata) -> list[str]:
    """The tokens, each at its id; refuses a file without any."""
    tokens = metadata.texts("tokenizer.ggml.tokens")
    if not tokens:
        raise ConversionRefused("`tokenizer.ggml.tokens` is missing or empty")
    return tokens


def _token_types(metadata: Metadata, tokens: Sequence[str]) -> list[float]:
    return _for_each_token(metadata, "tokenizer.ggml.token_type", tokens)


def _for_each_token(metadata: Metadata, key: str, tokens: Sequence[str]) -> list[float]:
    """One number for each token, or none at all."""
    values = metadata.numbers(key)
    if values and len(values) != len(tokens):
        raise ConversionRefused(
            f"`{key}` has {len(values)} elements, and the vocabulary {len(tokens)} tokens"
        )
    return values


def _byte_level(metadata: Metadata, tokens: Sequence[str]) -> Tokenizer:
    name = metadata.text("tokenizer.ggml.pre", "default")
    if name not in _SPLITS:
        raise ConversionRefused(f"pre-tokenizer {shown(name)} is not supported yet")
    split, pattern = _SPLITS[name]
    vocab = {token: index for index, token in enumerate(tokens)}
    # Llama 3's vocabulary was not made by merges alone: a whole word that is in it is taken as is.
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=_merges(metadata, vocab), ignore_merges=pattern == _LLAMA3)
    )
    tokenizer.pre_tokenizer = split(pattern)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merges(metadata: Metadata, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    found = []
    for index, merge in enumerate(metadata.texts("tokenizer.ggml.merges")):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise ConversionRefused(
                f"`tokenizer.ggml.merges`, element {index}, is {shown(merge)}: not two tokens that "
                "make a third"
            )
        found.append((left, right))
    return found


def _sentencepiece(metadata: Metadata, tokens: Sequence[str]) -> Tokenizer:
    vocab = {token: index for index, token in enumerate(tokens)}
    scores = _for_each_token(metadata, "tokenizer.ggml.scores", tokens)
    if not scores:
        raise ConversionRefused("`tokenizer.ggml.scores` is missing or empty")
    unknown = metadata.token_id("unknown") or 0
    model = models.BPE(
        vocab=vocab,
        merges=merges_from_scores(vocab, scores),
        unk_token=tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.flag("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(undo)
    return tokenizer


def tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    """tokenizer_config.json: which tokens play a role; the chat template is a file of its own."""
    tokens = vocabulary(metadata)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata.count("context_length"),
        "clean_up_tokenization_spaces": False,
    }
    for role, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        if (token_id := metadata.token_id(role)) is not None:
            config[f"{name}_token"] = tokens[token_id]
    return config


def generation_config(metadata: Metadata) -> dict[str, Any]:
    """generation_config.json: every token that ends a generation."""
    tokens = vocabulary(metadata)
    types = _token_types(metadata, tokens)
    ends = [metadata.token_id("eos")]
    ends += [
        index
        for index, token_type in enumerate(types)
        if token_type == _CONTROL and tokens[index] in _END_TOKENS
    ]
    config = {
        "bos_token_id": metadata.token_id("bos"),
        "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)),
        "pad_token_id": metadata.token_id("padding"),
    }
    return {key: value for key, value in config.items() if value is not None}
