"""Round matrices to GGUF's Q4_1: 4-bit codes, a scale and an offset for each 32 values."""

from itertools import product

import torch
from torch import Tensor

from models.weights import QuantizedBlocks

_TRIED_EDGES = (-0.06, 0.0, 0.06)
_REFITS = 2


def quantize_q4_1(matrix: Tensor) -> QuantizedBlocks:
    """Round a dense (out_features, in_features) matrix to Q4_1, with scales of least error.

    Of each block several ranges are tried, from a little less to a little more than its values
    span. Codes and the straight line through them are fitted to one another in turn; what errs
    least in squares is taken. `in_features` must be a multiple of 32.
    """
    rows = matrix.detach().reshape(-1, 32).split(1 << 12)  # what stays in the cache
    data = torch.cat([_fit_q4_1(blocks.float()) for blocks in rows])
    return QuantizedBlocks(data=data.view(len(matrix), -1), kind="Q4_1")


def _fit_q4_1(blocks: Tensor) -> Tensor:
    """Return (N, 20) bytes of (N, 32) values."""
    low, high = blocks.aminmax(dim=1, keepdim=True)
    mean = blocks.mean(1, keepdim=True)
    least = torch.full_like(low, torch.inf)
    best = [torch.zeros_like(blocks), torch.zeros_like(low), torch.zeros_like(low)]
    for below, above in product(_TRIED_EDGES, _TRIED_EDGES):
        offset = low - (high - low) * below
        scale = (high + (high - low) * above - offset) / 15
        for _ in range(_REFITS):
            inverse = torch.where(scale > 0, 1 / scale, 0)
            codes = ((blocks - offset) * inverse).round_().clamp_(0, 15)
            centre = codes.mean(1, keepdim=True)
            around = codes - centre
            spread = around.square().sum(1, keepdim=True).clamp_min_(1e-30)
            scale = ((around * blocks).sum(1, keepdim=True) / spread).half().float()
            offset = (mean - scale * centre).half().float()
        error = (codes * scale + offset - blocks).square_().sum(1, keepdim=True)
        is_better = error < least
        least = torch.where(is_better, error, least)
        found = (codes, scale, offset)
        best = [torch.where(is_better, new, old) for new, old in zip(found, best, strict=True)]
    codes, fields = best[0].to(torch.uint8), torch.cat(best[1:], dim=1).half()
    return torch.cat((fields.view(torch.uint8), codes[:, :16] | codes[:, 16:] << 4), dim=1)
