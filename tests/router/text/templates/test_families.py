"""The templates of model families, character by character as `transformers` renders them.

The templates under families/ are written for these tests from the formats that are public: special
tokens, layout, and the Jinja that the models' own templates use.
"""

import contextlib
import copy
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tests.router.text.templates.conversations import (
    CALL,
    CHATS,
    RESULT,
    TOOLS,
    Chat,
    assistant,
    user,
)
from tokenizers import models

from kagami_proto.errors import InvalidRequest, TemplateError
from kagami_router.text import chat_template, tokenizer
from kagami_router.text.chat_template import ChatTemplate, PromptOptions

transformers = pytest.importorskip("transformers")

FOLDER = Path(__file__).parent / "families"
FAMILIES = sorted(path.name for path in FOLDER.iterdir())
# Templates that loop over `content`; the others need one text.
READS_CHUNKS = {"gemma_3", "llama_3_2_vision"}


@functools.cache
def ours(family: str) -> ChatTemplate:
    folder = FOLDER / family
    loaded = chat_template.load(folder, tokenizer.special_tokens(folder))
    assert isinstance(loaded, ChatTemplate)
    return loaded


@pytest.fixture(scope="session")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The tokenizer of `transformers` for a family, loaded from the same files."""

    @functools.cache
    def load(family: str) -> Any:
        folder = tmp_path_factory.mktemp("families") / family
        shutil.copytree(FOLDER / family, folder)
        tokenizers.Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))
        return transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))

    return load


def rendered_by(tokenizer: Any, family: str, chat: Chat) -> str | None:
    """The prompt of `transformers`; None if it raises."""
    options = dict(chat.options)
    prompts = options.pop("add_generation_prompt", "continue_final_message" not in options)
    messages = copy.deepcopy(chat.messages)
    for message in messages:
        if isinstance(message["content"], list) and family not in READS_CHUNKS:
            message["content"] = "".join(part["text"] for part in message["content"])
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=prompts,
            chat_template=options.pop("template", None),
            **options.pop("variables", {}),
            **options,
        )
    except Exception:
        return None
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (family, name)
        for family in FAMILIES
        for name, chat in CHATS.items()
        if family == "command_r" or "template" not in chat.options  # the one with names
    ],
)
def test_a_prompt_is_what_transformers_makes(
    family: str, name: str, theirs: Callable[[str], Any]
) -> None:
    chat = CHATS[name]
    expected = rendered_by(theirs(family), family, chat)
    before = copy.deepcopy(chat.messages)
    if expected is None:
        with pytest.raises(TemplateError):
            ours(family).render(chat.messages, PromptOptions(**chat.options))
    else:
        assert ours(family).render(chat.messages, PromptOptions(**chat.options)) == expected
    assert chat.messages == before


CALL_WITHOUT_CONTENT = Chat([user(), assistant(None, tool_calls=[CALL]), RESULT], TOOLS)
KNOW_CALLS = {
    "command_r",
    "deepseek_v3",
    "harmony",
    "llama_3_1",
    "mistral_nemo",
    "qwen2_5",
    "qwen3",
}


@pytest.mark.parametrize("family", sorted(KNOW_CALLS))
def test_a_call_without_content_is_rendered_as_there(
    family: str, theirs: Callable[[str], Any]
) -> None:
    expected = rendered_by(theirs(family), family, CALL_WITHOUT_CONTENT)
    assert expected is not None
    options = PromptOptions(**CALL_WITHOUT_CONTENT.options)
    assert ours(family).render(CALL_WITHOUT_CONTENT.messages, options) == expected


def test_most_of_the_comparisons_are_of_prompts() -> None:
    """The comparison means something only if most chats render on both sides."""
    rendered = dict.fromkeys(FAMILIES, 0)
    for family in FAMILIES:
        for chat in CHATS.values():
            with contextlib.suppress(TemplateError, InvalidRequest):
                ours(family).render(chat.messages, PromptOptions(**chat.options))
                rendered[family] += 1
    assert min(rendered.values()) > len(CHATS) / 3
    assert sum(rendered.values()) > len(CHATS) * len(FAMILIES) * 0.8
