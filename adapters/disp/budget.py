"""How many parameters to keep: shares of the linears and of the model, and the pull towards them.

The paper's symbols: rho, the share removed of the whole model; p, the share kept of the linears.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from models.pruning import count_fixed, count_linears, widths_of
from models.spec import DecoderSpec

_NEAR = 0.03


class BudgetError(ValueError):
    """So much cannot be removed."""


def linears_total(spec: DecoderSpec) -> int:
    """Count the parameters of the linears of a decoder that is not pruned."""
    return count_linears(spec, widths_of(spec))


def reachable_share(spec: DecoderSpec, align: int) -> float:
    """Return the largest removable share of the linears' parameters: `align` channels stay."""
    least = [[min(align, width) for width in layer] for layer in widths_of(spec)]
    return 1 - count_linears(spec, least) / linears_total(spec)


def total_share(spec: DecoderSpec, linears: float) -> float:
    """Turn a removed share of the linears into one of the whole model (biases not counted)."""
    linear = linears_total(spec)
    return linears * linear / (linear + count_fixed(spec))


def linears_share(spec: DecoderSpec, total: float, *, align: int = 1) -> float:
    """Turn a removed share of the whole model into one of the linears, 1 - p.

    Raises:
        BudgetError: embeddings and norms, which stay, make it unreachable; names the maximum.
    """
    share = total / total_share(spec, 1.0)
    limit = reachable_share(spec, align)
    if not 0 < share <= limit:
        raise BudgetError(
            f"remove_total must be above 0 and at most {_floor(total_share(spec, limit))} for this "
            f"model, got {total:g}: {count_fixed(spec)} of its "
            f"{linears_total(spec) + count_fixed(spec)} parameters are embeddings and norms, "
            "which stay"
        )
    return share


def check_shares(spec: DecoderSpec, remove: Sequence[float], align: int) -> None:
    """Refuse shares of the linears that no selection removes.

    Raises:
        BudgetError: names the largest share that can be removed.
    """
    limit = reachable_share(spec, align)
    if beyond := [share for share in remove if share > limit]:
        raise BudgetError(
            f"remove must be at most {_floor(limit)} for this model, got "
            f"{', '.join(f'{share:g}' for share in beyond)}: every width keeps at least align = "
            f"{align} channels"
        )


def ratio_penalty(kept: Tensor, target: float, weight: float) -> Tensor:
    """Pull the kept parameters T towards the target.

    The value is the paper's, weight * log(max(T, target) / min(T, target)), but for the last 3 % of
    the way, where it and its gradient fade, so that T settles instead of swinging about the target.

    Args:
        kept: (...,) share of the parameters that is kept; 0 is taken for a millionth.
        target: wanted share, above 0.
        weight: the paper's lambda.

    Returns:
        (...,) float32, at least 0.
    """
    distance = log_ratio(kept, target)
    return weight * (distance.detach() / _NEAR).clamp(-1, 1) * distance


def log_ratio(kept: Tensor, target: float) -> Tensor:
    """Return log(T / target), where 0 is taken for a millionth."""
    return (kept.clamp_min(1e-6) / target).log()


def kept_share(spec: DecoderSpec, widths: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the share of the linears' parameters that widths keep; differentiable in them."""
    return count_linears(spec, widths) / linears_total(spec)


def _floor(share: float) -> float:
    """Round down to what can be given on a command line."""
    return math.floor(share * 1e4) / 1e4
