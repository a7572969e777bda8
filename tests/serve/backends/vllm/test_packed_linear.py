"""Linears of one rank, against the dense product of the whole."""

import pytest
import torch
from torch import Tensor

from models.q4_1 import quantize_q4_1
from models.quantization import quantize_4bit
from models.spec import DecoderSpec, LayerSpec
from models.weights import LowRank, Matrix, Weight, dense, quantize_8bit
from serve.backends.vllm.packed_linear import (
    PackedLinear,
    Share,
    check_share,
    make_dense_multiply,
    select_columns,
    shard,
)

CPU = torch.device("cpu")
LAYER = LayerSpec(
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=256
)  # fmt: skip
SPEC = DecoderSpec(
    family="test", vocab_size=64, hidden_size=128, max_position_embeddings=64, layers=(LAYER,),
    norm="rms", norm_eps=1e-5, activation="silu", gated_mlp=True,
)  # fmt: skip
FORMATS = ("dense", "nf4", "int8", "Q4_1", "low rank")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(kind: str, rows: int, columns: int, seed: int = 0) -> Weight:
    matrix = random(rows, columns, seed=seed)
    if kind == "low rank":
        return LowRank(left=random(rows, 32, seed=seed), right=random(32, columns, seed=seed + 1))
    made: dict[str, Matrix] = {"dense": matrix}
    if kind == "nf4":
        made[kind] = quantize_4bit(matrix)
    elif kind == "int8":
        made[kind] = quantize_8bit(matrix)
    elif kind == "Q4_1":
        made[kind] = quantize_q4_1(matrix)
    return made[kind]


def pack(weights: list[Weight], **options: object) -> PackedLinear:
    biases = options.pop("biases", [None] * len(weights))
    width = options.pop("width", sum(weight.shape[0] for weight in weights))
    return PackedLinear(
        weights, biases, make_dense_multiply(torch.float32, CPU), width=width,
        dtype=torch.float32, device=CPU, **options,
    )  # fmt: skip


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", FORMATS)
def test_matrices_stand_side_by_side(kind: str) -> None:
    weights = [make(kind, rows, 128, seed=rows) for rows in (64, 32)]
    bias = random(32)
    x = random(2, 3, 128)
    expected = torch.cat([x @ dense(weight).T for weight in weights], dim=-1)
    expected[..., 64:] += bias
    assert close(pack(weights, biases=[None, bias])(x), expected)


def test_shared_right_factor_is_computed_once() -> None:
    right = random(16, 128)
    weights: list[Weight] = [LowRank(left=random(rows, 16), right=right) for rows in (64, 32, 32)]
    calls = []

    def make_multiply(matrices):
        calls.append([matrix.shape for matrix in matrices])
        return make_dense_multiply(torch.float32, CPU)(matrices)

    packed = PackedLinear(
        weights, [None] * 3, make_multiply, width=128, dtype=torch.float32, device=CPU
    )
    x = random(5, 128)
    assert calls == [[(16, 128)], [(64, 16), (32, 16), (32, 16)]]
    assert close(packed(x), torch.cat([x @ dense(weight).T for weight in weights], dim=-1))


def test_pruned_one_reads_some_channels_and_fills_some() -> None:
    kept_inputs, kept_outputs = [0, 3, 5, 127], [2, 6]
    weight = random(2, 4)
    x = random(3, 128)
    out = pack([weight], kept_inputs=kept_inputs, kept_outputs=kept_outputs, width=8)(x)
    expected = torch.zeros(3, 8)
    expected[:, kept_outputs] = x[:, kept_inputs] @ weight.T
    assert close(out, expected)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["q", "k", "v", "o", "gate", "up", "down"])
def test_ranks_together_compute_the_whole(name: str, kind: str, size: int) -> None:
    rows, columns = {
        "q": (128, 128), "k": (64, 128), "v": (64, 128), "o": (128, 128), "gate": (256, 128),
        "up": (256, 128), "down": (128, 256),
    }[name]  # fmt: skip
    weight, bias, x = make(kind, rows, columns), random(rows), random(3, columns, seed=2)
    whole = x @ dense(weight).T + bias
    shares = [Share(rank=rank, size=size) for rank in range(size)]
    parts = [shard(name, weight, bias, LAYER, share) for share in shares]
    if name in ("o", "down"):
        inputs = x.chunk(size, dim=-1)
        outs = [pack([w], biases=[b])(i) for (w, b), i in zip(parts, inputs, strict=True)]
        assert close(sum(outs), whole)
        return
    outs = [pack([w], biases=[b])(x) for w, b in parts]
    if name in ("k", "v") and size == 4:  # two heads for four ranks: each twice
        outs = outs[::2]
    assert close(torch.cat(outs, dim=-1), whole)


def test_columns_within_a_block_become_dense() -> None:
    for kind in ("nf4", "int8", "Q4_1"):
        weight = make(kind, 64, 128)
        part = select_columns(weight, slice(16, 48))
        assert torch.equal(dense(part), dense(weight)[:, 16:48])
        assert isinstance(part, Tensor)
        assert not isinstance(select_columns(weight, slice(64, 128)), Tensor)


@pytest.mark.parametrize(
    ("size", "match"),
    [
        (3, "tensor_parallel_size: 3 does not divide the 64 tokens of the vocabulary"),
        (8, "tensor_parallel_size: 8 does not divide the 4 attention heads"),
    ],
)
def test_ranks_that_do_not_divide_a_model_are_refused(size: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        check_share(SPEC, size)
    check_share(SPEC, 4)
