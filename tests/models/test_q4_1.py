"""Rounding to Q4_1 with scales of least error."""

import gguf
import pytest
import torch

from models.q4_1 import quantize_q4_1
from models.weights import QuantizedBlocks, dense


def test_q4_1_blocks_are_read_by_the_gguf_package_and_err_less_than_its_own() -> None:
    matrix = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    kind = gguf.GGMLQuantizationType.Q4_1
    theirs = torch.from_numpy(gguf.quants.quantize(matrix.numpy(), kind))
    ours = quantize_q4_1(matrix)
    assert (ours.shape, ours.kind) == ((64, 96), "Q4_1")
    errors = [
        float((dense(blocks) - matrix).norm())
        for blocks in (ours, QuantizedBlocks(data=theirs, kind="Q4_1"))
    ]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("value", [0.0, 3.0, -0.25], ids=str)
def test_q4_1_of_one_value_is_that_value(value: float) -> None:
    assert torch.equal(dense(quantize_q4_1(torch.full((3, 64), value))), torch.full((3, 64), value))


def test_q4_1_of_values_on_a_line_is_exact() -> None:
    codes = torch.arange(16.0).repeat(2, 4)
    assert torch.equal(dense(quantize_q4_1(codes * 0.125 - 1)), codes * 0.125 - 1)


def test_q4_1_rounds_every_block_for_itself() -> None:
    matrix = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    alone = quantize_q4_1(matrix[5:6])
    assert torch.equal(quantize_q4_1(matrix).data[5:6], alone.data)
