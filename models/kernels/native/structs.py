"""The native executor's numbers and structures, field by field as in `cpp/program.h`."""

import ctypes
from typing import ClassVar

import torch

_P, _I, _F = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float

PANEL = 16
FORMATS = {
    "codes4": 0, "codes8": 1, torch.float32: 2, torch.bfloat16: 3, torch.float16: 4,
    "q4_0": 5, "q4_1": 6, "q5_0": 7, "q5_1": 8, "q8_0": 9, "q4_k": 10, "q5_k": 11, "q6_k": 12,
    "iq4_nl": 13,
}  # fmt: skip
INPUT_KINDS = {"floats": 0, "words": 1, "byte": 2, "two_bytes": 3}
CACHE_FORMATS = {torch.float32: 0, torch.float16: 1, torch.int8: 2}
OP_KINDS = {"embed": 0, "linear": 1, "attention": 2, "tap": 3}
PROLOGUES = {"plain": 0, "rms_norm": 1, "layer_norm": 2, "activation": 3, "gated_activation": 4}
POOLS = {None: 0, "max": 1, "avg": 2}
FORK_PIECES = 3  # kForkPieces
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}


class NativePiece(ctypes.Structure):
    """`Piece` in program.h."""

    _fields_: ClassVar = [
        ("data", _P), ("bias", _P), ("codebook", _P), ("format", _I), ("outputs", _I),
        ("dst_offset", _I), ("reserved", _I),
    ]  # fmt: skip


class NativeOp(ctypes.Structure):
    """`Op` in program.h."""

    _fields_: ClassVar = [
        *((name, _P) for name in (
            "pieces", "norm_weight", "norm_bias", "gather", "scatter", "q_norm", "k_norm",
            "table", "position_table")),
        *((name, _I) for name in (
            "kind", "prologue", "activation", "num_pieces", "group", "src", "dst", "inputs",
            "norm_width", "accumulate", "select_rows", "layer", "num_heads", "num_kv_heads",
            "head_dim", "rotary_dim", "table_format", "position_format", "position_offset")),
        ("eps", _F), ("scale", _F), ("input_kind", _I),
    ]  # fmt: skip


class NativeSide(ctypes.Structure):
    """`Side` in program.h."""

    _fields_: ClassVar = [
        *((name, _P) for name in (
            "downs", "ops", "op_starts", "up", "gates", "base_share", "inv_freq", "widths")),
        *((name, _I) for name in (
            "num_buffers", "num_layers", "width", "hidden", "pool", "rotary_dim", "max_inputs")),
        ("rotary_scale", _F),
    ]  # fmt: skip


class NativeSideEntry(ctypes.Structure):
    """`SideEntry` in program.h."""

    _fields_: ClassVar = [("side", _P), ("k_cache", _P), ("v_cache", _P)]


class NativeDelta(ctypes.Structure):
    """`Delta` in program.h."""

    _fields_: ClassVar = [("right", _P), ("left", _P), ("rank", _I), ("reserved", _I)]


class NativeFork(ctypes.Structure):
    """`Fork` in program.h."""

    _fields_: ClassVar = [("deltas", _P), ("first_op", _I), ("max_rank", _I)]


class NativeStep(ctypes.Structure):
    """`Step` in program.h."""

    _fields_: ClassVar = [
        *((name, _P) for name in (
            "token_ids", "positions", "query_starts", "context_lens", "block_tables",
            "output_rows", "write_starts", "k_cache", "v_cache", "inv_freq", "sides",
            "side_sequences", "side_block_tables", "side_write_starts", "side_scales", "forks",
            "fork_outputs", "fork_sequences", "fork_scales", "states",
            "final_states", "logits", "taps")),
        *((name, _I) for name in (
            "num_tokens", "num_sequences", "num_outputs", "block_table_stride", "cache_format",
            "num_sides", "side_block_table_stride", "first_op", "last_op", "first_tap")),
        ("rotary_scale", _F), ("num_forks", _I),
    ]  # fmt: skip


# In the order in which the library tells their layout.
STRUCTURES = (
    NativePiece, NativeOp, NativeSide, NativeSideEntry, NativeDelta, NativeFork, NativeStep,
)  # fmt: skip


def float_format(dtype: torch.dtype) -> int:
    """Return the kernels' number of a float type.

    Raises:
        ValueError: not float32, bfloat16 or float16.
    """
    if dtype not in FORMATS:
        raise ValueError(f"native kernels read float32, bfloat16 and float16, not {dtype}")
    return FORMATS[dtype]
