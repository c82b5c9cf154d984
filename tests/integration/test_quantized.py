"""The embedded model in 8 and 4 bits: how well it still predicts a text."""

from pathlib import Path

import pytest
from tests.benchmarks.perplexity import measure

pytestmark = pytest.mark.slow
# Three windows of the text.
NUM_TOKENS = 1536


@pytest.fixture(scope="module")
def unquantized(model_folder: Path) -> float:
    return measure(model_folder, None, NUM_TOKENS)


@pytest.mark.parametrize(("quantize", "limit"), [("int8", 1.01), ("int4", 1.06), ("fp8", 1.03)])
def test_perplexity_stays_near(
    quantize: str, limit: float, unquantized: float, model_folder: Path
) -> None:
    assert measure(model_folder, quantize, NUM_TOKENS) < limit * unquantized
