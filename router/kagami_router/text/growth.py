"""How much longer a tokenizer's own rules may make a text; one that multiplies it is refused.

A tokenizer.json may replace each character by a thousand, and that again: its first prompt would
take all memory. Rules of real tokenizers replace a space by one mark.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers

_MAX_FACTOR = 64
_MAX_CONSTANT = 1024

_Step = Mapping[str, Any]


def check_growth(tokenizer: tokenizers.Tokenizer) -> None:
    """Refuse rules that may lengthen a text by more than a factor of 64; raises `ValueError`."""
    for name, part in (("normalizer", tokenizer.normalizer), ("decoder", tokenizer.decoder)):
        factor, constant = 1, 0
        for step in _steps(part):
            factor *= _factor(step)
            constant = constant * _factor(step) + len(step.get("prepend") or "")
        if factor > _MAX_FACTOR:
            raise ValueError(
                f"its {name} may make a text {min(factor, 10**9)} times as long or more, the limit "
                f"is {_MAX_FACTOR}"
            )
        if constant > _MAX_CONSTANT:
            raise ValueError(
                f"its {name} adds {min(constant, 10**9)} characters or more to a text, the limit "
                f"is {_MAX_CONSTANT}"
            )
    for step in _steps(tokenizer.post_processor):
        for form in ("single", "pair"):
            _check_template(step, form)


def _check_template(step: _Step, form: str) -> None:
    """A template says what stands around a text: once, and few tokens."""
    items = step.get(form)
    if step["type"] != "TemplateProcessing" or not items:
        return
    texts = [item["Sequence"]["id"] for item in items if "Sequence" in item]
    if len(set(texts)) < len(texts):
        raise ValueError(f"its post_processor repeats a text in `{form}`")
    known = step["special_tokens"]
    num_tokens = sum(
        len(known[item["SpecialToken"]["id"]]["ids"]) for item in items if "SpecialToken" in item
    )
    if num_tokens > _MAX_CONSTANT:
        raise ValueError(
            f"its post_processor adds {num_tokens} tokens in `{form}`, the limit is {_MAX_CONSTANT}"
        )


def _factor(step: _Step) -> int:
    """At most so many characters become of one."""
    if step["type"] != "Replace":
        return 1
    content, pattern = step["content"], step["pattern"].get("String")
    if pattern:
        return max(1, -(-len(content) // len(pattern)))
    return 1 + len(content)  # an expression may match between any two characters


def _steps(part: Any) -> Iterator[_Step]:
    """All steps of a normalizer, decoder or post-processor, in their order."""
    if part is None:
        return
    waiting = [json.loads(part.__getstate__())]
    while waiting:
        step = waiting.pop()
        inner = [step[name] for name in ("normalizers", "decoders", "processors") if name in step]
        if inner:
            waiting += reversed(inner[0])
        else:
            yield step
