"""What config.json and --quantize lead to, and what is refused in which words."""

import pytest

from kagami_proto.errors import UnsupportedModel
from kagami_shard.quantization.select import select_scheme

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        (None, ""),
        ("int8", "int8"),
        ("eetq", "int8"),
        ("bitsandbytes", "int8"),
        ("int4", "int4"),
        ("bitsandbytes-nf4", "int4"),
        ("bitsandbytes-fp4", "int4"),
        ("fp8", "fp8"),
    ],
)
def test_weights_in_full_precision_become_what_the_flag_says(flag: str | None, name: str) -> None:
    assert select_scheme(None, flag).name == name


@pytest.mark.parametrize("flag", [None, "gptq"])
def test_a_quantized_checkpoint_needs_no_flag(flag: str | None) -> None:
    assert select_scheme(GPTQ, flag).name == "gptq"


@pytest.mark.parametrize("flag", ["awq", "gptq", "compressed-tensors"])
def test_a_format_is_not_made_at_load(flag: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"--quantize {flag}: the weights are not quant"):
        select_scheme(None, flag)


def test_what_is_quantized_is_not_quantized_again() -> None:
    with pytest.raises(UnsupportedModel, match=r"--quantize int8: .* already \(gptq\)"):
        select_scheme(GPTQ, "int8")


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"quant_method": "bitsandbytes"}, "quantized by bitsandbytes are not read: quant_method"),
        (GPTQ | {"bits": 3}, "gptq: bits 3 is not read, only 4 or 8"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not read"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq: version 'gemv'"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"weights": {"type": "float", "num_bits": 4}}},
            },
            "weights 'float of 4 bits' is not read, only int of 4 bits, int of 8 bits",
        ),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24"}},
            "sparsity_config.format 'sparse-24'",
        ),
    ],
)
def test_what_is_not_read_is_refused_by_name(config: dict[str, object], text: str) -> None:
    with pytest.raises(UnsupportedModel, match=text):
        select_scheme(config, None)
