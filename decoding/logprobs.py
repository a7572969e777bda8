"""Log probabilities under the model's own distribution."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from decoding.rows import find_largest
from decoding.spread import measure_spread

# Rows at a time, so that a long prompt's log probabilities are never all in memory.
MAX_ROWS = 32

TopLogprobs = tuple[tuple[int, float], ...]


class LogitsError(ValueError):
    """Logits are not numbers, so no token can be drawn: the weights or the kernels are broken."""

    def __init__(self) -> None:
        super().__init__("the model's logits are not numbers; are its weights damaged?")


def token_logprobs(
    logits: Tensor,
    token_ids: Sequence[int],
    *,
    num_top: int = 0,
    log_masses: Tensor | None = None,
) -> list[tuple[float, TopLogprobs]]:
    """Return the log probability of a token and the most likely alternatives, for each row.

    Args:
        logits: (L, V) float32, unscaled.
        token_ids: L token ids, one for each row.
        num_top: how many alternatives, >= 0.
        log_masses: (L,) float64 on the CPU, see `Spread`; None: as `measure_spread` finds them.

    Returns:
        for each row, the natural log probability of its token, and `num_top` pairs of token id and
        log probability, most likely first.

    Raises:
        LogitsError: a row's logits are not numbers.
    """
    found: list[tuple[float, TopLogprobs]] = []
    for start in range(0, len(token_ids), MAX_ROWS):
        end = start + MAX_ROWS
        part = logits[start:end].float()
        known = measure_spread(part).log_masses if log_masses is None else log_masses[start:end]
        found += _shifted_logprobs(part, known.to(part.device), token_ids[start:end], num_top)
    return found


def _shifted_logprobs(
    logits: Tensor, log_masses: Tensor, token_ids: Sequence[int], num_top: int
) -> list[tuple[float, TopLogprobs]]:
    """Do what `token_logprobs` does, for a few rows whose log masses are known."""
    chosen = logits.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0]
    scores = (chosen.double() - log_masses).tolist()
    if any(map(math.isnan, scores)):
        raise LogitsError
    if num_top == 0:
        return [(value, ()) for value in scores]
    values, ids = find_largest(logits, num_top)
    values = values.double() - log_masses[:, None]
    tops = [
        tuple(zip(row_ids, row_values, strict=True))
        for row_ids, row_values in zip(ids.tolist(), values.tolist(), strict=True)
    ]
    return list(zip(scores, tops, strict=True))
