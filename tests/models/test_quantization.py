"""Searched scales: never worse than the largest magnitudes, in every block, and bitsandbytes'."""

from collections.abc import Callable

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from models.checkpoints.conversion import FourBit, quantize_tensor
from models.checkpoints.four_bit import read_quantized
from models.kernels.native.executor import NativeExecutor, is_native_available
from models.program import LOGITS, LinearOp, Piece
from models.quantization import (
    NF4_CODEBOOK,
    quantize_4bit,
    round_to_scales,
    search_scales,
)
from models.weights import Quantized4Bit
from tests.models.kernels.random_decoders import run_linear
from tests.models.test_four_bit import Tensors

FORMATS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]
CODEBOOK = torch.tensor(NF4_CODEBOOK)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def with_outliers(*shape: int) -> Tensor:
    matrix = random(*shape)
    matrix.view(-1)[::64] *= 1e4
    return matrix


def with_huge_block(*shape: int) -> Tensor:
    matrix = random(*shape)
    matrix.view(-1)[:64] = matrix.view(-1)[:64].clamp(-1, 1) * 3.4e38
    return matrix


def with_zero_blocks(*shape: int) -> Tensor:
    matrix = random(*shape)
    matrix.view(-1)[: matrix.numel() // 2] = 0
    return matrix


def with_ties(*shape: int) -> Tensor:
    """Values half way between neighbouring codes, at a scale of 1."""
    middles = torch.cat(((CODEBOOK[1:] + CODEBOOK[:-1]) / 2, torch.ones(1)))
    return middles.repeat(-(-shape[0] * shape[1] // 16))[: shape[0] * shape[1]].view(shape)


MATRICES: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: random(96, 192),
    "straddling-rows": lambda: random(37, 100),
    "part-of-a-block": lambda: random(3, 7),
    "outliers": lambda: with_outliers(16, 128),
    "zero-blocks": lambda: with_zero_blocks(16, 128),
    "zeros": lambda: torch.zeros(4, 64),
    "constant": lambda: torch.full((4, 64), -0.3),
    "ties": lambda: with_ties(8, 128),
    "subnormal": lambda: random(8, 128) * 1e-41,
    "smallest": lambda: random(8, 128).sign() * 1e-45,
    "largest": lambda: with_huge_block(8, 128),
    "float16": lambda: random(8, 128).half(),
    "bfloat16": lambda: random(8, 128).bfloat16(),
}


def quantized(matrix: Tensor, four_bit: FourBit, importance: Tensor | None = None) -> Tensors:
    return Tensors(dict(quantize_tensor("w", matrix, four_bit, matrix.dtype, importance)))


def losses(matrix: Tensor, rounded: Quantized4Bit, importance: Tensor | None = None) -> Tensor:
    """Return each block's loss as the definition has it, in float64."""
    counts = torch.ones_like(matrix, dtype=torch.float64)
    if importance is not None:
        counts = (importance / importance.double().mean() + 0.01).float().double().expand_as(matrix)
    padding = (0, -matrix.numel() % 64)
    exact, counts = (
        torch.nn.functional.pad(t.double().flatten(), padding).view(-1, 64)
        for t in (matrix, counts)
    )
    found = torch.nn.functional.pad(rounded.dequantize().double().flatten(), padding).view(-1, 64)
    return (counts * ((found - exact) / exact.abs().amax().clamp(min=1e-300)).square()).sum(1)


@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
@pytest.mark.parametrize(("kind", "double_quant"), FORMATS, ids=str)
@pytest.mark.parametrize("make", MATRICES.values(), ids=MATRICES)
def test_no_block_loses_more_than_without_search(
    make: Callable[[], Tensor], kind: str, double_quant: bool, weighted: bool
) -> None:
    matrix = make()
    importance = random(matrix.shape[1]).exp() if weighted else None
    plain, searched = (
        read_quantized(quantized(matrix, four_bit, importance), "w", kind)
        for four_bit in (
            FourBit(quant_type=kind, double_quant=double_quant),
            FourBit(quant_type=kind, double_quant=double_quant, search=True),
        )
    )
    before, after = losses(matrix, plain, importance), losses(matrix, searched, importance)
    assert searched.dequantize().isfinite().all()
    assert (after <= before * (1 + 1e-6)).all()


@pytest.mark.parametrize(("kind", "double_quant"), FORMATS, ids=str)
def test_normal_weights_lose_a_good_deal_less(kind: str, double_quant: bool) -> None:
    matrix = random(96, 192)
    plain, searched = (
        read_quantized(
            quantized(matrix, FourBit(quant_type=kind, double_quant=double_quant, search=search)),
            "w",
            kind,
        )
        for search in (False, True)
    )
    assert losses(matrix, searched).sum() < 0.9 * losses(matrix, plain).sum()
    assert bool((searched.absmax < 0).any()) is not double_quant


@pytest.mark.parametrize(("kind", "double_quant"), FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitsandbytes_reads_what_the_search_wrote(
    kind: str, double_quant: bool, dtype: torch.dtype
) -> None:
    tensors = quantized(
        random(96, 192).to(dtype), FourBit(quant_type=kind, double_quant=double_quant, search=True)
    )
    parts = {name.removeprefix("w."): t for name, t in tensors.tensors.items() if name != "w"}
    state = bnb.QuantState.from_dict(parts, torch.device("cpu"))
    theirs = bnb.dequantize_4bit(tensors.read("w"), state)
    assert theirs.dtype == dtype
    assert torch.equal(theirs, read_quantized(tensors, "w", kind).dequantize().to(dtype))


@pytest.mark.parametrize("is_signed", [False, True], ids=["positive", "signed"])
def test_search_comes_near_the_best_of_all_scales(is_signed: bool) -> None:
    matrix = random(64, 64)
    start = quantize_4bit(matrix)
    scales = search_scales(matrix, CODEBOOK, is_signed=is_signed)
    found = losses(matrix, round_to_scales(matrix, scales, start)[0])
    best = losses(matrix, start)
    for factor in torch.linspace(0.4, 1.5, 1101).tolist():
        for sign in (1, -1) if is_signed else (1,):
            tried = round_to_scales(matrix, start.absmax * (factor * sign), start)[0]
            best = torch.minimum(best, losses(matrix, tried))
    assert found.sum() <= 1.02 * best.sum()


def test_weights_follow_the_columns_through_blocks_that_straddle_rows() -> None:
    matrix, importance = random(37, 100), torch.full((100,), 1e-3)
    importance[:10] = 1.0
    start = quantize_4bit(matrix)
    loss = []
    for given in (None, importance):
        scales = search_scales(matrix, CODEBOOK, is_signed=True, importance=given)
        rounded = round_to_scales(matrix, scales, start, importance=given)[0]
        loss.append(float((rounded.dequantize() - matrix)[:, :10].square().sum()))
    assert loss[1] < 0.7 * loss[0]


def test_importance_of_zero_everywhere_counts_all_alike() -> None:
    matrix = random(8, 128)
    alike, zero = (
        search_scales(matrix, CODEBOOK, is_signed=True, importance=importance)
        for importance in (torch.ones(128), torch.zeros(128))
    )
    torch.testing.assert_close(alike, zero)


def test_blocks_are_independent_of_how_many_are_searched_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix, importance = random(37, 100), random(100).exp()
    found = []
    for count in (1 << 12, 2):
        monkeypatch.setattr("models.quantization._BLOCKS_AT_A_TIME", count)
        tensors = quantized(matrix, FourBit(search=True), importance)
        found.append(read_quantized(tensors, "w", "nf4").dequantize())
    assert torch.equal(*found)


def test_zero_blocks_stay_zero() -> None:
    matrix = with_zero_blocks(16, 128)
    rounded = read_quantized(quantized(matrix, FourBit(search=True)), "w", "nf4").dequantize()
    assert torch.equal(rounded[:8], torch.zeros(8, 128))


@pytest.mark.skipif(not is_native_available("auto"), reason="needs the native library")
def test_native_kernels_compute_with_negative_scales() -> None:
    rows, matrix = random(5, 192), random(37, 192)
    weight = read_quantized(quantized(matrix, FourBit(search=True)), "w", "nf4")
    assert (weight.absmax < 0).any()
    op = LinearOp(
        src="x", dst=LOGITS, prologue=None, in_features=192,
        pieces=(Piece(weight=weight, bias=None, offset=0),),
    )  # fmt: skip
    out = run_linear(lambda program: NativeExecutor(program, kernels="auto"), rows, op)
    torch.testing.assert_close(out, rows @ weight.dequantize().T, rtol=0, atol=0.03)
