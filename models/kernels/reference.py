"""Run a program with plain torch operations, on any device.

This is what every other executor is held against.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from models.batch import PackedBatch
from models.kv_cache import KVCache
from models.program import LOGITS, Activate, AttentionOp, EmbedOp, LinearOp, Norm, Program
from models.spec import Activation, DecoderSpec
from models.weights import Matrix, dense

Attend = Callable[[AttentionOp, Tensor, Tensor, Tensor], Tensor]
Linear = Callable[[Tensor, Matrix], Tensor]
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


def run_program(
    program: Program,
    token_ids: Tensor,
    positions: Tensor,
    output_rows: Tensor,
    *,
    attend: Attend,
    linear: Linear = apply_linear,
    taps: Tensor | None = None,
) -> Tensor:
    """Compute a program with torch operations.

    Args:
        program: on the device of the other tensors.
        token_ids, positions: (T,) int64.
        output_rows: (L,) int64.
        attend: stores keys and values and returns what the queries attend to.
        linear: multiplies rows with a weight.
        taps: see `Decoder.forward`.

    Returns:
        (L, V) float32 logits.
    """
    angles = positions[:, None].float() * program.inv_freq
    cos, sin = angles.cos() * program.rotary_scale, angles.sin() * program.rotary_scale
    buffers: dict[str, Tensor] = {}
    for op in program.ops:
        if isinstance(op, EmbedOp):
            x = op.table[token_ids].float()
            if op.positions_table is not None:
                x = x + op.positions_table[positions + op.positions_offset].float()
            buffers[op.dst] = x
        elif isinstance(op, LinearOp):
            _run_linear(op, buffers, output_rows, program.widths, linear)
        elif isinstance(op, AttentionOp):
            buffers[op.dst] = attend(op, *_split_heads(op, buffers[op.src], cos, sin))
        elif taps is not None:
            taps[op.layer] = buffers[op.src]
    return buffers[LOGITS]


def _run_linear(
    op: LinearOp,
    buffers: dict[str, Tensor],
    output_rows: Tensor,
    widths: Mapping[str, int],
    linear: Linear,
) -> None:
    x = buffers[op.src]
    if op.selects_rows:
        x = x[output_rows]
    if isinstance(op.prologue, Norm):
        x = apply_norm(x, op.prologue)
    elif isinstance(op.prologue, Activate):
        x = apply_activation(x[:, : op.in_features * (1 + op.prologue.is_gated)], op.prologue)
    else:
        x = x[:, : op.in_features]
    if op.dst != LOGITS and op.dst not in buffers:
        buffers[op.dst] = x.new_zeros(len(x), widths[op.dst])
    for piece in op.pieces:
        out = linear(x, piece.weight)
        if piece.bias is not None:
            out = out + piece.bias
        columns = torch.arange(out.shape[1], device=x.device) + piece.offset
        if op.scatter is not None:
            columns = op.scatter.long()[columns]
        if op.dst == LOGITS:
            buffers[LOGITS] = out
        elif op.accumulate:
            buffers[op.dst] = buffers[op.dst].index_add(1, columns, out)
        else:
            buffers[op.dst] = buffers[op.dst].index_copy(1, columns, out)


def _split_heads(
    op: AttentionOp, qkv: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated (T, H, E) queries, (T, K, E) keys and values."""
    heads = qkv[:, : (op.num_heads + 2 * op.num_kv_heads) * op.head_dim]
    q, k, v = heads.view(len(qkv), -1, op.head_dim).split(
        [op.num_heads, op.num_kv_heads, op.num_kv_heads], dim=1
    )
    if op.q_norm is not None and op.k_norm is not None:
        q = F.rms_norm(q, (op.head_dim,), op.q_norm, op.eps)
        k = F.rms_norm(k, (op.head_dim,), op.k_norm, op.eps)
    if op.rotary_dim:
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    return q, k, v


class ReferenceExecutor:
    """Plain torch executor.

    Args:
        program: what to run; its tensors must be on `device`.
        device: where to compute.
    """

    name = "reference"

    def __init__(self, program: Program, device: str = "cpu") -> None:
        self._program = program
        self._device = torch.device(device)

    def make_cache(
        self, spec: DecoderSpec, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> KVCache:
        """Return an empty cache of (num_blocks, block_size, K, E) tensors."""
        return make_plain_cache(spec, num_blocks, block_size, dtype, self._device)

    def forward(self, batch: PackedBatch, cache: KVCache, taps: Tensor | None = None) -> Tensor:
        """Run one step; see `Decoder.forward`."""
        token_ids, positions, rows = (
            t.to(self._device).long()
            for t in (batch.token_ids, batch.positions, batch.output_rows)
        )

        def attend(op: AttentionOp, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend_sequences(op, q, k, v, batch, cache)

        return run_program(
            self._program, token_ids, positions, rows, attend=attend, taps=taps
        )


def make_plain_cache(
    spec: DecoderSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> KVCache:
    """Return an empty cache of (num_blocks, block_size, K, E) tensors."""
    shapes = [
        (num_blocks, block_size, layer.num_key_value_heads, layer.head_dim)
        for layer in spec.layers
    ]
    keys, values = (
        [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes] for _ in range(2)
    )
    return KVCache(keys=keys, values=values, num_blocks=num_blocks, block_size=block_size)


def attend_sequences(
    op: AttentionOp, q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, cache: KVCache
) -> Tensor:
    """Store a step's keys and values in a plain cache and attend, sequence by sequence.

    Args:
        op: the attention.
        q: (T, H, E); k, v: (T, K, E).
        batch: where each token belongs.
        cache: from `make_plain_cache`.

    Returns:
        (T, H * E).
    """
    keys, values = cache.keys[op.layer], cache.values[op.layer]
    out, starts = [], batch.query_starts.tolist()
    for b, context in enumerate(batch.context_lens.tolist()):
        tokens = slice(starts[b], starts[b + 1])
        positions = batch.positions[tokens].to(q.device).long()
        table = batch.block_tables[b].to(q.device).long()
        where = (table[positions // cache.block_size], positions % cache.block_size)
        keys[where] = k[tokens].detach().to(keys.dtype)
        values[where] = v[tokens].detach().to(values.dtype)
        blocks = table[: -(-context // cache.block_size)]
        seen_k = keys[blocks].flatten(0, 1)[:context].to(q.dtype)
        seen_v = values[blocks].flatten(0, 1)[:context].to(q.dtype)
        mask = torch.arange(context, device=q.device) <= positions[:, None]
        attended = F.scaled_dot_product_attention(
            q[tokens].transpose(0, 1)[None], seen_k.transpose(0, 1)[None],
            seen_v.transpose(0, 1)[None], attn_mask=mask, scale=op.scale, enable_gqa=True,
        )  # fmt: skip
        out.append(attended[0].transpose(0, 1).reshape(-1, op.num_heads * op.head_dim))
    return torch.cat(out)
