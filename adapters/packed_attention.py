"""Causal attention of packed sequences with torch, for training: exact, in linear memory."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.program import AttentionOp


class PackedAttention:
    """Attention over sequences that lie one after the other, padded only while it computes.

    Args:
        query_starts: (B + 1,) sequence b owns tokens query_starts[b] .. query_starts[b + 1].
        device: where to compute.
    """

    def __init__(self, query_starts: Tensor, device: torch.device) -> None:
        lengths = query_starts.diff()
        self._shape = (len(lengths), int(lengths.max()))
        column = torch.arange(self._shape[1])
        is_token = column < lengths[:, None]
        # Padding repeats a sequence's first token; no query that counts ever sees it.
        rows = torch.where(is_token, query_starts[:-1, None] + column, query_starts[:-1, None])
        self._rows = rows.flatten().to(device)
        self._slots = is_token.flatten().nonzero().flatten().to(device)
        self._padding = (~is_token).flatten().nonzero().flatten().to(device)

    def __call__(self, op: AttentionOp, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend.

        Args:
            op: the attention.
            q: (T, H, E); k, v: (T, K, E); rotated; computed in the dtype of v.

        Returns:
            (T, H * E).
        """
        q, k, v = (self._pad(x.to(v.dtype)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=op.scale, enable_gqa=op.num_heads != op.num_kv_heads
        )
        out = out.transpose(1, 2).reshape(-1, op.num_heads * op.head_dim)
        return _Unpad.apply(out, self) if len(self._padding) else out

    def _pad(self, heads: Tensor) -> Tensor:
        rows = _Pad.apply(heads.flatten(1), self) if len(self._padding) else heads
        return rows.view(*self._shape, *heads.shape[1:])

    def gather(self, rows: Tensor) -> Tensor:
        """Return (B * S, width) padded rows of (T, width) rows."""
        return rows.index_select(0, self._rows)

    def scatter(self, padded: Tensor) -> Tensor:
        """Return (T, width) rows of (B * S, width) padded ones."""
        return padded.index_select(0, self._slots)

    def clear_padding(self, padded: Tensor) -> Tensor:
        """Set padded rows to 0, in place."""
        return padded.index_fill_(0, self._padding, 0)


# Written out because autograd's own gradient of a gather adds row by row.
class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: PackedAttention) -> Tensor:
        ctx.layout = layout
        return layout.gather(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.layout.scatter(gradient), None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, padded: Tensor, layout: PackedAttention) -> Tensor:
        ctx.layout = layout
        return layout.scatter(padded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.layout.clear_padding(ctx.layout.gather(gradient)), None
