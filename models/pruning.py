"""Keep a part of each layer's channels: five selections, and what they make of spec and weights.

The residual stream keeps its width. Each block reads some of its channels, after a norm over all of
them, and adds into some; the middle of the MLP loses channels for good. Heads stay, so the KV cache
keeps its shape. Source: DISP-LLM, arXiv 2410.11988; S1 .. S5 there are `MODULES` in order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from operator import add
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from models.spec import DecoderSpec, SpecError, canonical_weights
from models.weights import BLOCK_FORMATS, QuantizedBlocks

MODULES = ("attn_in", "attn_out", "mlp_in", "mlp_mid", "mlp_out")
_ROWS_AND_COLUMNS: dict[str, tuple[str | None, str | None]] = {
    "q": (None, "attn_in"),
    "k": (None, "attn_in"),
    "v": (None, "attn_in"),
    "o": ("attn_out", None),
    "gate": ("mlp_mid", "mlp_in"),
    "up": ("mlp_mid", "mlp_in"),
    "down": ("mlp_out", "mlp_mid"),
}
Number = TypeVar("Number", int, float, Tensor)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSelection:
    """Channels that one layer keeps, each strictly increasing and not empty.

    Attributes:
        attn_in, mlp_in: of the normed residual stream, read by attention and MLP.
        attn_out, mlp_out: of the residual stream, added into by attention and MLP.
        mlp_mid: of the MLP's middle.
    """

    attn_in: tuple[int, ...]
    attn_out: tuple[int, ...]
    mlp_in: tuple[int, ...]
    mlp_mid: tuple[int, ...]
    mlp_out: tuple[int, ...]

    @property
    def widths(self) -> tuple[int, int, int, int, int]:
        """How many channels are kept, in the order of `MODULES`."""
        attn_in, attn_out = len(self.attn_in), len(self.attn_out)
        return attn_in, attn_out, len(self.mlp_in), len(self.mlp_mid), len(self.mlp_out)


Selections: TypeAlias = tuple[LayerSelection, ...]


def widths_of(spec: DecoderSpec) -> tuple[tuple[int, int, int, int, int], ...]:
    """Return the five widths of each layer, in the order of `MODULES`.

    Those of a decoder that is not pruned are (D, D, D, intermediate_size, D).
    """

    def width(kept: tuple[int, ...] | None) -> int:
        return spec.hidden_size if kept is None else len(kept)

    return tuple(
        (
            width(layer.attn_in), width(layer.attn_out), width(layer.mlp_in),
            layer.intermediate_size, width(layer.mlp_out),
        )
        for layer in spec.layers
    )  # fmt: skip


def find_problems(kept: Sequence[int], width: int) -> Iterator[str]:
    """Yield what is wrong with one selection: the first index of each kind of mistake.

    Args:
        kept: channels.
        width: how many there are to choose from.
    """
    allowed = f"0 to {width - 1}"
    if not kept:
        yield f"must keep at least 1 channel of {allowed}, got none"
    outside = next((index for index in kept if not 0 <= index < width), None)
    if outside is not None:
        yield f"indices must be {allowed}, got {outside}"
    for i in range(1, len(kept)):
        if kept[i] <= kept[i - 1]:
            yield f"indices must be strictly increasing, got {kept[i]} after {kept[i - 1]}"
            break


def check_selections(spec: DecoderSpec, selections: Selections) -> None:
    """Hold selections against a decoder.

    Args:
        spec: not pruned yet.
        selections: one for each layer.

    Raises:
        SpecError: the decoder is pruned already, there are too few or too many layers, or a
            selection is empty, out of range or not strictly increasing; each one is named.
    """
    widths = widths_of(spec)
    problems = [
        f"layer {i} of the decoder is pruned already"
        for i, (d1, d2, d3, _, d5) in enumerate(widths)
        if {d1, d2, d3, d5} != {spec.hidden_size}
    ]
    if len(selections) != len(widths):
        problems.append(f"selections must be for {len(widths)} layers, got {len(selections)}")
    problems += [
        f"layer {i}, {module}: {problem}"
        for i, (selection, full) in enumerate(zip(selections, widths, strict=False))
        for module, width in zip(MODULES, full, strict=True)
        for problem in find_problems(getattr(selection, module), width)
    ]
    if problems:
        raise SpecError("selections do not fit the decoder: " + "; ".join(problems))


def prune_spec(spec: DecoderSpec, selections: Selections) -> DecoderSpec:
    """Describe the pruned decoder; a selection of the whole residual stream becomes None.

    Raises:
        SpecError: the selections do not fit; see `check_selections`.
    """
    check_selections(spec, selections)

    def part(kept: tuple[int, ...]) -> tuple[int, ...] | None:
        return None if len(kept) == spec.hidden_size else kept

    layers = tuple(
        replace(
            layer, attn_in=part(kept.attn_in), attn_out=part(kept.attn_out),
            mlp_in=part(kept.mlp_in), mlp_out=part(kept.mlp_out),
            intermediate_size=len(kept.mlp_mid),
        )
        for layer, kept in zip(spec.layers, selections, strict=True)
    )  # fmt: skip
    return replace(spec, layers=layers)


def kept_parts(
    name: str, spec: DecoderSpec, selections: Selections
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Return the rows and the columns that are kept of a weight; None: all.

    Args:
        name: canonical; see `models.spec.canonical_weights`.
        spec: of the decoder before pruning.
        selections: checked against `spec`.
    """
    parts = name.split(".")
    if parts[0] != "layers" or parts[2] not in _ROWS_AND_COLUMNS:
        return None, None
    layer = int(parts[1])
    full = dict(zip(MODULES, widths_of(spec)[layer], strict=True))

    def kept(module: str | None) -> tuple[int, ...] | None:
        indices = None if module is None else getattr(selections[layer], module)
        return None if indices is None or len(indices) == full[str(module)] else indices

    rows, columns = _ROWS_AND_COLUMNS[parts[2]]
    return kept(rows), None if parts[3] == "bias" else kept(columns)


