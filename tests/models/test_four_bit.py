import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from models.checkpoints import CheckpointError
from models.checkpoints.conversion import FourBit, quantize_tensor
from models.checkpoints.four_bit import (
    quantized_kind,
    read_quantized,
    undo_double_quantization,
)
from models.weights import Quantized4Bit, select_rows

SHAPES = [(8, 64), (96, 192), (5, 172), (3, 7), (1, 63), (130, 200)]


class Tensors:
    """Tensors in memory, as a reader."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def foreign_type(self, name: str) -> str | None:
        return None if self.tensors[name].is_floating_point() else str(self.tensors[name].dtype)

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    read_compact = read_stored = read


def quantized(matrix: Tensor, four_bit: FourBit) -> Tensors:
    return Tensors(dict(quantize_tensor("w", matrix, four_bit, matrix.dtype)))


def random(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("shape", [(8, 64), (96, 192), (256, 128)], ids=str)
def test_reading_equals_dequantising_with_bitsandbytes(
    kind: str, double_quant: bool, shape: tuple[int, int]
) -> None:
    matrix = random(shape)
    packed, state = bnb.quantize_4bit(
        matrix, blocksize=64, quant_type=kind, compress_statistics=double_quant
    )
    parts = {f"w.{k}": v for k, v in state.as_dict(packed=True).items()}
    ours = read_quantized(Tensors(parts | {"w": packed}), "w", kind)
    assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantising_is_right_at_any_width(shape: tuple[int, int], double_quant: bool) -> None:
    matrix = random(shape)
    reader = quantized(matrix, FourBit(double_quant=double_quant))
    ours = read_quantized(reader, "w", "nf4").dequantize()
    blocks = torch.nn.functional.pad(matrix.flatten(), (0, -matrix.numel() % 64)).view(-1, 64)
    widest_gap = (1 - 0.6961928) / 2
    bound = blocks.abs().amax(1) * (widest_gap + (0.03 if double_quant else 1e-6))
    error = torch.nn.functional.pad((ours - matrix).flatten().abs(), (0, -matrix.numel() % 64))
    assert (error.view(-1, 64) <= bound[:, None]).all()


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32], ids=str)
def test_codes_stored_in_another_dtype_are_read(storage: torch.dtype) -> None:
    reader = quantized(random((64, 64)), FourBit())
    expected = read_quantized(reader, "w", "nf4").packed
    reader.tensors["w"] = reader.tensors["w"].flatten().view(storage)[:, None]
    assert torch.equal(read_quantized(reader, "w", "nf4").packed, expected)


def test_double_quantisation_of_scales_is_undone_as_bitsandbytes_does() -> None:
    scales = random((1, 1000)).flatten().abs()
    offset = scales.mean()
    codes, state = bnb.quantize_blockwise(scales - offset, blocksize=256)
    ours = undo_double_quantization(
        codes, codebook=state.code, absmax=state.absmax, block_size=256, offset=float(offset)
    )
    assert torch.equal(ours, bnb.dequantize_blockwise(codes, state) + offset)


@pytest.mark.parametrize("width", [64, 192, 96, 7])
@pytest.mark.parametrize("rows", [(0, 1), (5, 2, 2), (7,)], ids=str)
def test_selected_rows_equal_rows_of_the_dense_matrix(width: int, rows: tuple[int, ...]) -> None:
    weight = read_quantized(quantized(random((8, width)), FourBit()), "w", "nf4")
    selected = select_rows(weight, rows)
    dense = selected.dequantize() if isinstance(selected, Quantized4Bit) else selected
    assert torch.equal(dense, weight.dequantize()[list(rows)])


def test_rows_of_whole_blocks_stay_quantised() -> None:
    weight = read_quantized(quantized(random((8, 128)), FourBit()), "w", "nf4")
    assert isinstance(select_rows(weight, (1, 3)), Quantized4Bit)


def test_kind_of_a_dense_tensor_is_none() -> None:
    assert quantized_kind({"w": (4, 4)}, "w") is None


def test_missing_part_is_named() -> None:
    reader = quantized(random((8, 64)), FourBit(double_quant=True))
    del reader.tensors["w.nested_absmax"]
    with pytest.raises(CheckpointError, match=r"missing tensors: w\.nested_absmax"):
        read_quantized(reader, "w", "nf4")


def test_too_few_codes_are_refused() -> None:
    reader = quantized(random((8, 64)), FourBit())
    reader.tensors["w"] = reader.tensors["w"][:-1]
    with pytest.raises(CheckpointError, match=r"must have \(256, 8, 16\) values, got \(255, 8, 16"):
        read_quantized(reader, "w", "nf4")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (b"{", "unreadable 4-bit state"),
        (b"[]", "unreadable 4-bit state"),
        (b'{"shape": [8], "blocksize": 64}', "unreadable 4-bit state"),
        (b'{"shape": [8, 64], "blocksize": 0}', "sizes below 1"),
    ],
    ids=["cut", "list", "shape", "block-size"],
)
def test_damaged_state_is_refused(state: bytes, message: str) -> None:
    reader = quantized(random((8, 64)), FourBit())
    reader.tensors["w.quant_state.bitsandbytes__nf4"] = torch.tensor(list(state)).byte()
    with pytest.raises(CheckpointError, match=message):
        read_quantized(reader, "w", "nf4")


def test_unknown_quant_type_is_refused() -> None:
    with pytest.raises(CheckpointError, match="quant_type must be 'nf4' or 'fp4', got 'int4'"):
        FourBit(quant_type="int4")  # type: ignore[arg-type]
