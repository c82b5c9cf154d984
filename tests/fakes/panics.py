"""A tokenizer whose decoder panics: a `Strip` of more characters than a token has."""

import json

import tokenizers
from tests.fakes.byte_tokenizer import byte_tokenizer


def panicking_tokenizer() -> tokenizers.Tokenizer:
    """Encodes as the byte tokenizer does; decoding one character raises `PanicException`."""
    content = json.loads(byte_tokenizer().to_str())
    content["decoder"] = {"type": "Strip", "content": "a", "start": 1, "stop": 1}
    return tokenizers.Tokenizer.from_str(json.dumps(content))
