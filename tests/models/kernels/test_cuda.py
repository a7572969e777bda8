"""The parts of the CUDA executor that need no GPU; see also test_cuda_decoder.py."""

import pytest
import torch
from torch import Tensor

from models.decoder import Decoder
from models.kernels.cuda.executor import CudaExecutor, place_program
from models.kernels.cuda.graphs import attend_decode
from models.kernels.plain_cache import make_plain_cache
from models.kernels.reference.operations import run_program
from models.program import AttentionOp, LinearOp, build_program
from models.q4_1 import quantize_q4_1
from models.weights import Quantized4Bit, dense, quantize_8bit
from tests.models.kernels.random_decoders import KINDS, make_decoder_parts, pack_batch, run_alone

SEQUENCES = [[(7 * i + 3 * s) % 100 for i in range(n)] for s, n in enumerate((37, 5, 64))]
TABLES = [[3, 1, 5, 7], [0, 9, 9, 9], [2, 4, 6, 8]]


@pytest.mark.parametrize("kind", KINDS)
def test_decode_attention_without_host_values_equals_reference(kind: str) -> None:
    """What a graph captures, run on the CPU: prompts go through the reference first."""
    spec, weights = make_decoder_parts(kind)
    program = build_program(spec, weights, _head(weights))
    reference = Decoder(spec, weights, kernels="reference", head="dense")
    cache = make_plain_cache(spec, 12, 16, torch.float32, torch.device("cpu"))
    lengths = (30, 3, 62)
    reference.forward(pack_batch(SEQUENCES, TABLES, [(0, n) for n in lengths]), cache)
    positions, tables = torch.tensor(lengths), torch.tensor(TABLES)

    def attend(op: AttentionOp, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_decode(op, q, k, v, positions, tables, cache)

    tokens = torch.tensor([s[n] for s, n in zip(SEQUENCES, lengths, strict=True)])
    logits = run_program(program, tokens, positions, torch.arange(3), attend=attend)
    for row, (sequence, length) in zip(logits, zip(SEQUENCES, lengths, strict=True), strict=True):
        expected = run_alone(reference, sequence[: length + 1])[-1]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)


def test_cuda_executor_prefills_with_bitsandbytes_matmul() -> None:
    """bitsandbytes' 4-bit matmul runs on the CPU too, right only where widths are whole blocks."""
    spec, weights = make_decoder_parts("llama", is_quantized=True)
    wide = {n: w for n, w in weights.items() if ".down." not in n}
    wide |= {n: torch.zeros(w.shape) for n, w in weights.items() if ".down." in n}
    executor = CudaExecutor(build_program(spec, wide, _head(wide)), "cpu", torch.float32)
    cache = executor.make_cache(spec, 4, 16, torch.float32)
    logits = executor.forward(pack_batch(SEQUENCES[:1], [[2, 0, 1, 3]], [(0, 37)]), cache)
    expected = run_alone(Decoder(spec, wide, kernels="reference", head="dense"), SEQUENCES[0])
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_cuda_cache_refuses_int8() -> None:
    spec, weights = make_decoder_parts("llama")
    executor = CudaExecutor(build_program(spec, weights, _head(weights)), "cpu", torch.float32)
    with pytest.raises(ValueError, match="float16 or float32 on CUDA, not torch.int8"):
        executor.make_cache(spec, 4, 16, torch.int8)


def test_place_program_makes_all_but_4_bit_matrices_dense() -> None:
    spec, weights = make_decoder_parts("llama", is_quantized=True)
    program = build_program(spec, weights, quantize_8bit(_head(weights)))
    placed = place_program(program, torch.device("cpu"), torch.bfloat16)
    linears = [op for op in placed.ops if isinstance(op, LinearOp)]
    kinds = {type(piece.weight) for op in linears[:-1] for piece in op.pieces}
    assert kinds == {Quantized4Bit}
    head = linears[-1].pieces[0].weight
    assert isinstance(head, Tensor)
    assert head.dtype == torch.bfloat16


def test_place_program_unpacks_blocks_to_16_bits_and_a_tied_head_once() -> None:
    spec, weights = make_decoder_parts("llama")
    blocks = {
        name: quantize_q4_1(dense(weight)) if len(weight.shape) == 2 else weight
        for name, weight in weights.items()
    }
    head = blocks.get("head.weight", blocks["embed.weight"])
    program = build_program(spec, blocks | {"embed.weight": head}, head)
    placed = place_program(program, torch.device("cpu"), torch.bfloat16)
    for op, source in zip(placed.ops, program.ops, strict=True):
        if isinstance(op, LinearOp) and isinstance(source, LinearOp):
            for piece, packed in zip(op.pieces, source.pieces, strict=True):
                assert torch.equal(piece.weight, dense(packed.weight).bfloat16())
    assert placed.embed.table is placed.head.pieces[0].weight


def _head(weights: dict) -> Tensor:  # type: ignore[type-arg]
    head = weights.get("head.weight", weights["embed.weight"])
    assert isinstance(head, Tensor)
    return head
