"""A quantisation method of vLLM whose linears compute with our weights.

vLLM's models ask it for every linear of a layer; `loader` gives each its matrices.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from serve.backends.vllm.packed_linear import PackedLinear

NAME = "proa"

# Last part of a linear's name in vLLM's models: the canonical names of what it is made of.
_PARTS: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q", "k", "v"), "q_proj": ("q",), "k_proj": ("k",), "v_proj": ("v",),
    "o_proj": ("o",), "out_proj": ("o",), "dense": ("o",),
    "gate_up_proj": ("gate", "up"), "gate_proj": ("gate",), "up_proj": ("up",), "fc1": ("up",),
    "down_proj": ("down",), "fc2": ("down",),
}  # fmt: skip
_LAYER = re.compile(r"layers\.(\d+)\.(?:.*\.)?([a-z0-9_]+)")


def parts_of(name: str) -> tuple[int, tuple[str, ...]]:
    """Return the layer of a linear, and the canonical names of what it is made of.

    Args:
        name: of the module, such as "model.layers.3.self_attn.qkv_proj".

    Raises:
        ValueError: it is no linear of a decoder that is known.
    """
    match = _LAYER.search(name)
    if match is None or match[2] not in _PARTS:
        raise ValueError(f"{name} is no linear of a decoder that Proa knows")
    return int(match[1]), _PARTS[match[2]]


class ProaQuantizationConfig(QuantizationConfig):
    """Gives the layers' linears `ProaLinearMethod`; embedding and LM head stay vLLM's."""

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ProaQuantizationConfig":
        return cls()

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take a checkpoint that says it is bitsandbytes': we read its codes ourselves."""
        return NAME if user_quant == NAME else None

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        return ProaLinearMethod() if isinstance(layer, LinearBase) else None


class ProaLinearMethod(LinearMethodBase):
    """Computes with the `PackedLinear` that the loader has given the layer as `packed`."""

    def create_weights(self, layer: nn.Module, *args: Any, **attributes: Any) -> None:
        """Make nothing: the loader knows widths and formats."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return (..., outputs) of (..., inputs); the packed linear has the bias."""
        packed = layer.packed
        assert isinstance(packed, PackedLinear)
        out: Tensor = packed(x)
        return out
