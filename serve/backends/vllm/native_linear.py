"""Multiply with matrices of any format by the native CPU kernels, one linear at a time."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from models.kernels.native.executor import NativeExecutor
from models.kernels.native.picker import NativePicker
from models.program import LOGITS, LinearOp, Piece, Program, TapOp
from models.weights import Matrix
from serve.backends.vllm.packed_linear import MakeMultiply, Multiply


def make_native_multiply(kernels: str, cores: Sequence[int]) -> MakeMultiply:
    """Return what prepares matrices for the native kernels; all share one pool of threads.

    Args:
        kernels: "native" or "auto" takes the fastest; else the name of instructions.
        cores: that the threads run on, one each; none: those that this process may use.
    """
    first: list[NativeExecutor] = []

    def multiply_with(matrix: Matrix) -> Multiply:
        base = first[0] if first else None
        executor = _make_executor(_program_of(matrix), kernels, cores, base)
        first[:] = first or [executor]
        num_outputs = matrix.shape[0]

        def multiply(x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1])
            out = executor.apply_head(rows) if len(rows) else x.new_zeros(0, num_outputs)
            return out.view(*x.shape[:-1], num_outputs)

        return multiply

    def make(matrices: Sequence[Matrix]) -> Multiply:
        products = [multiply_with(matrix) for matrix in matrices]
        if len(products) == 1:
            return products[0]
        return lambda x: torch.cat([product(x) for product in products], dim=-1)

    return make


def _program_of(matrix: Matrix) -> Program:
    """Return the program whose LM head the matrix is."""
    head = LinearOp(
        src="x", dst=LOGITS, prologue=None, in_features=matrix.shape[1],
        pieces=(Piece(weight=matrix, bias=None, offset=0),), selects_rows=True,
    )  # fmt: skip
    return Program(
        ops=(TapOp(src="x", index=0), head), widths={"x": matrix.shape[1]},
        inv_freq=torch.empty(0), rotary_scale=1.0, num_layers=0, vocab_size=matrix.shape[0],
    )  # fmt: skip


def make_native_picker(kernels: str, cores: Sequence[int]) -> NativePicker:
    """Return what takes tokens from logits; arguments as for `make_native_multiply`."""
    return _make_executor(_program_of(torch.zeros(1, 16)), kernels, cores).make_picker()


def _make_executor(
    program: Program, kernels: str, cores: Sequence[int], base: NativeExecutor | None = None
) -> NativeExecutor:
    """Make an executor, the first one with threads on the cores.

    vLLM has bound this thread to one core, and those that it starts would share that.
    """
    bound = os.sched_getaffinity(0)
    wanted = set(cores) or bound
    os.sched_setaffinity(0, wanted)
    try:
        name = "auto" if kernels == "native" else kernels
        return NativeExecutor(program, kernels=name, num_threads=len(wanted), base=base)
    finally:
        os.sched_setaffinity(0, bound)
