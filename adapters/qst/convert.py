"""Convert what the published QST code saved: a folder of `.pt` files.

Sizes are read from the tensors, since several versions of that code chose them differently. Source:
YouAreSpecialToMe/QST at 27cef0a, `modeling_llama_qst.py` and `modeling_opt_qst.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapters.format import AdapterError
from adapters.qst.adapter import check_qst_tensors, write_qst_tensors
from adapters.qst.config import QstConfig
from models.spec import DecoderSpec

_MAX_FILE_BYTES = 4 << 30
_PUBLISHED_THETA = 10000.0
_FILES = {
    "layers": ("qst_layers_parameters.pt",),
    "gamma": ("qst_z_parameters.pt",),
    "downsamples": ("qst_downsample_parameters.pt",),
    "final_norm": ("qst_norm_parameters.pt",),
    "up": ("qst_upsample_parameters.pt",),
    "alpha": (
        "lm_head_z_path.pt", "lm_head_z_parameters.pt", "score_z_path.pt", "score_z_parameters.pt",
    ),
}  # fmt: skip
_CLASSIFIER_FILE = "qst_score_parameters.pt"
_LLAMA_LAYER = {
    "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v",
    "self_attn.o_proj": "o", "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm",
}  # fmt: skip
_OPT_LAYER = {
    "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v",
    "self_attn.out_proj": "o", "fc1": "up", "fc2": "down",
    "self_attn_layer_norm": "attn_norm", "final_layer_norm": "mlp_norm",
}  # fmt: skip
_DOWNSAMPLE = {"adapter_A": "first", "adapter_B": "second", "post_layer_norm": "norm"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedAdapter:
    """A converted side network.

    Attributes:
        config: resolved; the switches that depart from the paper are set as in the published code.
        tensors: float32, as in `qst_tensors`.
    """

    config: QstConfig
    tensors: Mapping[str, Tensor]


def read_published(
    folder: Path,
    base: DecoderSpec,
    *,
    labels: tuple[str, ...] = (),
    rope_theta: float = _PUBLISHED_THETA,
) -> PublishedAdapter:
    """Read a checkpoint of the published code; no code in its files is run.

    Args:
        folder: holds the `.pt` files under the names that the code gave them.
        base: the base that it was trained on, Llama or OPT.
        labels: names of the classes of a sequence classifier.
        rope_theta: of the side layers; the published training script forces 10000.

    Raises:
        AdapterError: a file is missing, damaged or holds more than tensors, or the tensors do not
            fit the base; every one that does not is named.
    """
    is_opt = base.norm == "layer"
    if base.residual != "sequential" or base.qk_norm or base.gated_mlp == is_opt:
        raise AdapterError(f"the published code has Llama and OPT only, not {base.family}")
    parts = {part: _read_part(folder, names) for part, names in _FILES.items()}
    if (folder / _CLASSIFIER_FILE).is_file():
        parts["classifier"] = _load(folder / _CLASSIFIER_FILE)
    try:
        tensors = _rename(parts, _OPT_LAYER if is_opt else _LLAMA_LAYER)
        config = _read_config(tensors, base, rope_theta, labels)
        check_qst_tensors(config, base, tensors)
    except (KeyError, RuntimeError) as error:
        raise AdapterError(f"{folder}: a tensor is missing or misshapen ({error})") from error
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from None
    return PublishedAdapter(config=config, tensors=tensors)


def convert_published(
    source: Path,
    folder: Path,
    base: DecoderSpec,
    *,
    base_id: str,
    base_fingerprint: str,
    base_quantization: str,
    labels: tuple[str, ...] = (),
    description: str = "",
) -> None:
    """Write a checkpoint of the published code as an adapter.

    Args:
        source: see `read_published`.
        folder: the adapter.
        base: the base that it was trained on, Llama or OPT.
        base_id, base_fingerprint, base_quantization, description: see `AdapterConfig`. The files
            do not say which base they belong to: that is the caller's word.
        labels: names of the classes of a sequence classifier.

    Raises:
        AdapterError: see `read_published` and `save_qst`.
    """
    published = read_published(source, base, labels=labels)
    write_qst_tensors(
        folder, published.config, base, published.tensors, base_id=base_id,
        base_fingerprint=base_fingerprint, base_quantization=base_quantization,
        description=description, training={"source": "converted from the published QST code"},
    )  # fmt: skip


def _rename(
    parts: Mapping[str, Mapping[str, Tensor]], layer_names: Mapping[str, str]
) -> dict[str, Tensor]:
    """Give tensors our names; those that have none keep theirs, to be named as unknown."""
    gamma = parts["gamma"]
    tensors = {
        "alpha": parts["alpha"]["alpha"],
        "gamma": torch.stack([gamma[str(i)] for i in range(len(gamma))]),
    }
    for part in ("layers", "downsamples", "final_norm", "up", "classifier"):
        for name, tensor in parts.get(part, {}).items():
            number, _, local = name.partition(".")
            module, _, kind = local.rpartition(".")
            if part == "layers" and module in layer_names:
                name = f"{number}.{layer_names[module]}.{kind}"
            elif part == "downsamples" and module in _DOWNSAMPLE and number.isdecimal():
                name = f"{int(number) + 1}.{_DOWNSAMPLE[module]}.{kind}"
            elif name.endswith("rotary_emb.inv_freq"):
                continue
            tensors[f"{part}.{name}"] = tensor
    return tensors


def _read_config(
    tensors: Mapping[str, Tensor], base: DecoderSpec, rope_theta: float, labels: tuple[str, ...]
) -> QstConfig:
    def rows(name: str) -> int:
        return tensors[name].shape[0]

    width, heads = tensors["up.weight"].shape[1], base.layers[0].num_attention_heads
    dim = rows("layers.0.q.weight") // heads
    has_head = "classifier.weight" in tensors
    return QstConfig(
        reduction=max(1, base.hidden_size // width),
        rank=rows("downsamples.1.first.weight"),
        downsample="adapter",
        downsample_norm="downsamples.1.norm.weight" in tensors,
        tie_embedding_downsample=True,
        gate_shape="vector",
        final_gate="sigmoid" if base.norm == "rms" else "sigmoid_swapped",
        side_heads=heads,
        side_kv_heads=base.layers[0].num_key_value_heads,
        side_head_dim=dim,
        side_intermediate=rows("layers.0.up.weight"),
        has_linear_bias="layers.0.q.bias" in tensors,
        rotary_inv_freq=tuple(
            rope_theta ** (-i / dim) for i in range(0, dim, 2) if base.rotary is not None
        ),
        rotary_scale=1.0,
        task="sequence_classification" if has_head else "causal_lm",
        num_labels=rows("classifier.weight") if has_head else 0,
        labels=labels,
    ).resolved(base)


def _read_part(folder: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise AdapterError(f"{folder}: {' or '.join(names)} is missing")
    return _load(found[0])


def _load(path: Path) -> dict[str, Tensor]:
    """Return float32 tensors by name; the one tensor of a file without names is "alpha"."""
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise AdapterError(f"{path}: over {_MAX_FILE_BYTES} bytes, the most it may have")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler makes of a damaged file
        raise AdapterError(
            f"{path}: damaged, or holds more than tensors, which could run code: refused "
            f"({type(error).__name__}: {error})"
        ) from error
    if isinstance(content, Tensor):
        content = {"alpha": content}
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise AdapterError(f"{path}: must hold tensors by name, got {type(content).__name__}")
    return {name: value.detach().float() for name, value in content.items()}
