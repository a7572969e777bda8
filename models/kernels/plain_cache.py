"""A KV cache of plain torch tensors, and attention over it sequence by sequence."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.batch import PackedBatch
from models.kv_cache import KEY_GROUP, KVCache, dequantize_heads, head_bytes, quantize_heads
from models.program import AttentionOp
from models.spec import DecoderSpec


def make_plain_cache(
    spec: DecoderSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> KVCache:
    """Return an empty cache of (num_blocks, block_size, K, E) tensors; int8: with scales behind."""

    def make(which: int) -> list[Tensor]:
        return [
            torch.zeros(
                num_blocks, block_size, layer.num_key_value_heads,
                head_bytes(layer.head_dim, dtype)[which] // dtype.itemsize,
                dtype=dtype, device=device,
            )
            for layer in spec.layers
        ]  # fmt: skip

    keys, values = make(0), make(1)
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
        first = 0 if batch.write_starts is None else int(batch.write_starts[b])
        new = positions >= first
        where = (table[positions // cache.block_size][new], positions[new] % cache.block_size)
        keys[where] = _store(k[tokens][new].detach(), keys.dtype, KEY_GROUP)
        values[where] = _store(v[tokens][new].detach(), values.dtype, op.head_dim)
        blocks = table[: -(-context // cache.block_size)]
        seen_k = _read(keys[blocks].flatten(0, 1)[:context], q, KEY_GROUP)
        seen_v = _read(values[blocks].flatten(0, 1)[:context], q, op.head_dim)
        mask = torch.arange(context, device=q.device) <= positions[:, None]
        attended = F.scaled_dot_product_attention(
            q[tokens].transpose(0, 1)[None], seen_k.transpose(0, 1)[None],
            seen_v.transpose(0, 1)[None], attn_mask=mask, scale=op.scale, enable_gqa=True,
        )  # fmt: skip
        out.append(attended[0].transpose(0, 1).reshape(-1, op.num_heads * op.head_dim))
    return torch.cat(out)


def _store(heads: Tensor, dtype: torch.dtype, group: int) -> Tensor:
    return quantize_heads(heads.float(), group) if dtype == torch.int8 else heads.to(dtype)


def _read(stored: Tensor, q: Tensor, group: int) -> Tensor:
    if stored.dtype == torch.int8:
        stored = dequantize_heads(stored, q.shape[-1], group)
    return stored.to(q.dtype)
