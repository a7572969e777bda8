"""Run a program with plain torch operations, on any device.

This is what every other executor is held against. It is differentiable in the dense weights.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.batch import PackedBatch
from models.kv_cache import KVCache
from models.program import LOGITS, Activate, AttentionOp, EmbedOp, LinearOp, Norm, Program, TapOp
from models.spec import Activation, DecoderSpec
from models.weights import Matrix, dense

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


class ReferenceExecutor:
    """Plain torch executor.

    Args:
        program: what to run; its tensors must be on `device`.
        device: where to compute.
        linear: replaces `apply_linear`.
    """

    name = "reference"

    def __init__(
        self,
        program: Program,
        device: str = "cpu",
        linear: Callable[[Tensor, Matrix], Tensor] = apply_linear,
    ) -> None:
        self._program = program
        self._device = torch.device(device)
        self._linear = linear

    def make_cache(
        self, spec: DecoderSpec, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> KVCache:
        """Return an empty cache of (num_blocks, block_size, K, E) tensors."""
        shapes = [
            (num_blocks, block_size, layer.num_key_value_heads, layer.head_dim)
            for layer in spec.layers
        ]
        make = [
            [torch.zeros(shape, dtype=dtype, device=self._device) for shape in shapes]
            for _ in range(2)
        ]
        return KVCache(keys=make[0], values=make[1], num_blocks=num_blocks, block_size=block_size)

    def forward(self, batch: PackedBatch, cache: KVCache, taps: Tensor | None = None) -> Tensor:
        """Run one step; see `Decoder.forward`."""
        program, device = self._program, self._device
        token_ids, positions = (t.to(device).long() for t in (batch.token_ids, batch.positions))
        angles = positions[:, None].float() * program.inv_freq.to(device)
        cos, sin = angles.cos() * program.rotary_scale, angles.sin() * program.rotary_scale
        rows = batch.output_rows.to(device).long()
        buffers: dict[str, Tensor] = {}
        for op in program.ops:
            if isinstance(op, EmbedOp):
                x = op.table[token_ids].float()
                if op.positions_table is not None:
                    x = x + op.positions_table[positions + op.positions_offset].float()
                buffers[op.dst] = x
            elif isinstance(op, LinearOp):
                self._run_linear(op, buffers, rows)
            elif isinstance(op, AttentionOp):
                buffers[op.dst] = self._attend(op, buffers[op.src], batch, cache, cos, sin)
            elif isinstance(op, TapOp) and taps is not None:
                taps[op.layer] = buffers[op.src]
        return buffers[LOGITS]

    def _run_linear(self, op: LinearOp, buffers: dict[str, Tensor], rows: Tensor) -> None:
        x = buffers[op.src]
        if op.selects_rows:
            x = x[rows]
        if isinstance(op.prologue, Norm):
            x = apply_norm(x, op.prologue)
        elif isinstance(op.prologue, Activate):
            x = apply_activation(x[:, : op.in_features * (1 + op.prologue.is_gated)], op.prologue)
        else:
            x = x[:, : op.in_features]
        if op.dst != LOGITS and not op.accumulate and op.dst not in buffers:
            buffers[op.dst] = x.new_zeros(len(x), self._program.widths[op.dst])
        for piece in op.pieces:
            out = self._linear(x, piece.weight)
            if piece.bias is not None:
                out = out + piece.bias
            columns = torch.arange(out.shape[1], device=x.device) + piece.offset
            if op.scatter is not None:
                columns = op.scatter.to(x.device).long()[columns]
            if op.dst == LOGITS:
                buffers[LOGITS] = out
            elif op.accumulate:
                buffers[op.dst] = buffers[op.dst].index_add(1, columns, out)
            else:
                buffers[op.dst] = buffers[op.dst].index_copy(1, columns, out)

    def _attend(
        self, op: AttentionOp, qkv: Tensor, batch: PackedBatch, cache: KVCache, cos: Tensor,
        sin: Tensor,
    ) -> Tensor:  # fmt: skip
        heads, kv_heads, dim = op.num_heads, op.num_kv_heads, op.head_dim
        q, k, v = (
            part.reshape(len(qkv), -1, dim)
            for part in qkv[:, : (heads + 2 * kv_heads) * dim].split(
                [heads * dim, kv_heads * dim, kv_heads * dim], dim=1
            )
        )
        for_norm = ((q, op.q_norm), (k, op.k_norm))
        q, k = (
            x if w is None else F.rms_norm(x, (dim,), w, op.eps) for x, w in for_norm
        )
        if op.rotary_dim:
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        keys, values = cache.keys[op.layer], cache.values[op.layer]
        out, starts = [], batch.query_starts.tolist()
        for b, context in enumerate(batch.context_lens.tolist()):
            tokens = slice(starts[b], starts[b + 1])
            positions = batch.positions[tokens].long()
            table = batch.block_tables[b].long().to(q.device)
            slots = positions.to(q.device)
            where = (table[slots // cache.block_size], slots % cache.block_size)
            keys[where] = k[tokens].detach().to(keys.dtype)
            values[where] = v[tokens].detach().to(values.dtype)
            blocks = table[: -(-context // cache.block_size)]
            seen_k = keys[blocks].flatten(0, 1)[:context].to(q.dtype)
            seen_v = values[blocks].flatten(0, 1)[:context].to(q.dtype)
            mask = torch.arange(context, device=q.device) <= slots[:, None]
            attended = F.scaled_dot_product_attention(
                q[tokens].transpose(0, 1)[None], seen_k.transpose(0, 1)[None],
                seen_v.transpose(0, 1)[None], attn_mask=mask, scale=op.scale, enable_gqa=True,
            )  # fmt: skip
            out.append(attended[0].transpose(0, 1).reshape(-1, heads * dim))
        return torch.cat(out)
