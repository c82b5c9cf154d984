"""Parts of a grammar in llguidance's dialect of Lark."""

import json
from collections.abc import Mapping, Sequence

# Any text. Rules of several kinds use it; a grammar needs it once.
ANY = "ANY: /(?s:.*)/"
NOTHING = '""'


def terms(text: str, marker_ids: Mapping[str, int]) -> str:
    """`text` as terms of a rule; markers in it are written as ids."""
    for marker, marker_id in marker_ids.items():
        before, found, after = text.partition(marker)
        if found:
            middle = f"<[{marker_id}]>"
            return f"{terms(before, marker_ids)} {middle} {terms(after, marker_ids)}".strip()
    return literal(text) if text else ""


def literal(text: str) -> str:
    """`text` as one term."""
    return json.dumps(text, ensure_ascii=False)


def listed(name: str, items: Sequence[tuple[str, bool]], separator: str) -> list[str]:
    """Rules for items in this order; the first one is called `name`.

    An item is its terms, and whether it is required. All others may be missing.
    """
    lines = []
    for index, (said, is_required) in enumerate(items):
        is_last = index + 1 == len(items)
        behind = "" if is_last else f" {name}_behind_{index + 1}"
        for kind, before in (("from", ""), ("behind", f"{separator} ")):
            alternatives = [f"{before}{said}{behind}"]
            if not is_required:
                alternatives.append(NOTHING if is_last else f"{name}_{kind}_{index + 1}")
            if index or kind == "from":
                lines.append(f"{name}_{kind}_{index}: {' | '.join(alternatives)}")
    return [f"{name}: {f'{name}_from_0' if items else NOTHING}", *lines]
