"""Attention over packed sequences against each sequence alone."""

import pytest
import torch
from torch import Tensor

from adapters.packed_attention import PackedAttention
from models.program import AttentionOp


def make_op(heads: int, kv_heads: int, dim: int) -> AttentionOp:
    return AttentionOp(
        src="qkv", dst="attended", layer=0, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim,
        rotary_dim=0, q_norm=None, k_norm=None, eps=1e-5, scale=0.4,
    )  # fmt: skip


def attend_alone(q: Tensor, k: Tensor, v: Tensor, op: AttentionOp) -> Tensor:
    group = op.num_heads // op.num_kv_heads
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("ihe,jhe->hij", q, k) * op.scale
    mask = torch.ones(len(q), len(q)).triu(1).bool()
    probs = scores.masked_fill(mask, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhe->ihe", probs, v).flatten(1)


@pytest.mark.parametrize("lengths", [(5,), (4, 4), (1, 7, 3)], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_packed_sequences_are_attended_to_as_if_alone(
    lengths: tuple[int, ...], heads: int, kv_heads: int
) -> None:
    torch.manual_seed(0)
    op, total = make_op(heads, kv_heads, 4), sum(lengths)
    qkv = torch.randn(total, (heads + 2 * kv_heads) * 4, requires_grad=True)
    split = qkv.view(total, -1, 4).split([heads, kv_heads, kv_heads], dim=1)
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0)
    found = PackedAttention(starts, torch.device("cpu"))(op, *split)
    parts = zip(*(x.split(lengths) for x in split), strict=True)
    expected = torch.cat([attend_alone(q, k, v, op) for q, k, v in parts])
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad((x * weights).sum(), qkv)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)
