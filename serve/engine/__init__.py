"""The engine: continuous batching over a block-paged KV cache, token ids in and token ids out."""
