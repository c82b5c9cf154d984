"""Tokenizers without training, one token for each byte: one as GPT's, one with `<s>` as Llama's."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

EOS = 256


def alphabet() -> list[str]:
    """The characters that stand for the bytes 0 .. 255 in a byte-level vocabulary."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def byte_tokenizer() -> Tokenizer:
    """Id = byte; id 256 is the special token `<eos>`."""
    vocabulary = {character: byte for byte, character in enumerate(alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True, normalized=False)])
    return tokenizer


def byte_tokenizer_with_start() -> Tokenizer:
    """Id 0 is `<s>`, which stands before every text; 1 is `</s>`; then the bytes, by character."""
    vocabulary = {"<s>": 0, "</s>": 1} | {one: n for n, one in enumerate(sorted(alphabet()), 2)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer
