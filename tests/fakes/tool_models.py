"""What decides a model's format of tool calls: its chat template and its added tokens."""

from typing import NamedTuple

import tokenizers
from tests.fakes.byte_tokenizer import byte_tokenizer
from tokenizers import AddedToken

from kagami_router.request.values import Token
from kagami_router.tools.formats import ToolFormat, find_format
from kagami_router.tools.tool_forms import FORMS


class Described(NamedTuple):
    """The two facts that are read from a chat template."""

    source: str
    reads_tools: bool = True


BY_NAME = {one.name: one for one in FORMS}
QWEN = Described("{{ tools }}<tool_call>")
LLAMA = Described('{{ tools }}Respond in the format {"name": function name, "parameters": …')
MISTRAL = Described("{{ tools }}[TOOL_CALLS] [")
MISTRAL_ARGS = Described("{{ tools }}[TOOL_CALLS]name[ARGS]")
# Forms that are tried with the markers that their models have as special tokens, as other added
# tokens, or as no tokens.
SPECIAL = (
    *("deepseek_v3", "deepseek_v31", "kimi_k2", "mistral_call_id", "phi4_mini", "granite"),
    *("cohere", "gemma4", "functiongemma", "lfm2", "pythonic"),
)
PLAIN = ("qwen3_coder", "glm45", "minimax_m2", "seed_oss", "deepseek_v32", "nemotron", "olmo3")
TOKENLESS = (
    *("qwen3_coder", "glm45", "minimax_m2", "seed_oss", "nemotron", "command_r", "granite"),
    *("functiongemma", "olmo3", "pythonic"),
)
UNAWARE = Described("{{ messages }}", reads_tools=False)


def vocabulary(*special: str, plain: tuple[str, ...] = ()) -> tokenizers.Tokenizer:
    """Single bytes, `<eos>`, and these added tokens."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(
        [AddedToken(one, special=True, normalized=False) for one in special]
    )
    tokenizer.add_tokens([AddedToken(one, special=False, normalized=False) for one in plain])
    return tokenizer


def described(form: str) -> Described:
    """A template with the signs of a form."""
    return Described("{{ tools }}" + " ".join(BY_NAME[form].signs))


MODELS: dict[str, tuple[Described, tokenizers.Tokenizer]] = {
    "unaware": (UNAWARE, vocabulary()),
    "qwen": (QWEN, vocabulary(plain=("<tool_call>", "</tool_call>"))),
    "hermes-special": (QWEN, vocabulary("<tool_call>", "</tool_call>")),
    "llama": (LLAMA, vocabulary("<|python_tag|>")),
    "llama-plain": (LLAMA, vocabulary()),
    "mistral": (MISTRAL, vocabulary("[TOOL_CALLS]")),
    "mistral-plain": (MISTRAL, vocabulary()),
    "mistral-args": (MISTRAL_ARGS, vocabulary("[TOOL_CALLS]", "[ARGS]")),
    **{one: (described(one), vocabulary(*BY_NAME[one].markers)) for one in SPECIAL},
    **{f"{one}-added": (described(one), vocabulary(plain=BY_NAME[one].markers)) for one in PLAIN},
    **{f"{one}-text": (described(one), vocabulary()) for one in TOKENLESS},
}
# Their calls begin like a text.
BARE = tuple(one for one in MODELS if not find_format(*MODELS[one]).form.opener)


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
