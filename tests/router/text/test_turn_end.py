import json

import pytest
import tokenizers
from tests.fakes.byte_tokenizer import byte_tokenizer

from kagami_router.text.chat_template import ChatTemplate, MissingTemplate
from kagami_router.text.tokenizer import SpecialTokens
from kagami_router.text.turn_end import turn_end_ids

TOKENS = SpecialTokens("<s>", "</s>", {})
ADDED = ("</s>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|endoftext|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vocabulary() -> tokenizers.Tokenizer:
    made = byte_tokenizer()
    made.add_special_tokens(list(ADDED))
    return tokenizers.Tokenizer.from_str(json.dumps(json.loads(made.to_str())))


async def texts(eos: str | None, template: ChatTemplate | MissingTemplate) -> set[str | None]:
    made = vocabulary()
    return {made.id_to_token(one) for one in await turn_end_ids(eos, template, made)}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, {"<|im_end|>"}),
        ("{% for m in messages %}{{ m.content }}<|end|>\n<|endoftext|>{% endfor %}", {"<|end|>"}),
        ("{% for m in messages %}{{ m.content }} {{ eos_token }}{% endfor %}", {"</s>"}),
        ("{% for m in messages %}{{ m.content }}\n\n{% endfor %}", set()),
        ("<|end|>{% for m in messages %}{{ m.content | upper }}<|end|>{% endfor %}", set()),
        ("{{ raise_exception('no') }}", set()),
    ],
)
async def test_the_token_behind_an_assistants_message_ends_a_text(
    template: str, expected: set[str]
) -> None:
    made = ChatTemplate(template, TOKENS)
    assert await texts(None, made) - {"</s>"} == expected - {"</s>"}
    assert await texts("</s>", made) == expected | {"</s>"}


async def test_a_model_without_a_template_has_the_tokenizers_token() -> None:
    missing = MissingTemplate("no template")
    assert await texts("</s>", missing) == {"</s>"}
    assert await texts(None, missing) == set()
    assert await texts("<unknown>", missing) == set()
