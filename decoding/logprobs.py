"""Log probabilities and entropy of the model's own distribution."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from decoding.rows import find_largest, sum_rows

# Rows at a time, so that a long prompt's log probabilities are never all in memory.
_MAX_ROWS = 32
_MAX_SURPRISE = torch.finfo(torch.float32).max

TopLogprobs = tuple[tuple[int, float], ...]


class LogitsError(ValueError):
    """Logits are not numbers, so no token can be drawn: the weights or the kernels are broken."""

    def __init__(self) -> None:
        super().__init__("the model's logits are not numbers; are its weights damaged?")


def token_logprobs(
    logits: Tensor, token_ids: Sequence[int], *, num_top: int = 0
) -> list[tuple[float, TopLogprobs]]:
    """Return the log probability of a token and the most likely alternatives, for each row.

    Args:
        logits: (L, V) float32, unscaled.
        token_ids: L token ids, one for each row.
        num_top: how many alternatives, >= 0.

    Returns:
        for each row, the natural log probability of its token, and `num_top` pairs of token id and
        log probability, most likely first.

    Raises:
        LogitsError: a row's logits are not numbers.
    """
    found: list[tuple[float, TopLogprobs]] = []
    for start in range(0, len(token_ids), _MAX_ROWS):
        part = logits[start : start + _MAX_ROWS].float()
        found += _token_logprobs(part, token_ids[start : start + _MAX_ROWS], num_top)
    return found


def _token_logprobs(
    logits: Tensor, token_ids: Sequence[int], num_top: int
) -> list[tuple[float, TopLogprobs]]:
    """Do what `token_logprobs` does, for a few rows."""
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logprobs.device)[:, None])[:, 0]
    scores = chosen.tolist()
    if any(map(math.isnan, scores)):
        raise LogitsError
    if num_top == 0:
        return [(value, ()) for value in scores]
    values, ids = find_largest(logprobs, num_top)
    tops = [
        tuple(zip(row_ids, row_values, strict=True))
        for row_ids, row_values in zip(ids.tolist(), values.tolist(), strict=True)
    ]
    return list(zip(scores, tops, strict=True))


def entropies(logits: Tensor) -> Tensor:
    """Return the entropy of each row's distribution at temperature 1, in nats.

    Args:
        logits: (B, V) float32; -inf marks impossible tokens.

    Returns:
        (B,) float64, >= 0.
    """
    # A finite surprise for impossible tokens, whose share of the sum is 0.
    surprise = torch.log_softmax(logits, dim=-1).neg_().clamp_max_(_MAX_SURPRISE)
    return sum_rows(surprise.mul_(torch.softmax(logits, dim=-1))).clamp_min_(0.0)
