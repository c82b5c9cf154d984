"""Token lists of the routes that only tokenize."""

from collections.abc import Sequence

from kagami_router.api.schemas.native import SimpleToken
from kagami_router.text.tokenizer import TextToken


def simple_tokens(spans: Sequence[TextToken]) -> list[SimpleToken]:
    """Ids, texts and byte offsets, as /tokenize lists them."""
    return [SimpleToken(*span) for span in spans]
