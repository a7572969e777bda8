"""Side networks of a step, computed layer by layer beside a model that hands out its hidden states.

What each computes is `models.kernels.reference.operations`; attention, over whatever cache, is the
caller's, and runs once a layer for all side networks of one form.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.reference.operations import (
    apply_downsample,
    blend_side,
    rotary_angles,
    run_ops,
    split_heads,
)
from models.program import AttentionOp, Op
from models.side import SideProgram

Attend: TypeAlias = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Attention of layer i over the tokens of a step: (T, H, E) queries, (T, K, E) keys and values, no
softmax scale applied yet, to (T, H, E)."""


@dataclass(slots=True, eq=False)
class SideRun:
    """A side network on some tokens of a step.

    Attributes:
        program: the side network.
        scale: how much of it, above 0.
        rows: (R,) int64, its tokens.
        angles: cos and sin of their positions.
        stream: (R, side width) float32, the side network's state so far.
    """

    program: SideProgram
    scale: float
    rows: Tensor
    angles: tuple[Tensor, Tensor] | None = None
    stream: Tensor | None = None


class SideStack:
    """Side networks with attention of one form, in the course of a step.

    Args:
        attend: their attention.
    """

    def __init__(self, attend: Attend) -> None:
        self._attend = attend
        self.runs: Sequence[SideRun] = ()

    def begin(self, runs: Sequence[SideRun], positions: Tensor) -> None:
        """Start a step.

        Args:
            runs: side networks, of which no token has more than one.
            positions: (T,) positions of all tokens.
        """
        self.runs = runs
        for run in runs:
            at = positions[run.rows]
            run.angles = rotary_angles(run.program.inv_freq, run.program.rotary_scale, at)
            run.stream = None

    def tap(self, index: int, hidden: Tensor) -> None:
        """Take what the model leaves: 0 is the embedding, i + 1 the output of layer i.

        Args:
            index: which; they come in order.
            hidden: (T, D), of all tokens.
        """
        mixed = []
        for run in self.runs:
            network = run.program.network
            down = network.downsamples[index]
            narrow = apply_downsample(hidden[run.rows].float(), down, network.spec.hidden_size)
            if run.stream is None:
                run.stream = narrow
            else:
                gate = network.gates[index - 1]
                mixed.append({"x": torch.lerp(narrow, run.stream, gate)})
        if mixed:
            self._run_layer(index - 1, mixed, len(hidden))

    def blend(self, normed: Tensor) -> Tensor:
        """Return the final states with the side networks' blended in.

        Args:
            normed: (T, D), what the LM head reads of the model; not changed.
        """
        if not self.runs:
            return normed
        blended = normed.clone()
        for run in self.runs:
            assert run.stream is not None
            states = normed[run.rows].float()
            out = blend_side(run.program, states, run.stream, run.scale)
            blended[run.rows] = out.to(normed.dtype)
        return blended

    def _run_layer(self, index: int, mixed: list[dict[str, Tensor]], num_tokens: int) -> None:
        """Compute layer `index` of every run; its input is `mixed`."""
        q = k = v = None
        for run, buffers in zip(self.runs, mixed, strict=True):
            before, op, _ = _split(run.program, index)
            assert run.angles is not None
            run_ops(before, buffers, run.program.widths, run.angles, attend=_never)
            parts = split_heads(op, buffers[op.src], *run.angles)
            if q is None or k is None or v is None:
                q, k, v = (x.new_zeros(num_tokens, *x.shape[1:]) for x in parts)
            for whole, part in zip((q, k, v), parts, strict=True):
                whole[run.rows] = part
        assert q is not None
        assert k is not None
        assert v is not None
        attended = self._attend(index, q, k, v).flatten(1)
        for run, buffers in zip(self.runs, mixed, strict=True):
            _, op, after = _split(run.program, index)
            assert run.angles is not None
            buffers[op.dst] = attended[run.rows]
            run_ops(after, buffers, run.program.widths, run.angles, attend=_never)
            run.stream = buffers["x"]


def _split(program: SideProgram, index: int) -> tuple[tuple[Op, ...], AttentionOp, tuple[Op, ...]]:
    """Return the operations of a layer before its attention, that, and those after it."""
    ops = program.layers[index]
    at = next(i for i, op in enumerate(ops) if isinstance(op, AttentionOp))
    attention = ops[at]
    assert isinstance(attention, AttentionOp)
    return ops[:at], attention, ops[at + 1 :]


def _never(*_: object) -> Tensor:
    raise AssertionError("attention is computed apart")


class PackedHeads:
    """Narrow heads side by side in heads that attention kernels take.

    Kernels want heads of at least 32 channels; a side network's have 4 to 16. Several KV heads
    become one, and a query is 0 but for the channels of its own. The result is the same, and the
    cache holds few zeros.

    Args:
        num_heads, num_kv_heads, head_dim: of the side network.
        size: width of a packed head, at least `head_dim`.

    Attributes:
        num_kv_heads: packed heads.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, size: int) -> None:
        self._head_dim = head_dim
        self.size = size
        self._group = max(
            g for g in range(1, num_kv_heads + 1)
            if num_kv_heads % g == 0 and (g == 1 or g * head_dim <= size)
        )  # fmt: skip
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads // self._group
        slots = torch.arange(num_heads) // (num_heads // num_kv_heads) % self._group
        # (H, 1, group): which run of channels is a query head's own.
        self._one_hot = F.one_hot(slots, self._group).float()[:, None]

    def pack_queries(self, q: Tensor) -> Tensor:
        """Return (T, H, size) of (T, H, E) queries."""
        self._one_hot = self._one_hot.to(q.device)
        spread = q[..., None] * self._one_hot  # (T, H, E, group)
        return self._pad(spread.transpose(-1, -2).flatten(-2))

    def pack_keys(self, k: Tensor) -> Tensor:
        """Return (T, packed heads, size) of (T, K, E) keys or values."""
        return self._pad(k.reshape(len(k), self.num_kv_heads, -1))

    def unpack(self, out: Tensor) -> Tensor:
        """Return (T, H, E) of the (T, H, size) result."""
        own = out[..., : self._group * self._head_dim]
        own = own.view(*out.shape[:-1], self._group, self._head_dim)
        return (own * self._one_hot.transpose(-1, -2)).sum(-2)

    def _pad(self, heads: Tensor) -> Tensor:
        return F.pad(heads, (0, self.size - heads.shape[-1]))
