"""Native linears against the torch reference, over shapes, formats and fused neighbours."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.kernels.native.executor import NativeExecutor, is_native_available
from models.kernels.native.panels import kernel_group
from models.kernels.reference.executor import ReferenceExecutor
from models.program import LOGITS, Activate, LinearOp, Norm, Piece
from models.quantization import quantize_4bit
from models.weights import Matrix, quantize_8bit
from tests.models.kernels.conftest import INSTRUCTION_SETS
from tests.models.kernels.random_decoders import run_linear

FORMATS: dict[str, Callable[[Tensor], Matrix]] = {
    "float32": lambda m: m,
    "bfloat16": lambda m: m.bfloat16(),
    "float16": lambda m: m.half(),
    "nf4": quantize_4bit,
    "nf4_block_32": lambda m: quantize_4bit(m, block_size=32),
    "nf4_block_256": lambda m: quantize_4bit(m, block_size=256),
    "int8": quantize_8bit,
}
WIDTHS = (1, 15, 16, 48, 63, 64, 80, 100, 112, 192, 576)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _linear(weight: Matrix, **changes: object) -> LinearOp:
    fields: dict[str, object] = {
        "src": "x", "dst": LOGITS, "prologue": None, "in_features": weight.shape[1],
        "pieces": (Piece(weight=weight, bias=None, offset=0),),
    }  # fmt: skip
    return LinearOp(**(fields | changes))  # type: ignore[arg-type]


def _assert_matches(native: str, rows: Tensor, *ops: LinearOp, tolerance: float) -> None:
    expected = run_linear(ReferenceExecutor, rows, *ops)
    actual = run_linear(lambda p: NativeExecutor(p, kernels=native, num_threads=2), rows, *ops)
    # Relative to the size of a typical sum, which is what rounding scales with.
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.std().item())


def _tolerance(name: str) -> float:
    return 2e-3 if name.startswith(("nf4", "int8")) else 2e-5


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", FORMATS)
def test_linear_equals_reference_at_any_width(native: str, name: str, width: int) -> None:
    rows, weight = _random(5, width), FORMATS[name](_random(37, width, seed=1))
    _assert_matches(native, rows, _linear(weight), tolerance=_tolerance(name))


@pytest.mark.parametrize("outputs", [1, 2, 15, 16, 17, 33, 257])
@pytest.mark.parametrize("name", ["float32", "nf4", "int8"])
def test_linear_equals_reference_at_any_output_count(native: str, name: str, outputs: int) -> None:
    rows, weight = _random(4, 128), FORMATS[name](_random(outputs, 128, seed=1))
    op = _linear(weight, pieces=(Piece(weight=weight, bias=_random(outputs, seed=2), offset=0),))
    reference = run_linear(ReferenceExecutor, rows, op)
    actual = run_linear(lambda p: NativeExecutor(p, kernels=native), rows, op)
    torch.testing.assert_close(actual, reference, rtol=0, atol=0.03)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 25, 64])
@pytest.mark.parametrize("name", FORMATS)
def test_linear_gives_a_row_the_same_bits_in_any_batch(native: str, name: str, count: int) -> None:
    rows, weight = _random(64, 192), FORMATS[name](_random(48, 192, seed=1))
    op = _linear(weight)
    whole = run_linear(lambda p: NativeExecutor(p, kernels=native), rows, op)
    part = run_linear(lambda p: NativeExecutor(p, kernels=native), rows[:count], op)
    assert torch.equal(part, whole[:count])


@pytest.mark.parametrize("count", [1, 3, 4, 17])
@pytest.mark.parametrize("name", FORMATS)
def test_linear_gives_the_same_bits_in_every_instruction_set(name: str, count: int) -> None:
    rows, op = _random(count, 192), _linear(FORMATS[name](_random(48, 192, seed=1)))
    sets = [name for name in (*INSTRUCTION_SETS, "auto") if is_native_available(name)]
    first, *others = (
        run_linear(lambda p, name=name: NativeExecutor(p, kernels=name), rows, op)  # type: ignore[misc]
        for name in sets
    )
    for other in others:
        assert torch.equal(first, other)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 5])
def test_linear_gives_the_same_bits_with_any_number_of_threads(
    native: str, num_threads: int
) -> None:
    rows, op = _random(9, 192), _linear(quantize_4bit(_random(100, 192, seed=1)))
    one = run_linear(lambda p: NativeExecutor(p, kernels=native, num_threads=1), rows, op)
    many = run_linear(
        lambda p: NativeExecutor(p, kernels=native, num_threads=num_threads), rows, op
    )
    assert torch.equal(one, many)


@pytest.mark.parametrize("width", [10, 64, 100])
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])
def test_linear_applies_the_activation_first(
    native: str, kind: str, is_gated: bool, width: int
) -> None:
    rows = _random(3, width * (1 + is_gated)) * 3
    activate = Activate(kind=kind, is_gated=is_gated)  # type: ignore[arg-type]
    _assert_matches(
        native, rows, _linear(_random(20, width, seed=1), prologue=activate), tolerance=2e-5
    )


@pytest.mark.parametrize("width", [10, 64, 100])
@pytest.mark.parametrize("has_bias", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("name", ["float32", "nf4"])
def test_linear_normalises_and_gathers_first(
    native: str, name: str, has_bias: bool, width: int
) -> None:
    kept = torch.arange(0, width, 2, dtype=torch.int32)
    bias = _random(width, seed=3) if has_bias else None
    norm = Norm(weight=_random(width, seed=2), bias=bias, eps=1e-5, indices=kept)
    weight = FORMATS[name](_random(24, len(kept), seed=1))
    _assert_matches(
        native, _random(5, width), _linear(weight, prologue=norm), tolerance=_tolerance(name)
    )


def test_linear_scatters_into_the_residual(native: str) -> None:
    kept = torch.tensor([1, 5, 6, 63], dtype=torch.int32)
    matrix = _random(4, 64, seed=1)
    into = _linear(matrix, dst="x", accumulate=True, scatter=kept)
    read = _linear(torch.eye(64))
    rows = _random(7, 64)
    out = run_linear(lambda p: NativeExecutor(p, kernels=native), rows, into, read)
    expected = rows.index_add(1, kept.long(), rows @ matrix.T)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_linear_joins_pieces_of_different_kinds(native: str) -> None:
    q, k = quantize_4bit(_random(32, 64, seed=1)), _random(17, 64, seed=2)
    pieces = (
        Piece(weight=q, bias=None, offset=0),
        Piece(weight=k, bias=_random(17, seed=3), offset=32),
    )
    into = _linear(k, dst="y", pieces=pieces)
    read = _linear(_random(49, 49, seed=4), src="y")
    _assert_matches(native, _random(6, 64), into, read, tolerance=2e-3)


def test_linear_with_non_finite_input_spoils_its_own_row_only(native: str) -> None:
    rows, op = _random(4, 64), _linear(quantize_4bit(_random(20, 64, seed=1)))
    clean = run_linear(lambda p: NativeExecutor(p, kernels=native), rows, op)
    spoilt = rows.clone()
    spoilt[2, 3] = float("inf")
    out = run_linear(lambda p: NativeExecutor(p, kernels=native), spoilt, op)
    assert torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]])
    assert not out[2].isfinite().any()


def test_codes_are_nearer_to_float32_than_bfloat16_is(native: str) -> None:
    rows, weight = _random(16, 576), quantize_4bit(_random(256, 576, seed=1))
    exact = run_linear(ReferenceExecutor, rows, _linear(weight))
    ours = run_linear(lambda p: NativeExecutor(p, kernels=native), rows, _linear(weight))
    in_bfloat = rows.bfloat16().float() @ weight.dequantize().bfloat16().float().T
    assert (ours - exact).abs().mean() < (in_bfloat - exact).abs().mean() / 5


@pytest.mark.parametrize(
    ("width", "block_size", "group"), [(64, 64, 64), (96, 64, 32), (80, 64, 16), (100, 64, 0),
                                       (64, 32, 32), (576, 4096, 64), (63, 64, 0)],
)  # fmt: skip
def test_kernel_group_never_crosses_a_scale(width: int, block_size: int, group: int) -> None:
    weight = quantize_4bit(_random(3, width), block_size=block_size)
    assert kernel_group(weight) == group
