"""The sets of channels that a search chooses from, and how they serve the modules of layers."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from adapters.disp.budget import kept_share
from adapters.disp.search_config import Residual
from models.pruning import MODULES, widths_of
from models.spec import DecoderSpec

Value = TypeVar("Value")
_JUST_ABOVE = torch.finfo(torch.float32).tiny


class Structures:
    """The sets of channels that are chosen from: one for each mask.

    Args:
        spec: of the base, not pruned.
        residual: "independent": `MODULES` of each layer; "shared": the residual stream once, then
            the MLP's middle of each layer.
    """

    def __init__(self, spec: DecoderSpec, residual: Residual) -> None:
        full = widths_of(spec)
        is_shared = residual == "shared"
        middle = MODULES.index("mlp_mid")
        self.widths: tuple[int, ...] = (
            (spec.hidden_size, *(layer[middle] for layer in full))
            if is_shared
            else tuple(width for layer in full for width in layer)
        )
        # Which structure each module of each layer takes.
        self.places: tuple[tuple[int, ...], ...] = tuple(
            tuple((1 + i) * (j == middle) if is_shared else i * len(MODULES) + j for j in range(5))
            for i in range(len(full))
        )

    def arrange(self, values: Sequence[Value]) -> tuple[tuple[Value, ...], ...]:
        """Return for each layer, in the order of `MODULES`, its modules' structures' values."""
        return tuple(tuple(values[place] for place in layer) for layer in self.places)

    def split(self, values: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        """Return the (..., width) part of each module of each layer, of (..., N) values."""
        return self.arrange(values.split(self.widths, dim=-1))

    def count(self, masks: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        """Return how many channels each module of each layer keeps, (...) of (..., N) masks."""
        return self.arrange([part.sum(-1) for part in masks.split(self.widths, dim=-1)])

    def join(self, values: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return (N,) values of the channels: the sum of those of the modules that they serve.

        Args:
            values: (width,) for each layer, in the order of `MODULES`.
        """
        parts = [torch.zeros(width, device=values[0][0].device) for width in self.widths]
        for places, layer in zip(self.places, values, strict=True):
            for place, value in zip(places, layer, strict=True):
                parts[place] += value
        return torch.cat(parts)

    def costs(self, spec: DecoderSpec) -> Tensor:
        """Return (N,) what share of the linears' parameters one channel less of each saves."""
        counts = torch.tensor(self.widths, dtype=torch.float32, requires_grad=True)
        kept = kept_share(spec, self.arrange(counts.unbind()))
        return torch.autograd.grad(kept, counts)[0].repeat_interleave(torch.tensor(self.widths))

    def threshold(self, logits: Tensor) -> Tensor:
        """Return (N,) masks of logits above 0, and of the highest of each structure."""
        parts = logits.detach().split(self.widths)
        return torch.cat([part >= part.amax().clamp_max(_JUST_ABOVE) for part in parts]).float()

    def best(self, logits: Tensor, counts: Sequence[int]) -> Tensor:
        """Return (N,) masks of the `counts` highest logits of each structure."""
        masks = torch.zeros_like(logits)
        pairs = zip(masks.split(self.widths), ranking(logits, self.widths), counts, strict=True)
        for mask, order, count in pairs:
            mask[order[:count]] = 1.0
        return masks


def ranking(logits: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Return each structure's channels by falling logit, of equal ones the first."""
    parts = logits.detach().split(list(widths))
    return [part.argsort(descending=True, stable=True) for part in parts]