def slice_weight(name: str, weight: Tensor, spec: DecoderSpec, selections: Selections) -> Tensor:
    """Take what is kept of a weight.

    Args:
        name: canonical; see `models.spec.canonical_weights`.
        weight: dense, of the decoder before pruning.
        spec: of that decoder.
        selections: checked against `spec`.

    Returns:
        A new tensor, or `weight` itself where all of it is kept.
    """
    for dim, kept in enumerate(kept_parts(name, spec, selections)):
        if kept is not None:
            weight = weight.index_select(dim, torch.tensor(kept, device=weight.device))
    return weight


def slice_blocks(
    name: str, weight: QuantizedBlocks, spec: DecoderSpec, selections: Selections
) -> QuantizedBlocks | None:
    """Take what is kept of a weight in its own codes: any rows, but whole blocks of a row.

    Args:
        name, spec, selections: as for `slice_weight`.
        weight: of the decoder before pruning.

    Returns:
        What `slice_weight` would give of the dense weight; None: blocks would have to be cut.
    """
    rows, columns = kept_parts(name, spec, selections)
    data = weight.data
    if columns is not None:
        values, size = BLOCK_FORMATS[weight.kind]
        if len(columns) % values:
            return None
        runs = torch.tensor(columns).view(-1, values)
        blocks = runs[:, 0] // values
        if not torch.equal(runs, blocks[:, None] * values + torch.arange(values)):
            return None
        data = data.view(len(data), -1, size)[:, blocks].flatten(1)
    return replace(weight, data=data if rows is None else data[torch.tensor(rows)])


def count_linears(spec: DecoderSpec, widths: Sequence[Sequence[Number]]) -> Number:
    """Count the parameters of the layers' linears, without biases.

    Args:
        spec: gives heads and kind of MLP; its own widths are not used.
        widths: the five widths of each layer, in the order of `MODULES`; tensors are
            differentiated through.

    Returns:
        The count, of the widths' kind.
    """
    counts = []
    for layer, (attn_in, attn_out, mlp_in, mlp_mid, mlp_out) in zip(
        spec.layers, widths, strict=True
    ):
        query = layer.num_attention_heads * layer.head_dim
        key_value = layer.num_key_value_heads * layer.head_dim
        attention = attn_in * (query + 2 * key_value) + attn_out * query
        counts.append(attention + (1 + spec.gated_mlp) * mlp_in * mlp_mid + mlp_mid * mlp_out)
    return reduce(add, counts)


def count_fixed(spec: DecoderSpec) -> int:
    """Count the parameters that pruning leaves: embeddings, norms, untied head; no biases."""
    return sum(
        prod(shape)
        for name, shape, _ in canonical_weights(spec)
        if name.endswith(".weight") and name.split(".")[-2] not in _ROWS_AND_COLUMNS
    )
