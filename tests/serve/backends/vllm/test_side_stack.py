"""Side networks layer by layer, several at once, against each computed whole."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.qst.config import QstConfig
from adapters.qst.network import QstNetwork
from models.kernels.reference.operations import blend_side, run_side
from models.program import AttentionOp
from models.side import SideProgram
from models.spec import DecoderSpec, LayerSpec, RotarySpec
from serve.backends.vllm.side_stack import PackedHeads, SideRun, SideStack

LAYER = LayerSpec(num_attention_heads=6, num_key_value_heads=2, head_dim=16, intermediate_size=64)
SPEC = DecoderSpec(
    family="test", vocab_size=64, hidden_size=96, max_position_embeddings=64, layers=(LAYER,) * 3,
    norm="rms", norm_eps=1e-5, activation="silu", gated_mlp=True,
    rotary=RotarySpec(dim=16, inv_freq=tuple(10.0 ** (-i / 2) for i in range(8))),
)  # fmt: skip
STARTS = [0, 5, 6, 13]
"""Of three sequences in a step."""


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Sequence[int] = STARTS) -> Tensor:
    """Causal attention within each sequence: (T, H, E)."""
    out = []
    for first, last in pairwise(starts):
        heads = [x[first:last].transpose(0, 1)[None] for x in (q, k, v)]
        attended = F.scaled_dot_product_attention(
            *heads, is_causal=True, scale=scale, enable_gqa=True
        )
        out.append(attended[0].transpose(0, 1))
    return torch.cat(out)


def make_program(seed: int) -> SideProgram:
    network = QstNetwork(SPEC, QstConfig(reduction=4, rank=8), seed=seed)
    with torch.no_grad():
        network.get_parameter("alpha").fill_(0.3)
    return network.program()


def whole(program: SideProgram, hidden: list[Tensor], rows: slice, start: int) -> Tensor:
    """Compute one sequence's side network alone."""
    count = rows.stop - rows.start

    def attention(op: AttentionOp, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, op.scale, [0, count]).flatten(1)

    positions = torch.arange(start, start + count)
    return run_side(program, [h[rows] for h in hidden], positions, attend=attention)


@torch.no_grad()
def test_side_networks_of_a_step_are_each_as_alone() -> None:
    programs = [make_program(seed) for seed in (1, 2)]
    hidden = [torch.randn(13, 96, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    positions = torch.tensor([*range(5), 7, *range(20, 27)])
    # The second sequence has none; the third has the first one's network at half its strength.
    runs = [
        SideRun(programs[0], 1.0, torch.arange(5)),
        SideRun(programs[1], 0.5, torch.arange(6, 13)),
    ]
    heads = PackedHeads(6, 2, 4, 32)

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        packed = heads.pack_queries(q), heads.pack_keys(k), heads.pack_keys(v)
        assert packed[1].shape == (13, heads.num_kv_heads, 32)
        return heads.unpack(attend(*packed, scale=4**-0.5))

    stack = SideStack(attention)
    stack.begin(runs, positions)
    for index, state in enumerate(hidden):
        stack.tap(index, state)
    normed = torch.randn(13, 96)
    blended = stack.blend(normed)
    first = whole(programs[0], hidden, slice(0, 5), 0)
    third = whole(programs[1], hidden, slice(6, 13), 20)
    assert torch.allclose(blended[:5], blend_side(programs[0], normed[:5], first), atol=1e-5)
    assert torch.allclose(blended[6:], blend_side(programs[1], normed[6:], third, 0.5), atol=1e-5)
    assert torch.equal(blended[5], normed[5])


def test_without_side_networks_nothing_happens() -> None:
    def attention(*_: object) -> Tensor:
        raise AssertionError

    stack = SideStack(attention)
    stack.begin([], torch.arange(3))
    stack.tap(0, torch.randn(3, 96))
    stack.tap(1, torch.randn(3, 96))
    normed = torch.randn(3, 96)
    assert stack.blend(normed) is normed


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "width", "size", "packed"),
    [(9, 3, 4, 32, 1), (32, 32, 8, 64, 4), (4, 2, 32, 32, 2), (4, 4, 48, 64, 4), (6, 1, 4, 32, 1)],
)
def test_packed_heads_attend_as_the_narrow_ones(
    num_heads: int, num_kv_heads: int, width: int, size: int, packed: int
) -> None:
    heads = PackedHeads(num_heads, num_kv_heads, width, size)
    assert heads.num_kv_heads == packed
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(13, num_heads, width, generator=generator)
    k, v = (torch.randn(13, num_kv_heads, width, generator=generator) for _ in "kv")
    scale = width**-0.5
    out = attend(heads.pack_queries(q), heads.pack_keys(k), heads.pack_keys(v), scale)
    assert torch.allclose(heads.unpack(out), attend(q, k, v, scale), atol=1e-5)
