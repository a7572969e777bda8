"""A model loader of vLLM that takes weights from our checkpoints, variants of them included."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from adapters.methods import host_of
from models.checkpoints import Checkpoint
from models.decoder import resolve_kernels
from models.families import ModelDescription, describe_model
from models.spec import linear_shapes
from models.weights import Weight, dense
from serve.backends.vllm.linears import ProaLinearMethod, parts_of
from serve.backends.vllm.packed_linear import (
    MakeMultiply,
    PackedLinear,
    Share,
    make_cuda_multiply,
    make_dense_multiply,
    shard,
)
from serve.backends.vllm.settings import Settings, cores_of, read_settings

NAME = "proa"


class ProaLoader(BaseModelLoader):
    """Loads what the engine's settings name."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Do nothing: whoever started the engine has the model."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Give every linear of the layers its matrices, and vLLM's own modules the rest."""
        settings = read_settings(get_current_vllm_config().additional_config)
        if settings is None:
            raise ValueError(
                f"load_format {NAME!r} needs additional_config.proa, which names the model"
            )
        checkpoint = settings.load()
        description = describe_checkpoint(checkpoint)
        device = next(model.parameters()).device
        share = Share(
            rank=get_tensor_model_parallel_rank(), size=get_tensor_model_parallel_world_size()
        )
        make_multiply = choose_multiply(settings, model_config.dtype, device)
        pack = partial(
            pack_linear, checkpoint, share=share, make_multiply=make_multiply,
            dtype=model_config.dtype, device=device,
        )  # fmt: skip
        for name, module in model.named_modules():
            method = getattr(module, "quant_method", None)
            if isinstance(module, LinearBase) and isinstance(method, ProaLinearMethod):
                module.packed = pack(name)
                module.bias = None
        whole: Any = model
        whole.load_weights(other_weights(checkpoint, description))
        whole.sides.host = host_of(checkpoint)


def describe_checkpoint(checkpoint: Checkpoint) -> ModelDescription:
    """Return what a checkpoint's config.json says, such as the names of its tensors."""
    config: Any = json.loads(Path(checkpoint.folder, "config.json").read_text(encoding="utf-8"))
    return describe_model(config)


def choose_multiply(settings: Settings, dtype: torch.dtype, device: torch.device) -> MakeMultiply:
    """Return what computes products on a device, as the settings' kernels say."""
    if device.type == "cuda":
        if settings.kernels == "reference":
            return make_dense_multiply(dtype, device)
        return make_cuda_multiply(dtype, device)
    kernels = resolve_kernels(settings.model_options.kernels, "cpu")  # type: ignore[arg-type]
    if kernels == "reference":
        return make_dense_multiply(dtype, device)
    from serve.backends.vllm.native_linear import make_native_multiply

    return make_native_multiply(kernels, cores_of(settings, get_tensor_model_parallel_rank()))


def pack_linear(
    checkpoint: Checkpoint,
    name: str,
    *,
    share: Share,
    make_multiply: MakeMultiply,
    dtype: torch.dtype,
    device: torch.device,
) -> PackedLinear:
    """Make the linear of a module of vLLM's.

    Args:
        checkpoint: has the weights.
        name: of the module.
        share: the rank's part.
        make_multiply: prepares matrices for computing.
        dtype, device: of its input and output.
    """
    index, parts = parts_of(name)
    spec, weights = checkpoint.spec, checkpoint.weights
    layer = spec.layers[index]
    is_attention = parts[0] in "qkvo"
    pieces: list[tuple[Weight, Tensor | None]] = []
    for part in parts:
        bias = weights.get(f"layers.{index}.{part}.bias")
        assert bias is None or isinstance(bias, Tensor)
        weight = weights[f"layers.{index}.{part}.weight"]
        pieces.append(shard(part, weight, bias, layer, share))
    kept_inputs = kept_outputs = None
    width = sum(linear_shapes(spec, layer)[part][0] for part in parts) // share.size
    if parts in (("o",), ("down",)):
        width = spec.hidden_size
        kept_outputs = layer.attn_out if is_attention else layer.mlp_out
    else:
        kept_inputs = layer.attn_in if is_attention else layer.mlp_in
    return PackedLinear(
        [weight for weight, _ in pieces], [bias for _, bias in pieces], make_multiply,
        kept_inputs=kept_inputs, kept_outputs=kept_outputs, width=width, dtype=dtype,
        device=device,
    )  # fmt: skip


def other_weights(
    checkpoint: Checkpoint, description: ModelDescription
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of the weights that are not the layers' linears', as files have them.

    A tied LM head is the embedding; it does not come again.
    """
    linears = {"q", "k", "v", "o", "gate", "up", "down"}
    for canonical, source in description.sources.items():
        if canonical.split(".")[-2] in linears or canonical not in checkpoint.weights:
            continue
        weight = checkpoint.weights[canonical]
        yield source.name, weight if isinstance(weight, Tensor) else dense(weight)
