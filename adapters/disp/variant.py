"""Pruned variants as adapter folders: which channels each layer keeps, and nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.disp.config import DispConfig, from_fields, removed_shares
from adapters.disp.search_config import Residual
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
from models.checkpoints.derived import Derivation
from models.checkpoints.pruned import prune
from models.pruning import (
    MODULES,
    LayerSelection,
    Selections,
    check_selections,
    find_problems,
    widths_of,
)
from models.spec import DecoderSpec, SpecError

METHOD = "disp"
_RESIDUAL_MODULES = ("attn_in", "attn_out", "mlp_in", "mlp_out")


@dataclass(frozen=True, kw_only=True, slots=True)
class DispVariant:
    """A pruned variant read from an adapter folder.

    Attributes:
        config: what the folder says about itself.
        disp: its method's part.
        selections: channels that each layer of the base keeps.
        digest: SHA-256 of the folder's files; the variant's identity.
    """

    config: AdapterConfig
    disp: DispConfig
    selections: Selections
    digest: str


def load_disp(
    folder: Path,
    spec: DecoderSpec,
    *,
    fingerprint: str,
    quantization: str,
    model_id: str,
    chain: Sequence[str] = (),
) -> DispVariant:
    """Read a pruned variant of a base, or of another variant that is not pruned.

    Args:
        folder: the adapter.
        spec: of the base, not pruned.
        fingerprint: of the base, `Checkpoint.fingerprint`.
        quantization: of the base. "none" fits a variant that was made for the quantised base, if
            the dense weights are the ones that were searched on.
        model_id: of the base, for messages.
        chain: digests of what is attached to the base already.

    Raises:
        AdapterError: the folder cannot be read, is not for this base, or has fields or index lists
            that are missing, unknown, wrong or contradict each other; every one is named.
    """
    stored = read_adapter(folder)
    if stored.config.method != METHOD:
        raise AdapterError(f"{folder}: method must be {METHOD!r}, got {stored.config.method!r}")
    host = Host(
        spec=spec, fingerprint=fingerprint, quantization=quantization, model_id=model_id,
        chain=tuple(chain),
    )  # fmt: skip
    try:
        return _build(stored, host)
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from None


def derive_disp(stored: StoredAdapter, host: Host) -> Derivation:
    """Hold a pruned variant against what it is made of, and say how its weights follow from it.

    Raises:
        AdapterError: as `load_disp`.
    """
    variant = _build(stored, host)
    try:
        return prune(host.spec, variant.selections, digest=variant.digest)
    except SpecError as error:
        raise AdapterError(str(error)) from error


def describe_disp(stored: StoredAdapter) -> list[tuple[str, str]]:
    """Return rows of name and value that say what a pruned variant is.

    Raises:
        AdapterError: a field is unknown, missing or has a value it may not have.
    """
    disp = from_fields(stored.config.fields)
    rows = [
        ("removed of linears", f"{disp.remove_linears:.1%}"),
        ("removed of model", f"{disp.remove_total:.1%}"),
        ("residual channels", disp.residual),
        ("widths", f"of {len(disp.widths)} layers, multiples of {disp.align}"),
    ]
    for module, widths in zip(MODULES, zip(*disp.widths, strict=True), strict=True):
        mean = sum(widths) / len(widths)
        rows.append((f"widths: {module}", f"{mean:.1f} ({min(widths)} to {max(widths)})"))
    return rows


def _build(stored: StoredAdapter, host: Host) -> DispVariant:
    config, about = from_fields(stored.config.fields), stored.config
    if host.quantization == "none" and config.dense_fingerprint:
        about = replace(about, base_fingerprint=config.dense_fingerprint, base_quantization="none")
    found: list[Selections] = []
    if problems := collect_problems(
        lambda: check_base(about, host),
        lambda: found.append(_read_selections(config, host.spec, stored.tensors)),
    ):
        raise AdapterError("; ".join(problems))
    return DispVariant(config=stored.config, disp=config, selections=found[0], digest=stored.digest)


def save_disp(
    folder: Path,
    selections: Selections,
    spec: DecoderSpec,
    *,
    base_id: str,
    base_fingerprint: str,
    base_quantization: str,
    dense_fingerprint: str,
    align: int,
    residual: Residual,
    description: str = "",
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a variant as an adapter; one that was there is replaced as a whole or not at all.

    Args:
        folder: made if missing; its other files are left alone.
        selections: channels that each layer keeps.
        spec: of the base, not pruned.
        base_id, base_fingerprint, base_quantization, description, training: see `AdapterConfig`;
            of the base as it is served.
        dense_fingerprint, align, residual: see `DispConfig`.

    Raises:
        AdapterError: the selections do not fit the base or what is said of them, or the folder
            cannot be written.
    """
    try:
        check_selections(spec, selections)
    except SpecError as error:
        raise AdapterError(str(error)) from error
    widths = tuple(selection.widths for selection in selections)
    remove_linears, remove_total = removed_shares(spec, widths)
    config = DispConfig(
        widths=widths, remove_linears=remove_linears, remove_total=remove_total, align=align,
        residual=residual, dense_fingerprint=dense_fingerprint,
    )  # fmt: skip
    tensors = {
        f"layers.{i}.{module}": torch.tensor(getattr(selection, module), dtype=torch.int32)
        for i, selection in enumerate(selections)
        for module in MODULES
    }
    _read_selections(config, spec, tensors)
    about = AdapterConfig(
        method=METHOD, base_id=base_id, base_fingerprint=base_fingerprint,
        base_quantization=base_quantization, description=description, fields=config.to_fields(),
        training=dict(training or {}),
    )  # fmt: skip
    write_adapter(folder, about, tensors)


