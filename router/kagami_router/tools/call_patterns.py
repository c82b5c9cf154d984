"""Recognizes the beginning and the end of a tool call in text that is still incomplete."""

import re
from collections.abc import Iterable

from kagami_router.tools.offers import NAME
from kagami_router.tools.tool_forms import FILLINGS, PLACEHOLDER, ToolForm

# Without a grammar, white space is unbounded. A text longer than this, in characters, is no head.
_MAX_HEAD = 512
_SPACE = r"\s*"


class Pattern:
    """A form's text with any white space that JSON allows; also matches its beginnings."""

    def __init__(self, units: Iterable[str], behind: str = "") -> None:
        units = list(units)
        beginning = ""
        for unit in reversed(units):
            beginning = f"(?:{unit}{beginning})?"
        self._whole = re.compile("".join(units) + behind)
        self._beginning = re.compile(beginning)

    def end_in(self, text: str) -> int | None:
        """The index where the pattern ends, or None if `text` does not begin with it."""
        match = self._whole.match(text)
        return None if match is None else match.end()

    def name_in(self, text: str) -> str:
        """The function's name in a text that begins with the pattern, else ""."""
        match = self._whole.match(text)
        return "" if match is None else match["name"]

    def could_match(self, text: str) -> bool:
        """Whether `text` or a continuation of it begins with the pattern."""
        return len(text) <= _MAX_HEAD and (
            self._whole.match(text) is not None or self._beginning.fullmatch(text) is not None
        )


def patterns_of(form: ToolForm) -> tuple[Pattern, Pattern, Pattern]:
    """The head of the first call, that of a further call in a list, and the foot."""
    name = f"(?P<name>{NAME})"
    begin = form.style.begin
    arguments_follow = f"(?={begin})" if begin else ""
    lead = form.lead if form.lead.isspace() else f"{form.lead} "
    return (
        Pattern(_units(lead + form.before, name, form.after), arguments_follow),
        Pattern(_units(f" {form.between} {form.before}", name, form.after), arguments_follow),
        Pattern(_units(f" {form.foot}") if form.foot else []),
    )


def _units(text: str, *more: str) -> list[str]:
    """Regex parts of a form's text; white space is optional where JSON allows it.

    Behind `text` may stand a regex, and a text again.
    """
    units: list[str] = []
    for part in re.split(rf"{PLACEHOLDER.pattern}|(\s+|[{{,:\[])", text):
        if not part:
            continue
        if part in FILLINGS:
            units.append(FILLINGS[part].read)
        elif part.isspace():
            units.append(_SPACE)
        elif part in ("{", ",", ":", "["):
            units += [_SPACE, re.escape(part), _SPACE]
        else:
            units += map(re.escape, part)
    if more:
        units += [more[0], *_units(*more[1:])]
    return [
        one
        for one, before in zip(units, ["", *units], strict=False)
        if (one, before) != (_SPACE, _SPACE)
    ]
