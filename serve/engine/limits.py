"""What an engine may use and take on, in one place."""

import sys
from dataclasses import dataclass, replace

import torch

SIDE_BLOCKS_PER_BLOCK = 4
"""Side cache blocks for each block of the base: they are small, and several may read a token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLimits:
    """Sizes and limits of an engine.

    Attributes:
        num_cache_blocks: blocks of the KV cache, >= 1.
        block_size: positions in a block, >= 1.
        cache_dtype: of keys and values; None leaves it to the model.
        prefix_caching: reuse the cache between sequences that start alike.
        num_side_cache_blocks: blocks for the side networks, of all shapes together; at least what
            the longest sequence needs. They take memory as they fill. None:
            `SIDE_BLOCKS_PER_BLOCK` for each block of the base.
        max_context_tokens: longest prompt + continuation, >= 1; `fit` lowers it to what model and
            cache allow.
        max_batch_tokens: tokens that a step computes at most, >= max_running_sequences.
        max_running_sequences: sequences that own cache blocks at most, >= 1.
        max_prompt_logits: rows of logits a step computes for prompt log probabilities at most,
            >= 1.
        max_waiting_requests: requests that wait for admission at most, >= 1.
        max_waiting_tokens: their prompt tokens at most, >= 1; one request may exceed it when no
            other waits.

    Raises:
        ValueError: one is out of range.
    """

    num_cache_blocks: int
    block_size: int = 16
    cache_dtype: torch.dtype | None = None
    prefix_caching: bool = True
    num_side_cache_blocks: int | None = None
    max_context_tokens: int = sys.maxsize
    max_batch_tokens: int = 512
    max_running_sequences: int = 64
    max_prompt_logits: int = 128
    max_waiting_requests: int = 256
    max_waiting_tokens: int = 131_072

    def __post_init__(self) -> None:
        for name in (
            "num_cache_blocks", "block_size", "max_context_tokens", "max_running_sequences",
            "max_prompt_logits", "max_waiting_requests", "max_waiting_tokens",
        ):  # fmt: skip
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.max_batch_tokens < self.max_running_sequences:
            raise ValueError(
                f"max_batch_tokens must be at least max_running_sequences "
                f"({self.max_running_sequences}), since every running sequence decodes in each "
                f"step; got {self.max_batch_tokens}"
            )

    @property
    def max_sequence_blocks(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.max_context_tokens // self.block_size)

    @property
    def max_probes(self) -> int:
        """Sequences that try tokens for others at once at most, beside those that run."""
        spare = self.max_batch_tokens - self.max_running_sequences
        return min(self.max_running_sequences, spare) if self.prefix_caching else 0

    @property
    def num_side_blocks(self) -> int:
        """Blocks for the side networks."""
        if self.num_side_cache_blocks is None:
            return SIDE_BLOCKS_PER_BLOCK * self.num_cache_blocks
        return self.num_side_cache_blocks

    def fit(self, *, max_position_embeddings: int) -> "EngineLimits":
        """Lower `max_context_tokens` to what a model's positions and the cache allow.

        Raises:
            ValueError: the longest sequence does not fit the blocks for side networks.
        """
        context = min(
            self.max_context_tokens,
            max_position_embeddings,
            self.num_cache_blocks * self.block_size,
        )
        fitted = replace(self, max_context_tokens=context)
        if fitted.num_side_blocks < fitted.max_sequence_blocks:
            raise ValueError(
                f"num_side_cache_blocks must be at least {fitted.max_sequence_blocks}, for a "
                f"sequence of {context} tokens; got {fitted.num_side_blocks}"
            )
        return fitted
