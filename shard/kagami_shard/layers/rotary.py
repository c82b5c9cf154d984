"""Rotary position embedding (RoFormer, arXiv:2104.09864) and the ways to stretch it.

The angle of a pair of dimensions is position x frequency. A key is rotated once, when it is
written into the cache, so its angle may depend on nothing but its position: chunked prompts and
shared prefixes rest on that. Kinds whose frequencies follow the sequence's length (`dynamic`,
`longrope`) are therefore fixed at load, by the longest sequence to be served.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kagami_proto.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """What config.json says about one rotation."""

    rotary_dim: int
    """Dimensions of a head that are rotated, counted from the first; even"""
    theta: float
    max_positions: int
    """`max_position_embeddings`"""
    max_length: int
    """Longest sequence to be served"""
    kind: str = "default"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """The `rope_parameters` of config.json: what the kind needs beyond theta"""


class Rotation(NamedTuple):
    """The tables of one step, shared by all layers with the same rope."""

    cos: Tensor
    """`[num_tokens, 1, rotary_dim]`"""
    sin: Tensor
    """`[num_tokens, 1, rotary_dim]`, the first half negated"""


class RotaryEmbedding:
    """Frequencies of one rope on a device."""

    def __init__(self, spec: RopeSpec, device: torch.device) -> None:
        """Raises `UnsupportedModel` where the parameters make no frequencies."""
        frequencies, self.attention_factor = _frequencies(spec)
        self.frequencies = frequencies.to(device)
        """`[rotary_dim / 2]` float32"""

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """The tables for `positions`, `[num_tokens]`: float32 until the last step."""
        angles = positions[:, None].float() * self.frequencies
        cos = (angles.cos() * self.attention_factor).to(dtype)
        sin = (angles.sin() * self.attention_factor).to(dtype)
        return Rotation(
            torch.cat((cos, cos), dim=-1)[:, None],
            torch.cat((-sin, sin), dim=-1)[:, None],
        )


def _frequencies(spec: RopeSpec) -> tuple[Tensor, float]:
    """Of `spec`, and the factor on cosine and sine; all of them numbers."""
    try:
        frequencies, factor = KINDS[spec.kind](spec)
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        line = str(error).partition("\n")[0]
        raise _unsupported(spec, f"{type(error).__name__}: {line}") from error
    if frequencies.shape != (spec.rotary_dim // 2,):
        raise _unsupported(
            spec, f"{list(frequencies.shape)} frequencies for {spec.rotary_dim} dimensions"
        )
    if not (frequencies.isfinite().all() and math.isfinite(factor)):
        raise _unsupported(spec, "its frequencies are not finite")
    return frequencies, factor


def _unsupported(spec: RopeSpec, why: str) -> UnsupportedModel:
    return UnsupportedModel(f"config.json: rope_parameters of rope_type {spec.kind!r}: {why}")


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Rotate `[num_tokens, num_heads, head_dim]`; dimension i pairs with i + rotary_dim / 2."""
    rotary_dim = rotation.cos.shape[-1]
    part = heads[..., :rotary_dim]
    first, second = part.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    rotated = torch.addcmul(part * rotation.cos, swapped, rotation.sin)
    if rotary_dim == heads.shape[-1]:
        return rotated
    return torch.cat((rotated, heads[..., rotary_dim:]), dim=-1)


def _exponents(spec: RopeSpec) -> Tensor:
    return torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32) / spec.rotary_dim


def _default(spec: RopeSpec) -> tuple[Tensor, float]:
    return 1.0 / spec.theta ** _exponents(spec), 1.0


def _linear(spec: RopeSpec) -> tuple[Tensor, float]:
    """Position interpolation (arXiv:2306.15595)."""
    return _default(spec)[0] / float(spec.parameters["factor"]), 1.0


def _dynamic(spec: RopeSpec) -> tuple[Tensor, float]:
    """NTK-aware: a larger base the longer the sequences (arXiv:2309.00071, section 3.1)."""
    factor = float(spec.parameters["factor"])
    ratio = max(spec.max_length, spec.max_positions) / spec.max_positions
    stretch = (factor * ratio - (factor - 1)) ** (spec.rotary_dim / (spec.rotary_dim - 2))
    return 1.0 / (spec.theta * stretch) ** _exponents(spec), 1.0


def _llama3(spec: RopeSpec) -> tuple[Tensor, float]:
    """Long wavelengths interpolated, short ones unchanged, a ramp between (Llama 3.1's release)."""
    parameters = spec.parameters
    factor = parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    original = parameters.get("original_max_position_embeddings") or spec.max_positions
    frequencies, _ = _default(spec)
    wavelengths = 2 * math.pi / frequencies
    unchanged = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - unchanged) * frequencies / factor + unchanged * frequencies, 1.0


def _yarn(spec: RopeSpec) -> tuple[Tensor, float]:
    """Interpolation by wavelength, with a temperature (YaRN, arXiv:2309.00071, 3.2-3.4)."""
    parameters = spec.parameters
    original = parameters.get("original_max_position_embeddings") or spec.max_positions
    factor = parameters.get("factor") or spec.max_positions / original

    def dimension(rotations: float) -> float:
        turns = original / (rotations * 2 * math.pi)
        return spec.rotary_dim * math.log(turns) / (2 * math.log(spec.theta))

    low = dimension(parameters.get("beta_fast") or 32)
    high = dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    if low == high:
        high += 0.001
    steps = torch.arange(spec.rotary_dim // 2, dtype=torch.float32)
    interpolated = ((steps - low) / (high - low)).clamp(0, 1)
    frequencies, _ = _default(spec)
    blended = frequencies / factor * interpolated + frequencies * (1 - interpolated)
    return blended, _yarn_attention_factor(parameters, factor)


def _yarn_attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    def temperature(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    if (given := parameters.get("attention_factor")) is not None:
        return float(given)
    mscale, of_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and of_all:
        return temperature(mscale) / temperature(of_all)
    return temperature(1.0)


def _longrope(spec: RopeSpec) -> tuple[Tensor, float]:
    """A searched factor for each frequency (LongRoPE, arXiv:2402.13753): short or long set."""
    parameters = spec.parameters
    original = parameters.get("original_max_position_embeddings") or spec.max_positions
    name = "long_factor" if spec.max_length > original else "short_factor"
    factors = torch.tensor(parameters[name], dtype=torch.float32)
    if factors.shape != (spec.rotary_dim // 2,):
        raise ValueError(f"{name} has {list(factors.shape)} values")
    frequencies = 1.0 / (factors * spec.theta ** _exponents(spec))
    if (given := parameters.get("attention_factor")) is not None:
        return frequencies, float(given)
    factor = parameters.get("factor") or spec.max_positions / original
    if factor <= 1.0:
        return frequencies, 1.0
    return frequencies, math.sqrt(1 + math.log(factor) / math.log(original))


# By `rope_type` in config.json.
KINDS: Mapping[str, Callable[[RopeSpec], tuple[Tensor, float]]] = MappingProxyType(
    {
        "default": _default,
        "linear": _linear,
        "dynamic": _dynamic,
        "llama3": _llama3,
        "yarn": _yarn,
        "longrope": _longrope,
    }
)
