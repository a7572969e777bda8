"""Compute a program and a side network with plain torch operations, on any device.

This is what every other executor is held against. It is also what trains: every function is
differentiable in the tensors of a side network (`adapters.qst.network`), and a `Hook` lets a search
for channels (`adapters.disp.masked`) and calibration (`adapters.calibration`) into the same walk.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models.fork import Delta, ForkProgram
from models.program import (
    Activate,
    AttentionOp,
    EmbedOp,
    LinearOp,
    Norm,
    Op,
    Piece,
    Program,
    TapOp,
)
from models.side import Downsample, SideProgram
from models.spec import Activation
from models.weights import Matrix, dense, select_rows

Attend = Callable[[AttentionOp, Tensor, Tensor, Tensor], Tensor]
Linear = Callable[[Tensor, Matrix], Tensor]


class Hook(Protocol):
    """Sees, and may change, what goes into linears and what comes out.

    That is all that a selection of channels needs: what a block reads, what it adds to the
    residual stream, and the middle of the MLP all are the input or the output of a linear.
    """

    def before(self, op: LinearOp, x: Tensor) -> Tensor:
        """Return what `op` multiplies in place of x.

        Args:
            op: about to be computed; `op.names` says which linears it is.
            x: (T, in_features), after the norm or activation.
        """
        ...

    def after(self, op: LinearOp, out: Tensor) -> Tensor:
        """Return what `op` stores or adds in place of `out`, (T, outputs) side by side."""
        ...


_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def apply_norm(x: Tensor, norm: Norm) -> Tensor:
    """Normalise the rows of x.

    Args:
        x: (T, width) float32.
        norm: what to apply.

    Returns:
        (T, kept) float32.
    """
    if norm.bias is None:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)
        x = x * scale * norm.weight
    else:
        x = F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, norm.eps)
    return x if norm.indices is None else x[:, norm.indices.long()]


def apply_activation(x: Tensor, activate: Activate) -> Tensor:
    """Apply an MLP activation to (T, width) rows; a gated one halves the width."""
    function = _ACTIVATIONS[activate.kind]
    if not activate.is_gated:
        return function(x)
    gate, up = x.chunk(2, dim=-1)
    return function(gate) * up


def apply_linear(x: Tensor, weight: Matrix) -> Tensor:
    """Multiply (T, in_features) float32 rows with a weight of any kind, in float32."""
    return F.linear(x, dense(weight))


def apply_rotary(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading channels of each head, half against half.

    Args:
        heads: (T, H, E) float32.
        cos, sin: (T, rotary_dim / 2) float32.
    """
    half = cos.shape[-1]
    a, b, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def rotary_angles(inv_freq: Tensor, scale: float, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (T, rotary_dim / 2) float32, of (T,) positions."""
    angles = positions[:, None].float() * inv_freq
    return angles.cos() * scale, angles.sin() * scale


def run_ops(
    ops: Iterable[Op],
    buffers: dict[str, Tensor],
    widths: Mapping[str, int],
    angles: tuple[Tensor, Tensor],
    *,
    attend: Attend,
    linear: Linear = apply_linear,
    hook: Hook | None = None,
) -> None:
    """Compute operations of layers over named buffers of (T, width) rows, in place of the old rows.

    Args:
        ops: linears, attention.
        buffers: by name; entries are replaced, tensors are not changed.
        widths: of the buffers.
        angles: cos and sin of the rows' positions.
        attend: stores keys and values and returns what the queries attend to.
        linear: multiplies rows with a weight.
        hook: called around each linear.
    """
    for op in ops:
        if isinstance(op, LinearOp):
            _run_linear(op, buffers, widths, linear, hook)
        elif isinstance(op, AttentionOp):
            buffers[op.dst] = attend(op, *split_heads(op, buffers[op.src], *angles))


def apply_embed(op: EmbedOp, token_ids: Tensor, positions: Tensor) -> Tensor:
    """Return the (T, D) float32 embedding of (T,) tokens at (T,) positions."""
    x = dense(select_rows(op.table, token_ids))
    if op.positions_table is None:
        return x
    return x + op.positions_table[positions + op.positions_offset].float()


def walk_layers(
    program: Program,
    token_ids: Tensor,
    positions: Tensor,
    *,
    attend: Attend,
    linear: Linear = apply_linear,
    hook: Hook | None = None,
    buffers: dict[str, Tensor] | None = None,
) -> Iterator[Tensor]:
    """Yield the (T, D) embedding, then what each layer leaves of the residual stream.

    Args:
        program: on the device of the other tensors.
        token_ids, positions: (T,) int64.
        attend, linear, hook: as for `run_ops`.
        buffers: receives the rows, by name; from one layer to the next only the stream is kept.
    """
    angles = rotary_angles(program.inv_freq, program.rotary_scale, positions)
    buffers = {} if buffers is None else buffers
    for op in program.ops:
        if isinstance(op, EmbedOp):
            buffers[op.dst] = apply_embed(op, token_ids, positions)
        elif isinstance(op, TapOp):
            stream = buffers[op.src]
            buffers.clear()
            buffers[op.src] = stream
            yield stream
        elif op is not program.head:
            run_ops((op,), buffers, program.widths, angles, attend=attend, linear=linear, hook=hook)


def apply_prologue(op: LinearOp, x: Tensor) -> Tensor:
    """Make (T, width) rows of a buffer ready for a linear: (T, in_features)."""
    if isinstance(op.prologue, Norm):
        return apply_norm(x, op.prologue)
    if isinstance(op.prologue, Activate):
        return apply_activation(x[:, : op.in_features * (1 + op.prologue.is_gated)], op.prologue)
    return x[:, : op.in_features]


def apply_head(program: Program, states: Tensor, *, linear: Linear = apply_linear) -> Tensor:
    """Return the (T, V) logits of normed (T, D) states."""
    outs = [_apply_piece(states, piece, linear) for piece in program.head.pieces]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def run_program(
    program: Program,
    token_ids: Tensor,
    positions: Tensor,
    output_rows: Tensor,
    *,
    attend: Attend,
    linear: Linear = apply_linear,
    taps: Tensor | None = None,
    states: Tensor | None = None,
) -> Tensor:
    """Compute a program with torch operations.

    Args:
        program: on the device of the other tensors.
        token_ids, positions: (T,) int64.
        output_rows: (L,) int64.
        attend, linear: as for `run_ops`.
        taps, states: see `Decoder.forward`.

    Returns:
        (L, V) float32 logits.
    """
    buffers: dict[str, Tensor] = {}
    layers = walk_layers(
        program, token_ids, positions, attend=attend, linear=linear, buffers=buffers
    )
    for i, state in enumerate(layers):
        if taps is not None:
            taps[i] = state
    ready = apply_prologue(program.head, buffers[program.head.src][output_rows])
    if states is not None:
        states.copy_(ready)
    return apply_head(program, ready, linear=linear)


def _apply_piece(x: Tensor, piece: Piece, linear: Linear) -> Tensor:
    out = linear(x, piece.weight)
    return out if piece.bias is None else out + piece.bias


def _run_linear(
    op: LinearOp,
    buffers: dict[str, Tensor],
    widths: Mapping[str, int],
    linear: Linear,
    hook: Hook | None,
) -> None:
    x = apply_prologue(op, buffers[op.src])
    if hook is not None:
        x = hook.before(op, x)
    outs = [_apply_piece(x, piece, linear) for piece in op.pieces]
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
    if hook is not None:
        out = hook.after(op, out)
    if op.scatter is None and out.shape[1] == widths[op.dst]:
        buffers[op.dst] = buffers[op.dst] + out if op.accumulate else out
        return
    if op.dst not in buffers:
        buffers[op.dst] = out.new_zeros(len(out), widths[op.dst])
    places = zip(op.pieces, outs, strict=True)
    columns = torch.cat(
        [torch.arange(part.shape[1], device=out.device) + piece.offset for piece, part in places]
    )
    if op.scatter is not None:
        columns = op.scatter.long()[columns]
    add = buffers[op.dst].index_add if op.accumulate else buffers[op.dst].index_copy
    buffers[op.dst] = add(1, columns, out)


def apply_downsample(states: Tensor, down: Downsample, width: int) -> Tensor:
    """Narrow (T, D) hidden states to (T, width)."""
    if down.pool is not None:
        runs = states.view(len(states), width, -1)
        return runs.amax(-1) if down.pool == "max" else runs.mean(-1)
    assert down.first is not None
    x = F.linear(states, down.first)
    if down.activation is not None:
        x = _ACTIVATIONS[down.activation](x)
    if down.second is not None:
        x = F.linear(x, down.second)
    return x if down.norm is None else apply_norm(x, down.norm)


def run_side(
    program: SideProgram, hidden: Iterable[Tensor], positions: Tensor, *, attend: Attend
) -> Tensor:
    """Compute a side network, as it is trained and as every kernel must; differentiable.

    Args:
        program: on the device of the other tensors.
        hidden: h[0] .. h[N] of the base, (T, D) float32 each, taken one at a time.
        positions: (T,) int64.
        attend: as for `run_ops`, with the side network's heads.

    Returns:
        (T, side width) float32, s[N] before the side network's final norm.
    """
    network = program.network
    width = network.spec.hidden_size
    angles = rotary_angles(program.inv_freq, program.rotary_scale, positions)
    stream: Tensor | None = None
    for i, (state, down) in enumerate(zip(hidden, network.downsamples, strict=True)):
        narrow = apply_downsample(state, down, width).float()
        if stream is None:
            stream = narrow
            continue
        buffers = {"x": torch.lerp(narrow, stream, network.gates[i - 1])}
        run_ops(program.layers[i - 1], buffers, program.widths, angles, attend=attend)
        stream = buffers["x"]
    assert stream is not None
    return stream


def blend_side(
    program: SideProgram, normed: Tensor, side: Tensor, scales: Tensor | float = 1.0
) -> Tensor:
    """Blend the base's normed final states with a side network's.

    Args:
        program: the side network.
        normed: (T, D) float32.
        side: (T, side width) float32 from `run_side`.
        scales: one, or (T, 1), in 0 .. 1: how much of the side network.

    Returns:
        (T, D) float32, what the LM head reads.
    """
    network = program.network
    up = F.linear(apply_norm(side, program.final_norm), network.up, network.up_bias)
    share = network.base_share + (1 - scales) * (1 - network.base_share)
    return share * normed + (1 - share) * up


class _Deltas:
    """Adds what a fork's linears add to the base's."""

    def __init__(self, deltas: Mapping[str, Delta]) -> None:
        self._deltas = deltas
        self._x: Tensor | None = None

    def before(self, op: LinearOp, x: Tensor) -> Tensor:
        self._x = x
        return x

    def after(self, op: LinearOp, out: Tensor) -> Tensor:
        assert self._x is not None
        widths = [piece.weight.shape[0] for piece in op.pieces]
        parts = list(out.split(widths, dim=1))
        for i, name in enumerate(op.names):
            if name in self._deltas:
                delta = self._deltas[name]
                parts[i] = parts[i] + F.linear(F.linear(self._x, delta.right), delta.left)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def run_fork(
    program: ForkProgram,
    states: Tensor,
    positions: Tensor,
    *,
    attend: Attend,
    linear: Linear = apply_linear,
) -> Tensor:
    """Compute a fork, as every kernel must.

    Args:
        program: on the device of the other tensors.
        states: (T, D) float32, h[N - M] of the base.
        positions: (T,) int64.
        attend: gives what queries attend to; it takes the keys and values of the base's cache
            in place of those that it is given, and stores none.
        linear: multiplies rows with a weight of the base.

    Returns:
        (T, D) float32, f[N] before the base's final norm.
    """
    angles = rotary_angles(program.inv_freq, program.rotary_scale, positions)
    for ops in program.layers:
        states = run_fork_layer(program, ops, states, angles, attend=attend, linear=linear)
    return states


def run_fork_layer(
    program: ForkProgram,
    ops: Iterable[Op],
    states: Tensor,
    angles: tuple[Tensor, Tensor],
    *,
    attend: Attend,
    linear: Linear = apply_linear,
) -> Tensor:
    """Compute one layer of a fork; see `run_fork`. Differentiable in states and differences."""
    buffers, deltas = {"x": states}, _Deltas(program.network.deltas)
    run_ops(ops, buffers, program.widths, angles, attend=attend, linear=linear, hook=deltas)
    return buffers["x"]


def split_heads(
    op: AttentionOp, qkv: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated (T, H, E) queries, (T, K, E) keys and values."""
    heads = qkv[:, : (op.num_heads + 2 * op.num_kv_heads) * op.head_dim]
    q, k, v = heads.view(len(qkv), -1, op.head_dim).split(
        [op.num_heads, op.num_kv_heads, op.num_kv_heads], dim=1
    )
    if op.q_norm is not None and op.k_norm is not None:
        q = F.rms_norm(q.float(), (op.head_dim,), op.q_norm, op.eps)
        k = F.rms_norm(k.float(), (op.head_dim,), op.k_norm, op.eps)
    if op.rotary_dim:
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    return q, k, v
