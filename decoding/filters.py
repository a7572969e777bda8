"""Leaving out unlikely tokens: top-k, typical-p, top-p and min-p.

Each filter acts on what the one before it kept, renormalised, in this order. Tokens of equal
probability are kept or dropped together, so that no result depends on the order of a sort:

- top-k keeps a token if fewer than k tokens are more probable;
- typical-p keeps a token if those whose surprise is nearer to the entropy sum to less than it;
- top-p keeps a token if those more probable sum to less than it;
- min-p keeps a token at least that fraction as probable as the most probable one.

Without typical-p, the kept tokens are those at least as probable as a threshold. The most probable
few tokens decide it in nearly every case; if not, it is selected among all, without a sort.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.draw import draw_dense, draw_few
from decoding.params import SamplingParams
from decoding.rows import find_largest, sum_rows

# How many candidates are tried, in turn, before all tokens are looked at.
_FEW = 64
_MANY = 1024
_MAX_KEY = torch.iinfo(torch.int32).max
_HALF_BITS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """The filters of several rows that drop what is below a threshold; None if no row has it.

    Attributes:
        top_k: (B, 1) int64; `KEEP_ALL` keeps all.
        top_p: (B, 1) float64; infinity keeps all.
        min_p: (B, 1) float64; 0 keeps all.
    """

    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None

    @classmethod
    def of(cls, rows: Sequence[SamplingParams], device: torch.device) -> "Thresholds":
        """Collect the filters of several rows."""

        def column(values: list[float], neutral: float) -> Tensor | None:
            if all(value == neutral for value in values):
                return None
            return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

        top_k = column([p.top_k if p.top_k > 0 else KEEP_ALL for p in rows], KEEP_ALL)
        return cls(
            top_k=None if top_k is None else top_k.long(),
            top_p=column([p.top_p if p.top_p < 1.0 else math.inf for p in rows], math.inf),
            min_p=column([p.min_p for p in rows], 0.0),
        )


KEEP_ALL = 2**40


def draw_filtered(
    weights: Tensor, away: Tensor, rows: Sequence[SamplingParams], uniforms: Tensor
) -> Tensor:
    """Draw a token of each row from those that its filters keep.

    Args:
        weights: (B, V) float32, as for `draw_dense`.
        away: (B, V) float32, the tokens' `distances`, which typical-p reads.
        rows: B parameters, each with a filter.
        uniforms: (B, 1) float64 in [0, 1).

    Returns:
        (B,) int64 token ids.
    """
    typical = [index for index, params in enumerate(rows) if params.typical_p < 1.0]
    totals = sum_rows(weights)[:, None]
    drawn, is_decided = _draw_among(weights, totals, rows, uniforms, _FEW)
    if typical:
        is_decided[typical] = False
    if bool(is_decided.all()):
        return drawn
    rest = (~is_decided).nonzero()[:, 0].tolist()
    more = [index for index in rest if index not in typical]
    if more:
        index = torch.tensor(more, device=weights.device)
        drawn[index], is_decided[index] = _draw_among(
            weights.index_select(0, index),
            totals[index],
            [rows[i] for i in more],
            uniforms[index],
            _MANY,
        )
    for row in (~is_decided).nonzero()[:, 0].tolist():
        kept = filter_row(weights[row], away[row], rows[row])
        drawn[row] = draw_dense(kept[None], uniforms[row : row + 1])[0]
    return drawn


def _draw_among(
    weights: Tensor,
    totals: Tensor,
    rows: Sequence[SamplingParams],
    uniforms: Tensor,
    num_candidates: int,
) -> tuple[Tensor, Tensor]:
    """Draw a token of each row, assuming that the filters keep only the most probable few.

    Returns:
        (B,) int64 token ids, and (B,) bool: whether the assumption holds. Typical-p is not
        considered.
    """
    values, ids = find_largest(weights, num_candidates)
    filters = Thresholds.of(rows, weights.device)
    thresholds, is_decided = find_thresholds(values, totals, filters)
    if values.shape[1] == weights.shape[1]:
        is_decided = torch.ones_like(is_decided)
    ids, order = ids.sort(dim=1)
    values = values.gather(1, order)
    kept = torch.where(values >= thresholds, values, 0.0)
    return ids.gather(1, draw_few(kept, uniforms))[:, 0], is_decided[:, 0]


def find_thresholds(values: Tensor, totals: Tensor, filters: Thresholds) -> tuple[Tensor, Tensor]:
    """Find the least weight that each row's filters keep, from its largest weights.

    Args:
        values: (B, C) float32, largest first.
        totals: (B, 1) float64, the sums of all weights.
        filters: of B rows.

    Returns:
        (B, 1) float64 thresholds, and (B, 1) bool: whether these are right even if the row has
        more values, as small as the last one or smaller.
    """
    last = values.shape[1] - 1
    ranked = values.double()
    mass = ranked.cumsum(1)
    thresholds = least = ranked[:, -1:]
    is_known: Tensor | None = None
    share = None if filters.top_p is None else filters.top_p * totals
    if filters.top_k is not None:
        thresholds = ranked.gather(1, (filters.top_k - 1).clamp_max_(last))
        if share is not None:
            has_no_k = filters.top_k == KEEP_ALL
            num_kept = (ranked >= thresholds).sum(1, keepdim=True)
            assert filters.top_p is not None
            share = filters.top_p * torch.where(has_no_k, totals, mass.gather(1, num_kept - 1))
            # Without the k-th value the mass that top-p is a share of is not known.
            is_known = has_no_k | (thresholds > least)
    if share is not None:
        column = torch.searchsorted(mass, share).clamp_max_(last)
        thresholds = torch.maximum(thresholds, ranked.gather(1, column))
    if filters.min_p is not None:
        thresholds = torch.maximum(thresholds, filters.min_p * ranked[:, :1])
    is_decided = thresholds > least
    return thresholds, is_decided if is_known is None else is_decided & is_known


def filter_row(weights: Tensor, away: Tensor, params: SamplingParams) -> Tensor:
    """Set the weights of the tokens that the filters drop to 0.

    Args:
        weights: (V,) float32.
        away: (V,) float32, the tokens' `distances`.
        params: the filters.

    Returns:
        (V,) float32.
    """
    mass = _total(weights)
    if 0 < params.top_k < len(weights):
        count = torch.ones_like(weights, dtype=torch.float64)
        weights = _keep_largest(weights, count, params.top_k)
        mass = _total(weights)
    if params.typical_p < 1.0:
        weights = _keep_typical(weights, away, params.typical_p * mass, mass)
        mass = _total(weights)
    if params.top_p < 1.0:
        weights = _keep_largest(weights, weights.double(), params.top_p * mass)
    if params.min_p > 0.0:
        least = params.min_p * float(weights.max())
        weights = torch.where(weights.double() >= least, weights, 0.0)
    return weights


def _total(weights: Tensor) -> float:
    return float(weights.sum(dtype=torch.float64))


def _keep_largest(weights: Tensor, masses: Tensor, target: float) -> Tensor:
    """Keep the largest weights, up to the one at which the masses sum to a target."""
    limit = select_key(_MAX_KEY - weights.view(torch.int32), masses, target)
    just_below = torch.tensor(max(_MAX_KEY - limit - 1, 0), dtype=torch.int32).view(torch.float32)
    return torch.threshold(weights, float(just_below), 0.0)


def _keep_typical(weights: Tensor, away: Tensor, target: float, mass: float) -> Tensor:
    """Keep the tokens whose surprise is nearest to the entropy, up to a target.

    Surprise and entropy are the same constant more than distance and mean distance, so these
    differ by as much.

    Source: Meister et al., "Locally Typical Sampling", TACL 2023.
    """
    mean = float((weights.double() * away.double()).sum()) / mass
    keys = (away - torch.tensor(mean, dtype=torch.float32, device=away.device)).abs()
    limit = select_key(keys.view(torch.int32), weights.double(), target)
    return torch.where(keys.view(torch.int32) <= limit, weights, 0.0)


def select_key(keys: Tensor, weights: Tensor, target: float) -> int:
    """Find the smallest key up to which the weights sum to a target, by two rounds of bucketing.

    Args:
        keys: (V,) int32, >= 0. Those of non-negative floats are their bits.
        weights: (V,) float64, >= 0.
        target: one beyond the sum of the weights selects the last key with a weight.
    """
    high = _select_bucket(keys >> _HALF_BITS, weights, target, 1 << (31 - _HALF_BITS))
    first_key = high << _HALF_BITS
    # Keys before and after the bucket go to a bucket at either end.
    size = 1 << _HALF_BITS
    low = (keys - (first_key - 1)).clamp_(0, size + 1)
    offset = _select_bucket(low, weights, target, size + 2) - 1
    return first_key + min(max(offset, 0), size - 1)


def _select_bucket(buckets: Tensor, weights: Tensor, target: float, num_buckets: int) -> int:
    """Return the first bucket up to which the weights sum to the target."""
    masses = torch.zeros(num_buckets, dtype=torch.float64, device=buckets.device)
    edges = masses.scatter_add_(0, buckets.long(), weights).cumsum(0)
    reached = int(torch.searchsorted(edges, edges[-1].clamp_max(target)))
    return min(reached, num_buckets - 1)
