"""Side networks as adapter folders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.format import (
    AdapterConfig,
    AdapterError,
    Host,
    StoredAdapter,
    check_base,
    collect_problems,
    read_adapter,
    write_adapter,
)
from adapters.qst.config import QstConfig, from_fields
from adapters.qst.network import FLOAT32_TENSORS, QstNetwork, assemble_network, qst_tensors
from models.fork import ForkNetwork
from models.side import SideNetwork
from models.spec import DecoderSpec

METHOD = "qst"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True, slots=True)
class QstAdapter:
    """A side network read from an adapter folder.

    Attributes:
        config: what the folder says about itself.
        qst: its method's part, resolved.
        network: float32, ready for `Decoder.attach`.
        classifier: (num_labels, D) float32 head of a sequence classifier, or None.
        digest: SHA-256 of the folder's files; the adapter's identity.
    """

    config: AdapterConfig
    qst: QstConfig
    network: SideNetwork | ForkNetwork
    classifier: Tensor | None
    digest: str


def load_qst(
    folder: Path,
    spec: DecoderSpec,
    *,
    fingerprint: str,
    model_id: str,
    chain: Sequence[str] = (),
) -> QstAdapter:
    """Read a side network for a base, or for a variant of one.

    Args:
        folder: the adapter.
        spec: of what it sits on.
        fingerprint: of the base, `Checkpoint.fingerprint`.
        model_id: of the base, for messages.
        chain: digests of what is attached to the base already.

    Raises:
        AdapterError: the folder cannot be read, is not for this base, or has tensors that are
            missing, unknown, misshapen or not finite; every one is named.
    """
    stored = read_adapter(folder)
    if stored.config.method != METHOD:
        raise AdapterError(f"{folder}: method must be {METHOD!r}, got {stored.config.method!r}")
    host = Host(
        spec=spec, fingerprint=fingerprint, quantization=stored.config.base_quantization,
        model_id=model_id, chain=tuple(chain),
    )  # fmt: skip
    try:
        return build_qst(stored, host)
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from None


def build_qst(stored: StoredAdapter, host: Host) -> QstAdapter:
    """Hold a side network against what it is to be attached to, and make it ready.

    Raises:
        AdapterError: it was not trained on this, or has tensors that are missing, unknown,
            misshapen or not finite; every one is named.
    """
    config, spec = from_fields(stored.config.fields), host.spec
    if problems := collect_problems(
        lambda: check_base(stored.config, host),
        lambda: check_qst_tensors(config.resolved(spec), spec, stored.tensors),
    ):
        raise AdapterError("; ".join(problems))
    config = config.resolved(spec)
    tensors = {name: tensor.float().contiguous() for name, tensor in stored.tensors.items()}
    return QstAdapter(
        config=stored.config,
        qst=config,
        network=assemble_network(config, spec, tensors),
        classifier=tensors.get("classifier.weight"),
        digest=stored.digest,
    )


def describe_qst(stored: StoredAdapter) -> list[tuple[str, str]]:
    """Return rows of name and value that say what a side network is.

    Raises:
        AdapterError: a field is unknown or has a value it may not have.
    """
    qst, tensors = from_fields(stored.config.fields), stored.tensors
    task = ("task", qst.task + (f", {qst.num_labels} labels" if qst.num_labels else ""))
    if qst.side_attention == "base":
        layers = f"the last {qst.side_layers}, differences of rank {qst.rank}"
        return [("forked layers", layers), ("keys and values", "the base's"), task]
    has_rank = qst.downsample in ("lora", "adapter")
    downsample = f"downsample {qst.downsample}" + (f" of rank {qst.rank}" if has_rank else "")
    rows = [
        ("reduction", f"{qst.reduction}, {downsample}"),
        task,
    ]
    if "alpha" in tensors and "gamma" in tensors:
        alpha = tensors["alpha"].float()
        if qst.final_gate != "raw":
            alpha = (alpha if qst.final_gate == "sigmoid" else -alpha).sigmoid()
        rows.append(("share of base", _describe_range(alpha)))
        rows.append(("mix gates", _describe_range(tensors["gamma"].float().sigmoid())))
    return rows


def _describe_range(values: Tensor) -> str:
    mean = f"{values.mean():.4f}"
    return mean if values.numel() == 1 else f"{mean} ({values.min():.4f} to {values.max():.4f})"


def save_qst(
    folder: Path,
    network: QstNetwork,
    *,
    base_id: str,
    base_fingerprint: str,
    base_quantization: str,
    chain: Sequence[str] = (),
    description: str = "",
    training: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a side network as an adapter; one that was there is replaced as a whole or not at all.

    Args:
        folder: made if missing; its other files are left alone.
        network: what to write.
        base_id, base_fingerprint, base_quantization, chain, description, training: see
            `AdapterConfig`.
        dtype: of the matrices; alpha and gamma stay float32.

    Raises:
        AdapterError: a number is not finite in that dtype, or the folder cannot be written.
    """
    write_qst_tensors(
        folder, network.config, network.base, dict(network.named_parameters()), base_id=base_id,
        base_fingerprint=base_fingerprint, base_quantization=base_quantization, chain=chain,
        description=description, training=training, dtype=dtype,
    )  # fmt: skip


def write_qst_tensors(
    folder: Path,
    config: QstConfig,
    spec: DecoderSpec,
    tensors: Mapping[str, Tensor],
    *,
    base_id: str,
    base_fingerprint: str,
    base_quantization: str,
    chain: Sequence[str] = (),
    description: str = "",
    training: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write an adapter of tensors by name; see `save_qst`."""
    stored = {
        name: tensor.detach().to(torch.float32 if name in FLOAT32_TENSORS else dtype)
        for name, tensor in tensors.items()
    }
    config = config.resolved(spec)
    check_qst_tensors(config, spec, stored)
    about = AdapterConfig(
        method=METHOD, base_id=base_id, base_fingerprint=base_fingerprint,
        base_quantization=base_quantization, chain=tuple(chain), description=description,
        fields=config.to_fields(), training=dict(training or {}),
    )  # fmt: skip
    write_adapter(folder, about, stored)


def check_qst_tensors(config: QstConfig, spec: DecoderSpec, tensors: Mapping[str, Tensor]) -> None:
    """Hold an adapter's tensors against its config.

    Raises:
        AdapterError: names every tensor that is missing, unknown, misshapen or not finite.
    """
    problems, unknown = [], set(tensors)
    for name, shape in qst_tensors(config, spec):
        unknown.discard(name)
        if name not in tensors:
            problems.append(f"{name}: missing")
            continue
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            problems.append(f"{name}: shape {tuple(tensor.shape)}, expected {shape}")
        elif tensor.dtype not in _FLOATS:
            problems.append(f"{name}: {tensor.dtype}, expected 16- or 32-bit floats")
        elif not tensor.isfinite().all():
            problems.append(f"{name}: holds values that are not finite")
    problems += [f"{name}: not a tensor of this side network" for name in sorted(unknown)]
    if problems:
        raise AdapterError("tensors do not fit the side network: " + "; ".join(problems))