def _read_selections(
    config: DispConfig, spec: DecoderSpec, tensors: Mapping[str, Tensor]
) -> Selections:
    """Hold a variant's tensors against its config and its base; return them as selections.

    Raises:
        AdapterError: names everything that is wrong.
    """
    problems = list(config.find_contradictions(spec))
    unknown, lists = set(tensors), []
    for i, full in enumerate(widths_of(spec)):
        kept = {}
        given = config.widths[i] if i < len(config.widths) else None
        for j, (module, width) in enumerate(zip(MODULES, full, strict=True)):
            name = f"layers.{i}.{module}"
            unknown.discard(name)
            found = _find_tensor_problems(tensors.get(name), width, given[j] if given else None)
            problems += [f"{name}: {problem}" for problem in found]
            if not found:
                kept[module] = tuple(tensors[name].tolist())
        lists.append(kept)
    problems += [f"{name}: not a tensor of this variant" for name in sorted(unknown)]
    if not problems and config.residual == "shared":
        sets = {kept[module] for kept in lists for module in _RESIDUAL_MODULES}
        if len(sets) > 1:
            problems.append(
                f"residual is 'shared', but {', '.join(_RESIDUAL_MODULES)} are not the same lists "
                "in all layers"
            )
    if problems:
        raise AdapterError("the variant does not fit the base: " + "; ".join(problems))
    return tuple(LayerSelection(**kept) for kept in lists)


def _find_tensor_problems(tensor: Tensor | None, width: int, given: int | None) -> list[str]:
    """Name what is wrong with an index list; `given` is its length as the config has it."""
    if tensor is None:
        return ["missing"]
    if tensor.dtype != torch.int32:
        return [f"must be torch.int32, got {tensor.dtype}"]
    shape = tuple(tensor.shape)
    problems = []
    if given is not None and shape != (given,):
        problems.append(f"shape {shape}, expected ({given},) as widths say")
    if len(shape) != 1:
        return problems or [f"shape {shape}, expected a list"]
    if shape[0] > width:
        return problems or [f"shape {shape}, expected at most ({width},)"]
    return problems + list(find_problems(tensor.tolist(), width))
