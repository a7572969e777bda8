"""Make logits into channels to keep: as many as wanted, in widths that kernels like."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapters.disp.budget import linears_total
from adapters.disp.structures import Structures, ranking
from models.pruning import MODULES, LayerSelection, Selections, count_linears
from models.spec import DecoderSpec

TOLERANCE = 0.005  # of the kept parameters
_HALVINGS = 60


def aligned_widths(
    logits: Tensor, spec: DecoderSpec, structures: Structures, *, keep: float, align: int
) -> tuple[int, ...]:
    """Choose how many channels each structure keeps.

    One threshold for all logits gives the widths, which go to the nearest multiple of `align`.
    Then, one multiple at a time, the channels at the boundaries that are nearest to the threshold
    are added or removed until nothing brings the parameters nearer to the target.

    Args:
        logits: (N,) of all structures' channels; above 0 where the search keeps a channel.
        spec: not pruned.
        structures: whose channels they are.
        keep: share of the linears' parameters to keep, in 0 .. 1; met within 0.5 % unless
            the model is so small that one multiple of `align` is more than that.
        align: widths are multiples of it, or full.
    """
    parts = logits.detach().double().cpu().split(structures.widths)
    ranked = [part.sort(descending=True).values for part in parts]
    search = _Widths(spec, structures, ranked, keep * linears_total(spec), align)
    search.start()
    search.approach()
    search.refine()
    return tuple(search.counts)


def choose_channels(logits: Tensor, structures: Structures, counts: Sequence[int]) -> Selections:
    """Choose so many of each structure's channels, those with the highest logits.

    Returns:
        The same for the same arguments.
    """
    pairs = zip(ranking(logits.cpu(), structures.widths), counts, strict=True)
    kept = [tuple(sorted(order[:count].tolist())) for order, count in pairs]
    return tuple(
        LayerSelection(**{m: kept[place] for m, place in zip(MODULES, places, strict=True)})
        for places in structures.places
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Move:
    """One structure's width goes to a neighbouring allowed one; `cost`: how much logits object."""

    structure: int
    count: int
    gain: int
    cost: float


class _Widths:
    """Widths of all structures on their way to a number of parameters.

    Args:
        ranked: (width,) float64 logits of each structure, in decreasing order.
        target: parameters of the linears to keep.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        structures: Structures,
        ranked: Sequence[Tensor],
        target: float,
        align: int,
    ) -> None:
        self._ranked, self._target, self._places = ranked, target, structures.places
        self._sums = [torch.cat((r.new_zeros(1), r.cumsum(0))).tolist() for r in ranked]
        self._alone = [replace(spec, layers=(layer,)) for layer in spec.layers]
        self._layers: list[list[int]] = [[] for _ in ranked]  # that a structure is part of
        for i, places in enumerate(structures.places):
            for place in set(places):
                self._layers[place].append(i)
        self._allowed = [
            sorted({*range(align, len(r) + 1, align), len(r)}) if align < len(r) else [len(r)]
            for r in ranked
        ]
        self.counts = [len(r) for r in ranked]

    def start(self) -> None:
        """Take what lies above one threshold, rounded to allowed widths."""
        low = min(float(r[-1]) for r in self._ranked) - 1
        high = max(float(r[0]) for r in self._ranked) + 1
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            self.counts = [max(1, int((r > middle).sum())) for r in self._ranked]
            low, high = (middle, high) if self._total() > self._target else (low, middle)
        self.counts = [
            min(allowed, key=lambda width, count=count: abs(width - count))
            for allowed, count in zip(self._allowed, self.counts, strict=True)
        ]

    def approach(self) -> None:
        """Take the least costly move that brings the target nearer, while there is one."""
        missing = self._target - self._total()
        while True:
            useful = [m for m in self._moves() if abs(missing - m.gain) < abs(missing)]
            if not useful:
                return
            move = min(useful, key=lambda m: m.cost)
            self.counts[move.structure] = move.count
            missing -= move.gain

    def refine(self) -> None:
        """Try pairs of moves where single ones do not meet the target."""
        missing = self._target - self._total()
        while abs(missing) > TOLERANCE * self._target:
            best: tuple[float, float, _Move, _Move] | None = None
            for first in list(self._moves()):
                before = self.counts[first.structure]
                self.counts[first.structure] = first.count
                for second in self._moves():
                    left = abs(missing - first.gain - second.gain)
                    found = (max(left, TOLERANCE * self._target), first.cost + second.cost)
                    if left < abs(missing) and (best is None or found < best[:2]):
                        best = (*found, first, second)
                self.counts[first.structure] = before
            if best is None:
                return
            for move in best[2:]:
                self.counts[move.structure] = move.count
            missing = self._target - self._total()

    def _moves(self) -> Iterator[_Move]:
        for structure, count in enumerate(self.counts):
            place = self._allowed[structure].index(count)
            for neighbour in self._allowed[structure][max(0, place - 1) : place + 2]:
                if neighbour != count:
                    yield self._move(structure, neighbour)

    def _move(self, structure: int, count: int) -> _Move:
        before, sums = self.counts[structure], self._sums[structure]
        gain = -self._total(self._layers[structure])
        self.counts[structure] = count
        gain += self._total(self._layers[structure])
        self.counts[structure] = before
        mean = (sums[count] - sums[before]) / (count - before)
        return _Move(
            structure=structure, count=count, gain=gain, cost=mean if count < before else -mean
        )

    def _total(self, layers: Sequence[int] | None = None) -> int:
        """Count the parameters of layers; None: of all."""
        chosen = range(len(self._alone)) if layers is None else layers
        return sum(
            count_linears(self._alone[i], [[self.counts[place] for place in self._places[i]]])
            for i in chosen
        )
