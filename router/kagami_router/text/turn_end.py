"""Which tokens end a text, by the tokenizer's files and the chat template.

A chat model ends its turn with the token that its template writes behind an assistant's message.
generation_config.json often names another one, of the base model: then no answer would end.
"""

import tokenizers

from kagami_proto.errors import KagamiError
from kagami_router.text.chat_template import ChatTemplate, MissingTemplate, PromptOptions

_SAID = "\ufdd0kagami-was-here\ufdd0"
_Template = ChatTemplate | MissingTemplate


async def turn_end_ids(
    eos: str | None, template: _Template, tokenizer: tokenizers.Tokenizer
) -> frozenset[int]:
    """The ids of the tokenizer's `eos` and of the special token that closes a turn, if any."""
    texts = (eos, await _closing(template, tokenizer))
    ids = (tokenizer.token_to_id(text) for text in texts if text)
    return frozenset(token_id for token_id in ids if token_id is not None)


async def _closing(template: _Template, tokenizer: tokenizers.Tokenizer) -> str | None:
    """The special token right behind the last message of an assistant."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _SAID}]
    try:
        rendered = await template.prompt(messages, PromptOptions(add_generation_prompt=False))
    except KagamiError:
        return None  # there is no template, or it refuses such a conversation
    _, said, rest = rendered.rpartition(_SAID)
    behind = rest.lstrip() if said else ""  # some templates change what was said
    special = (
        token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special
    )
    return max((text for text in special if behind.startswith(text)), key=len, default=None)
