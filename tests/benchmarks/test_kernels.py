"""The kernel benchmark builds programs that compute what it says."""

import pytest
import torch

from benchmarks.kernels import (
    Shapes,
    attention_program,
    copy_matrix,
    decode_batch,
    figure_table,
    linear_program,
    prefill_batch,
    time_executor,
)
from models.kernels.reference.executor import ReferenceExecutor
from models.quantization import quantize_4bit
from models.weights import dense, quantize_8bit

TINY = Shapes(
    hidden_size=64,
    intermediate_size=128,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    vocab_size=128,
    copies=2,
)


@pytest.mark.parametrize("quantize", [quantize_4bit, quantize_8bit], ids=["nf4", "int8"])
def test_copy_matrix_is_equal_and_apart(quantize) -> None:
    weight = quantize(torch.randn(8, 64))
    copied = copy_matrix(weight)
    assert torch.equal(dense(copied), dense(weight))
    codes = "packed" if quantize is quantize_4bit else "codes"
    assert getattr(copied, codes).data_ptr() != getattr(weight, codes).data_ptr()


def test_programs_run_on_an_executor() -> None:
    weights = [quantize_4bit(torch.randn(96, 64)) for _ in range(2)]
    linear = ReferenceExecutor(linear_program(weights, TINY, 3))
    assert time_executor(linear, decode_batch(3, 1), TINY, 2) > 0
    attention = ReferenceExecutor(attention_program(TINY, 20))
    assert time_executor(attention, prefill_batch(20), TINY, 2) > 0


def test_decode_batch_gives_each_row_blocks_of_its_own() -> None:
    batch = decode_batch(3, 20)
    assert batch.block_tables.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert batch.positions.tolist() == [19, 19, 19]


def test_figure_table_leaves_gaps_where_nothing_was_measured() -> None:
    table = figure_table({"qkv, 1 rows": {"native": 1.25, "bitsandbytes": None}})
    assert table.splitlines()[1].split() == ["qkv,", "1", "rows", "1.2", "-", "-", "-"]
