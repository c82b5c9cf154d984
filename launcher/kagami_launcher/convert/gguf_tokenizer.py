"""The text half of a conversion: a GGUF file's metadata and its tokenizer.

A GGUF file carries only the name of its tokenizer's splitting rule. The table `_SPLITS` says what
the names mean. Other names are refused, because a wrong rule gives wrong ids without an error
(transformers 5.23 has no entry for "smollm" and does not split its digits).
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as pre

from kagami_launcher.convert.files import ConversionRefused
from kagami_launcher.convert.sentencepiece_model import merges_from_scores


class Metadata:
    """The key-values of a GGUF file; keys of the architecture are asked for without its name."""

    def __init__(self, reader: Any) -> None:
        self._fields = reader.fields
        self.architecture = str(self.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        found = self._fields.get(key)
        return default if found is None else found.contents()

    def of_model(self, key: str, default: Any = None) -> Any:
        return self.get(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> int:
        value = self.of_model(key)
        if not isinstance(value, int):
            raise ConversionRefused(
                f"`{self.architecture}.{key}` is {value!r}, expected one number"
            )
        return value

    def token_id(self, role: str) -> int | None:
        value = self.get(f"tokenizer.ggml.{role}_token_id")
        return None if value is None else int(value)


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
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, tokens)
    else:
        raise ConversionRefused(f"tokenizer model `{kind}` is not supported yet")
    types = metadata.get("tokenizer.ggml.token_type", [])
    for token, token_type in zip(tokens, types, strict=False):
        if token_type in (_CONTROL, _USER_DEFINED):
            special = token_type == _CONTROL
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=special)])
    bos = metadata.token_id("bos")
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A",
            pair=f"{tokens[bos]} $A {tokens[bos]} $B",
            special_tokens=[(tokens[bos], bos)],
        )
    return tokenizer


def _byte_level(metadata: Metadata, tokens: Sequence[str]) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _SPLITS:
        raise ConversionRefused(f"pre-tokenizer `{name}` is not supported yet")
    split, pattern = _SPLITS[name]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    vocab = {token: index for index, token in enumerate(tokens)}
    # Llama 3's vocabulary was not made by merges alone: a whole word that is in it is taken as is.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pattern == _LLAMA3))
    tokenizer.pre_tokenizer = split(pattern)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Metadata, tokens: Sequence[str]) -> Tokenizer:
    vocab = {token: index for index, token in enumerate(tokens)}
    scores = metadata.get("tokenizer.ggml.scores", [])
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
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(undo)
    return tokenizer


def tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    """tokenizer_config.json: which tokens play a role; the chat template is a file of its own."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata.need("context_length"),
        "clean_up_tokenization_spaces": False,
    }
    for role, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        if (token_id := metadata.token_id(role)) is not None:
            config[f"{name}_token"] = tokens[token_id]
    return config


def generation_config(metadata: Metadata) -> dict[str, Any]:
    """generation_config.json: every token that ends a generation."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type", [])
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
