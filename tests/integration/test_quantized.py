"""The embedded model in 8 and 4 bits: how well it still predicts a text."""

from pathlib import Path

import pytest
from tests.benchmarks.perplexity import WINDOW, Perplexities, measure, native_runtime
from tests.fakes.native import needs_library

from kagami_shard.backends.native.runtime import Runtime

pytestmark = pytest.mark.slow
# How much of the text is read. The native int8 loses 1.4 % over 3 windows, 0.8 % over 12, and
# 0.7 % over the whole text.
TORCH_TOKENS = 3 * WINDOW
NATIVE_TOKENS = 12 * WINDOW
# At most so many times the perplexity of bfloat16. The figures of the whole text are in
# shard/kagami_shard/quantization/README.md.
LIMITS = {"int8": 1.01, "int4": 1.06, "fp8": 1.03}


def measured(folder: Path, quantize: str | None, runtime: Runtime | None) -> Perplexities:
    return measure(
        folder, quantize, runtime, torch_tokens=TORCH_TOKENS, native_tokens=NATIVE_TOKENS
    )


@pytest.fixture(scope="module")
def runtime() -> Runtime | None:
    return native_runtime()


@pytest.fixture(scope="module")
def unquantized(model_folder: Path, runtime: Runtime | None) -> Perplexities:
    return measured(model_folder, None, runtime)


@pytest.fixture(scope="module", params=LIMITS)
def quantized(
    request: pytest.FixtureRequest, model_folder: Path, runtime: Runtime | None
) -> tuple[Perplexities, float]:
    """With the limit; loaded once for both tests."""
    return measured(model_folder, request.param, runtime), LIMITS[request.param]


def test_perplexity_in_torch_stays_near(
    quantized: tuple[Perplexities, float], unquantized: Perplexities
) -> None:
    found, limit = quantized
    assert found.torch < limit * unquantized.torch


def test_perplexity_of_the_native_step_stays_near(
    quantized: tuple[Perplexities, float], unquantized: Perplexities
) -> None:
    needs_library()
    found, limit = quantized
    assert found.native < limit * unquantized.native
