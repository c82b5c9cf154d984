"""What decides a model's format of tool calls: its chat template and its added tokens."""

from typing import NamedTuple

import tokenizers
from tests.fakes.byte_tokenizer import byte_tokenizer
from tokenizers import AddedToken

from kagami_router.request.values import Token
from kagami_router.tools.formats import ToolFormat, find_format


class Described(NamedTuple):
    """The two facts that are read from a chat template."""

    source: str
    reads_tools: bool = True


QWEN = Described("{{ tools }}<tool_call>")
LLAMA = Described('{{ tools }}Respond in the format {"name": function name, "parameters": …')
MISTRAL = Described("{{ tools }}[TOOL_CALLS] [")
MISTRAL_ARGS = Described("{{ tools }}[TOOL_CALLS]name[ARGS]")
UNAWARE = Described("{{ messages }}", reads_tools=False)


def vocabulary(*special: str, plain: tuple[str, ...] = ()) -> tokenizers.Tokenizer:
    """Single bytes, `<eos>`, and these added tokens."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(
        [AddedToken(one, special=True, normalized=False) for one in special]
    )
    tokenizer.add_tokens([AddedToken(one, special=False, normalized=False) for one in plain])
    return tokenizer


MODELS: dict[str, tuple[Described, tokenizers.Tokenizer]] = {
    "unaware": (UNAWARE, vocabulary()),
    "qwen": (QWEN, vocabulary(plain=("<tool_call>", "</tool_call>"))),
    "hermes-special": (QWEN, vocabulary("<tool_call>", "</tool_call>")),
    "llama": (LLAMA, vocabulary("<|python_tag|>")),
    "llama-plain": (LLAMA, vocabulary()),
    "mistral": (MISTRAL, vocabulary("[TOOL_CALLS]")),
    "mistral-plain": (MISTRAL, vocabulary()),
    "mistral-args": (MISTRAL_ARGS, vocabulary("[TOOL_CALLS]", "[ARGS]")),
}


def format_of(name: str) -> ToolFormat:
    return find_format(*MODELS[name])


def tokens_of(tokenizer: tokenizers.Tokenizer, text: str) -> list[Token]:
    """The tokens that say `text`, as the batching loop shows them; ASCII."""
    special = {
        token_id: token.content
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
        if token.special
    }
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return [
        Token(one, special[one], -0.5, True)
        if one in special
        else Token(one, tokenizer.decode([one]), -0.5, False)
        for one in ids
    ]
