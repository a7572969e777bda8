"""Linears and embeddings in GGUF's block formats, against their own dequantised matrices."""

import pytest
import torch
from torch import Tensor

from models.kernels.native.executor import NativeExecutor, is_native_available
from models.kernels.native.library import native_library
from models.kernels.native.panels import pack
from models.program import LOGITS, LinearOp, Piece, Program
from models.quantization import quantize_4bit
from models.weights import BLOCK_FORMATS, Matrix, QuantizedBlocks, dense
from tests.models.kernels.conftest import INSTRUCTION_SETS
from tests.models.kernels.random_decoders import run_linear

# Where the float16 scales are in a block.
SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2),
    "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,),
}  # fmt: skip
WIDTHS = [
    (kind, width)
    for kind, (values, _) in BLOCK_FORMATS.items()
    for width in ((256, 1536) if values == 256 else (32, 96, 576, 1568))
]
LARGEST = (127, 127 * 128 + 63)  # activation code, of 8 and of 14 bits
precision = pytest.mark.parametrize("is_precise", [False, True], ids=["8 bits", "14 bits"])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=_generator(seed))


def random_blocks(
    kind: str, outputs: int, inputs: int, *, code_byte: int | None = None
) -> QuantizedBlocks:
    """Return blocks of random bytes, or of one repeated, with scales of either sign."""
    values, size = BLOCK_FORMATS[kind]
    shape = (outputs, inputs // values, size)
    if code_byte is None:
        data = torch.randint(0, 256, shape, dtype=torch.uint8, generator=_generator(inputs))
    else:
        data = torch.full(shape, code_byte, dtype=torch.uint8)
    for i in SCALES[kind]:
        scales = torch.randn(shape[:2], generator=_generator(i + 1)) / 64
        data[..., i : i + 2] = scales.half()[..., None].view(torch.uint8)
    return QuantizedBlocks(data=data.view(outputs, -1), kind=kind)


def _linear(*weights: Matrix, is_precise: bool = False) -> LinearOp:
    """Make an operation; a head, which selects rows, takes activations of 14 bits."""
    pieces, offset = [], 0
    for weight in weights:
        pieces.append(Piece(weight=weight, bias=None, offset=offset))
        offset += weight.shape[0]
    return LinearOp(
        src="x", dst=LOGITS, prologue=None, in_features=weights[0].shape[1],
        pieces=tuple(pieces), selects_rows=is_precise,
    )  # fmt: skip


def _run(
    rows: Tensor, *weights: Matrix, kernels: str, num_threads: int = 1, is_precise: bool = False
) -> Tensor:
    def executor(program: Program) -> NativeExecutor:
        return NativeExecutor(program, kernels=kernels, num_threads=num_threads)

    if len(weights) > 1:  # the logits are one matrix's; several go through a buffer
        width = sum(weight.shape[0] for weight in weights)
        joined = LinearOp(
            src="x", dst="y", prologue=None, in_features=weights[0].shape[1],
            pieces=_linear(*weights).pieces,
        )  # fmt: skip
        read = LinearOp(
            src="y", dst=LOGITS, prologue=None, in_features=width,
            pieces=(Piece(weight=torch.eye(width), bias=None, offset=0),),
        )  # fmt: skip
        return run_linear(executor, rows, joined, read)
    return run_linear(executor, rows, _linear(*weights, is_precise=is_precise))


def _assert_near(actual: Tensor, rows: Tensor, weight: Matrix, *, activation_error: float) -> None:
    """Compare with the exact product; an activation is off by at most its group's share."""
    matrix = dense(weight).double()
    groups = rows.double().view(len(rows), -1, 32)
    largest = groups.abs().amax(-1, keepdim=True).expand_as(groups).reshape(rows.shape)
    magnitudes = rows.double().abs() + largest
    bound = largest @ matrix.abs().T * activation_error + magnitudes @ matrix.abs().T * 2e-6
    # Formats with minima are summed in two parts, each larger than the weights.
    bound += magnitudes @ torch.full_like(matrix, matrix.abs().max().item()).T * 1e-6
    assert ((actual.double() - rows.double() @ matrix.T).abs() <= bound).all()


@precision
@pytest.mark.parametrize("num_rows", [1, 3, 17])
@pytest.mark.parametrize(("kind", "width"), WIDTHS)
def test_product_is_within_the_rounding_of_activations(
    native: str, kind: str, width: int, num_rows: int, is_precise: bool
) -> None:
    rows, weight = _random(num_rows, width), random_blocks(kind, 37, width)
    out = _run(rows, weight, kernels=native, is_precise=is_precise)
    error = 0.5 / LARGEST[is_precise] * 1.001
    _assert_near(out, rows, weight, activation_error=error)


@precision
@pytest.mark.parametrize("num_rows", [2, 13])
@pytest.mark.parametrize(("kind", "width"), WIDTHS)
def test_product_with_activations_that_codes_can_say_is_exact(
    native: str, kind: str, width: int, num_rows: int, is_precise: bool
) -> None:
    largest = LARGEST[is_precise]
    codes = torch.randint(-largest, largest + 1, (num_rows, width), generator=_generator(3))
    codes.view(num_rows, -1, 32)[..., 5] = largest
    rows, weight = codes.float() / 64, random_blocks(kind, 20, width)
    out = _run(rows, weight, kernels=native, is_precise=is_precise)
    _assert_near(out, rows, weight, activation_error=0)


@precision
@pytest.mark.parametrize("num_rows", [2, 12])
@pytest.mark.parametrize("sign", [-1, 0], ids=["negative", "both"])
@pytest.mark.parametrize("code_byte", [0x00, 0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("kind", BLOCK_FORMATS)
def test_extreme_codes_do_not_saturate(
    native: str, kind: str, code_byte: int, sign: int, num_rows: int, is_precise: bool
) -> None:
    weight = random_blocks(kind, 16, 256, code_byte=code_byte)
    rows = torch.full((num_rows, 256), float(LARGEST[is_precise]))
    rows *= sign or torch.tensor([1.0, -1.0]).repeat(128)
    out = _run(rows, weight, kernels=native, is_precise=is_precise)
    _assert_near(out, rows, weight, activation_error=0)


@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 33, 257])
@pytest.mark.parametrize("kind", BLOCK_FORMATS)
def test_any_output_count(native: str, kind: str, outputs: int) -> None:
    rows, weight = _random(5, 256), random_blocks(kind, outputs, 256)
    _assert_near(_run(rows, weight, kernels=native), rows, weight, activation_error=0.5 / 127)


@precision
@pytest.mark.parametrize("kind", BLOCK_FORMATS)
def test_a_row_has_the_same_bits_in_any_batch_and_at_any_number_of_threads(
    native: str, kind: str, is_precise: bool
) -> None:
    rows, weight = _random(40, 768), random_blocks(kind, 100, 768)

    def run(count: int, num_threads: int = 1) -> Tensor:
        return _run(
            rows[:count], weight, kernels=native, num_threads=num_threads, is_precise=is_precise
        )

    whole = run(40)
    for count in (1, 2, 3, 4, 11, 13, 25):
        assert torch.equal(run(count), whole[:count])
    assert torch.equal(run(40, num_threads=3), whole)


@precision
@pytest.mark.parametrize("num_rows", [1, 3, 4, 9, 17, 27])
@pytest.mark.parametrize("kind", BLOCK_FORMATS)
def test_every_instruction_set_gives_the_same_bits(
    kind: str, num_rows: int, is_precise: bool
) -> None:
    rows, weight = _random(num_rows, 768), random_blocks(kind, 40, 768)
    sets = [name for name in (*INSTRUCTION_SETS, "auto") if is_native_available(name)]
    first, *others = (_run(rows, weight, kernels=name, is_precise=is_precise) for name in sets)
    for other in others:
        assert torch.equal(first, other)


@pytest.mark.parametrize("kind", BLOCK_FORMATS)
def test_pieces_of_mixed_formats_share_an_input(native: str, kind: str) -> None:
    rows = _random(6, 256)
    weights = (
        random_blocks(kind, 17, 256), random_blocks("Q6_K", 32, 256), _random(5, 256, seed=8),
        quantize_4bit(_random(16, 256, seed=9)), random_blocks("Q8_0", 3, 256),
    )  # fmt: skip
    joined = _run(rows, *weights, kernels=native)
    parts = [_run(rows, weight, kernels=native) for weight in weights]
    assert torch.equal(joined, torch.cat(parts, dim=1))


@pytest.mark.parametrize("kind", BLOCK_FORMATS)
def test_embedding_reads_its_rows_from_panels_exactly(native: str, kind: str) -> None:
    table = random_blocks(kind, 37, 256)
    rows = run_linear(lambda p: NativeExecutor(p, kernels=native), table, _linear(torch.eye(256)))
    assert torch.equal(rows, table.dequantize())


@pytest.mark.parametrize("kind", BLOCK_FORMATS)
def test_table_that_is_the_head_too_is_in_memory_once(native: str, kind: str) -> None:
    table = random_blocks(kind, 37, 256)
    executors = []

    def make(program: Program) -> NativeExecutor:
        executors.append(NativeExecutor(program, kernels=native))
        return executors[0]

    logits = run_linear(make, table, _linear(table))
    assert torch.equal(logits, _run(table.dequantize(), table, kernels=native))
    library = native_library()
    assert library is not None
    assert executors[0].num_bytes == pack(table, library).data.nbytes


@pytest.mark.parametrize("kind", BLOCK_FORMATS)
def test_panels_take_about_the_bytes_of_the_file(kind: str) -> None:
    weight = random_blocks(kind, 64, 2048)
    library = native_library()
    assert library is not None
    assert weight.data.nbytes <= pack(weight, library).data.nbytes <= weight.data.nbytes * 1.03


def test_fastest_kernels_are_chosen_once() -> None:
    library = native_library()
    assert library is not None
    name = library.proa_kernels_name(b"auto")
    assert name
    assert set(name.decode().split("+")) <= set(INSTRUCTION_SETS) - {"tiles"}
    assert library.proa_kernels_name(b"auto") == name
