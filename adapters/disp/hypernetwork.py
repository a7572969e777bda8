"""The network whose output says which channels to keep.

A GRU over fixed random inputs, one for each structure, so that structures share what they learn.
Source: DISP-LLM's published code, `pruning/hypernetwork.py`.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.disp.budget import kept_share
from adapters.disp.estimators import TEMPERATURE
from adapters.disp.search_config import Residual
from models.pruning import MODULES, widths_of
from models.spec import DecoderSpec

Value = TypeVar("Value")
_INPUT, _HIDDEN = 32, 64
_JUST_ABOVE = torch.finfo(torch.float32).tiny
_LEAST = 1e-20
_OUTLIERS = (-2.0, 3.0)
_HEAD_START = 1.2
_OFFSET = 3.0  # every channel starts as kept: sigmoid(3.0 / 0.4) is 0.9994


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
        """Return (N,) masks of what is kept without chance: logits above 0, and the highest."""
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


def head_start(importance: Tensor, costs: Tensor) -> Tensor:
    """Turn how much channels matter into a head start of their logits.

    Channels of all structures are compared with each other, so that it also says how much to take
    of which layer and module.

    Args:
        importance: (N,) at least 0, of all structures' channels.
        costs: (N,) above 0, parameters that each takes.

    Returns:
        (N,) float32: by how many standard deviations the log of a channel's importance for its cost
        is off the mean, some outliers cut, times 1.2.
    """
    scores = importance.clamp_min(_LEAST).log() - costs.log()
    scores = (scores - scores.mean()) / scores.std().clamp_min(_LEAST)
    return scores.clamp(*_OUTLIERS) * _HEAD_START


class Hypernetwork(nn.Module):
    """GRU, norm, GELU and a linear for each structure.

    Its buffers are kept with its parameters: `inputs` (fixed, standard normal), `offset` (added to
    each structure's output; at first 3.0, so that every channel is kept), and `head_start` (added
    to each channel's, see `head_start`). The linears begin as zeros, so that at first the head
    start alone tells channels apart.

    Args:
        widths: channels of each structure.
        seed: of inputs and initial parameters.
    """

    inputs: Tensor
    offset: Tensor
    head_start: Tensor

    def __init__(self, widths: Sequence[int], *, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.register_buffer("inputs", torch.randn(len(widths), 1, _INPUT))
            self.register_buffer("offset", torch.full((len(widths),), _OFFSET))
            self.gru = nn.GRU(_INPUT, _HIDDEN, bidirectional=True)
            self.norm = nn.LayerNorm(2 * _HIDDEN)
            heads = [nn.Linear(2 * _HIDDEN, width, bias=False) for width in widths]
        for head in heads:
            nn.init.zeros_(head.weight)
        self.heads = nn.ModuleList(heads)
        self.register_buffer("head_start", torch.zeros(sum(widths)))

    def forward(self) -> Tensor:
        """Return the (N,) float32 logits of all structures' channels, one after the other."""
        states = F.gelu(self.norm(self.gru(self.inputs)[0][:, 0]))
        parts = zip(self.heads, states, self.offset, strict=True)
        theta = torch.cat([head(state) + offset for head, state, offset in parts])
        return (theta + self.head_start) / TEMPERATURE

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters and buffers by name."""
        yield from self.named_parameters()
        yield from self.named_buffers()
