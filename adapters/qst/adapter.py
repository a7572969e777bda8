"""Side networks as adapter folders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.format import AdapterConfig, AdapterError, check_base, read_adapter, write_adapter
from adapters.qst.config import QstConfig, from_fields
from adapters.qst.network import FLOAT32_TENSORS, QstNetwork, assemble_network, qst_tensors
from models.side import SideNetwork
from models.spec import DecoderSpec

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True, slots=True)
class QstAdapter:
    """A side network read from an adapter folder.

    Attributes:
        config: what the folder says about itself.
        qst: its method's part, resolved.
        network: float32, ready for `Decoder.attach`.
        classifier: (num_labels, D) float32 head of a sequence classifier, or None.
        num_parameters: numbers in the file.
        digest: SHA-256 of the folder's files; the adapter's identity.
    """

    config: AdapterConfig
    qst: QstConfig
    network: SideNetwork
    classifier: Tensor | None
    num_parameters: int
    digest: str

    @property
    def description(self) -> str:
        """One line for people."""
        return self.config.description


def load_qst(
    folder: Path,
    spec: DecoderSpec,
    *,
    fingerprint: str,
    model_id: str,
    chain: Sequence[str] = (),
) -> QstAdapter:
    """Read a side network for a base.

    Args:
        folder: the adapter.
        spec: of the base.
        fingerprint: of the base, `Checkpoint.fingerprint`.
        model_id: of the base, for messages.
        chain: digests of what is attached to the base already.

    Raises:
        AdapterError: the folder cannot be read, is not for this base, or has tensors that are
            missing, unknown, misshapen or not finite; every one is named.
    """
    stored = read_adapter(folder)
    if stored.config.method != "qst":
        raise AdapterError(f"{folder}: method must be 'qst', got {stored.config.method!r}")
    try:
        check_base(stored.config, fingerprint=fingerprint, model_id=model_id, chain=chain)
        config = from_fields(stored.config.fields).resolved(spec)
        check_qst_tensors(config, spec, stored.tensors)
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from None
    tensors = {name: tensor.float().contiguous() for name, tensor in stored.tensors.items()}
    return QstAdapter(
        config=stored.config,
        qst=config,
        network=assemble_network(config, spec, tensors),
        classifier=tensors.get("classifier.weight"),
        num_parameters=sum(tensor.numel() for tensor in tensors.values()),
        digest=stored.digest,
    )


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
        method="qst", base_id=base_id, base_fingerprint=base_fingerprint,
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
