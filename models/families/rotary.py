"""Rotary frequencies from the rope fields of a config, old spelling and new.

Source: transformers `modeling_rope_utils` (Apache-2.0), the published formulas of each scaling.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from models.families.config_reader import ConfigReader, positive_number
from models.families.errors import CheckpointError
from models.spec import RotarySpec

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def read_rope_parameters(config: ConfigReader) -> dict[str, object]:
    """Merge `rope_parameters` (transformers 5) or `rope_theta`, `rope_scaling` and partial factors.

    Args:
        config: the model's config; its defaults may hold `rope_theta` and `partial_rotary_factor`.

    Returns:
        At least `rope_type` and `rope_theta`.

    Raises:
        CheckpointError: the fields are of the wrong type or the scaling is not supported.
    """
    merged: dict[str, object] = {"rope_theta": config.get("rope_theta")}
    if config.get("partial_rotary_factor") is not None:
        merged["partial_rotary_factor"] = config.get("partial_rotary_factor")
    for name in ("rope_scaling", "rope_parameters"):
        value = config.values.get(name)
        if value is None:
            continue
        if not isinstance(value, Mapping) or any(isinstance(v, Mapping) for v in value.values()):
            raise CheckpointError(
                f"config.json: {name} must be one flat object for all layers, got {value!r}"
            )
        merged.update({key: item for key, item in value.items() if item is not None})
    kind = merged.pop("type", "default")
    merged.setdefault("rope_type", kind)
    if merged["rope_type"] not in ROPE_TYPES:
        raise CheckpointError(
            f"config.json: rope_type {merged['rope_type']!r} is not supported; "
            f"supported: {', '.join(ROPE_TYPES)}"
        )
    return merged


def build_rotary(config: ConfigReader, head_dim: int) -> RotarySpec:
    """Compute the inverse frequencies of a model.

    Args:
        config: the model's config.
        head_dim: width of one attention head.

    Raises:
        CheckpointError: a rope field is missing, of the wrong type or of an unsupported kind.
    """
    rope = read_rope_parameters(config)

    def number(name: str) -> float:
        return positive_number(rope.get(name), f"rope_parameters.{name}")

    partial = number("partial_rotary_factor") if "partial_rotary_factor" in rope else 1.0
    dim = int(head_dim * partial)
    if dim % 2 or not 0 < dim <= head_dim:
        raise CheckpointError(
            f"config.json: partial_rotary_factor {partial} of head_dim {head_dim} gives {dim} "
            f"rotated channels; it must be an even number from 2 to {head_dim}"
        )
    periods = number("rope_theta") ** (torch.arange(0, dim, 2).float() / dim)
    inv_freq = 1.0 / periods
    scale = 1.0
    if rope["rope_type"] == "linear":
        inv_freq = inv_freq / number("factor")
    elif rope["rope_type"] == "llama3":
        inv_freq = llama3_frequencies(
            inv_freq,
            factor=number("factor"),
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
            original_length=number("original_max_position_embeddings"),
        )
    elif rope["rope_type"] == "yarn":
        inv_freq, scale = _yarn_frequencies(config, rope, periods)
    return RotarySpec(dim=dim, inv_freq=tuple(inv_freq.tolist()), attention_scale=scale)


def llama3_frequencies(
    inv_freq: Tensor,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_length: float,
) -> Tensor:
    """Slow the long wavelengths down, as Llama 3.1 does.

    Args:
        inv_freq: (dim / 2,) float32 unscaled frequencies, radians per position.
        factor: how much the longest wavelengths are stretched.
        low_freq_factor: wavelengths over original_length / this are stretched in full.
        high_freq_factor: wavelengths under original_length / this are left alone.
        original_length: context of the pre-training, tokens.

    Returns:
        (dim / 2,) float32.
    """
    wavelength = 2 * math.pi / inv_freq
    blend = (original_length / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    smoothed = (1 - blend) * inv_freq / factor + blend * inv_freq
    is_long = wavelength > original_length / low_freq_factor
    is_short = wavelength < original_length / high_freq_factor
    scaled = torch.where(is_long, inv_freq / factor, smoothed)
    return torch.where(is_short, inv_freq, scaled)


def _yarn_frequencies(
    config: ConfigReader, rope: Mapping[str, object], periods: Tensor
) -> tuple[Tensor, float]:
    def number(name: str, default: float) -> float:
        value = rope.get(name)
        return positive_number(value or default, f"rope_parameters.{name}")

    max_length = config.integer("max_position_embeddings")
    original_length = number("original_max_position_embeddings", max_length)
    factor = number("factor", max_length / original_length)
    base = number("rope_theta", 0.0)
    dim = 2 * len(periods)

    def correction(rotations: float) -> float:
        turns = math.log(original_length / (rotations * 2 * math.pi))
        return dim * turns / (2 * math.log(base))

    low, high = correction(number("beta_fast", 32)), correction(number("beta_slow", 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low or 0.001
    ramp = ((torch.arange(dim // 2).float() - low) / span).clamp(0, 1)
    inv_freq = ramp / (factor * periods) + (1 - ramp) / periods

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    scale = temperature(1.0)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        scale = temperature(number("mscale", 1)) / temperature(number("mscale_all_dim", 1))
    return inv_freq, number("attention_factor", scale)
