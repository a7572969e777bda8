"""A scripted model that keeps token ids in its cache, and a naive loop to compare with."""

import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from decoding import Sampler, SamplingParams, TokenTables, build_token_tables, derive_seed
from decoding.logprobs import token_logprobs
from models.batch import PackedBatch
from models.spec import DecoderSpec, LayerSpec
from serve.backends.native import NativeBackend
from serve.engine.engine import Engine

VOCAB_SIZE = 48
EOS_TOKEN_ID = 0


class HistoryModel:
    """Its next-token logits depend on every token that it finds through the block table.

    A wrong block table, position, context length or cached prefix therefore changes the text.

    Attributes:
        fails: called with the number of the forward call; true makes it raise.
        gate: when set, each forward call waits for one release of it.
        is_inside: set once a forward call has begun.
        num_tokens, num_outputs: tokens and rows of logits of each step.
    """

    def __init__(self, max_position_embeddings: int = 256) -> None:
        layer = LayerSpec(
            num_attention_heads=1, num_key_value_heads=1, head_dim=2, intermediate_size=2
        )
        self.spec = DecoderSpec(
            family="history",
            vocab_size=VOCAB_SIZE,
            hidden_size=2,
            max_position_embeddings=max_position_embeddings,
            layers=(layer,),
            norm="rms",
            norm_eps=1e-6,
            activation="silu",
            gated_mlp=True,
        )
        generator = torch.Generator().manual_seed(1)
        self._logits = 3 * torch.randn(997, VOCAB_SIZE, generator=generator)
        self.fails: Callable[[int], bool] = lambda call: False
        self.gate: threading.Semaphore | None = None
        self.is_inside = threading.Event()
        self.num_calls = 0
        self.num_tokens: list[int] = []
        self.num_outputs: list[int] = []

    def logits(self, history: Sequence[int]) -> Tensor:
        """Return the (V,) logits after a history."""
        return self._logits[zlib.crc32(bytes(history)) % len(self._logits)]

    def make_cache(
        self, *, num_blocks: int, block_size: int = 16, dtype: torch.dtype | None = None
    ) -> Any:
        slots = [VOCAB_SIZE] * (num_blocks * block_size)
        return SimpleNamespace(num_blocks=num_blocks, block_size=block_size, slots=slots)

    def forward(self, batch: PackedBatch, cache: Any) -> Tensor:
        self.num_calls += 1
        self.is_inside.set()
        if self.gate is not None:
            assert self.gate.acquire(timeout=30)
        if self.fails(self.num_calls):
            raise RuntimeError("scripted forward failure")
        starts, lengths = batch.query_starts.tolist(), batch.context_lens.tolist()
        tables, positions = batch.block_tables.tolist(), batch.positions.tolist()
        token_ids, rows = batch.token_ids.tolist(), batch.output_rows.tolist()
        assert all(tensor.dtype == torch.int32 for tensor in (batch.token_ids, batch.block_tables))
        assert starts[0] == 0
        assert starts[-1] == len(token_ids) == len(positions)
        assert rows == sorted(set(rows))
        self.num_tokens.append(len(token_ids))
        self.num_outputs.append(len(rows))

        def slot(b: int, position: int) -> int:
            block, offset = divmod(position, cache.block_size)
            return int(tables[b][block] * cache.block_size + offset)

        owners = [b for b in range(len(lengths)) for _ in range(starts[b], starts[b + 1])]
        for b, length in enumerate(lengths):
            own = positions[starts[b] : starts[b + 1]]
            assert own == list(range(length - len(own), length))
        for b, position, token_id in zip(owners, positions, token_ids, strict=True):
            cache.slots[slot(b, position)] = token_id
        histories = [
            [cache.slots[slot(owners[row], p)] for p in range(positions[row] + 1)] for row in rows
        ]
        return torch.stack([self.logits(history) for history in histories] or [torch.empty(0)])


@dataclass
class Expected:
    """What a sequence generates when it runs alone."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = "length"


@torch.inference_mode()
def run_naively(
    model: HistoryModel,
    sampler: Sampler,
    prompt: Sequence[int],
    params: SamplingParams,
    index: int = 0,
) -> Expected:
    """Generate one sequence token by token, without an engine."""
    assert params.seed is not None
    row = sampler.start(params, prompt, seed=derive_seed(params.seed, index))
    expected = Expected()
    for _ in range(params.max_tokens or 0):
        logits = model.logits([*prompt, *expected.token_ids])[None]
        token_id = sampler.sample(logits, [row]).token_ids[0]
        row.append(token_id)
        expected.token_ids.append(token_id)
        expected.logprobs.append(token_logprobs(logits, [token_id])[0][0])
        if token_id in params.stop_token_ids or (
            token_id == EOS_TOKEN_ID and not params.ignore_eos
        ):
            expected.finish_reason = "stop"
            break
    return expected


@pytest.fixture(scope="session")
def tables() -> TokenTables:
    return build_token_tables([None, *(bytes([65 + i]) for i in range(VOCAB_SIZE - 1))])


@pytest.fixture
def sampler(tables: TokenTables) -> Sampler:
    return Sampler(tables, eos_token_ids=(EOS_TOKEN_ID,))


@pytest.fixture
def model() -> HistoryModel:
    return HistoryModel()


@pytest.fixture
def make_engine(model: HistoryModel, sampler: Sampler) -> Callable[..., Engine]:
    """Give a function that builds an engine over `model` with small limits."""

    def make(**settings: Any) -> Engine:
        defaults: dict[str, Any] = {
            "eos_token_ids": (EOS_TOKEN_ID,),
            "num_cache_blocks": 64,
            "block_size": 4,
            "max_batch_tokens": 32,
            "max_running_sequences": 8,
        }
        return Engine(model, sampler, **(defaults | settings))

    return make


@pytest.fixture
def expect(model: HistoryModel, sampler: Sampler) -> Callable[..., Expected]:
    """Give a function that runs a prompt naively over `model`."""

    def run(prompt: Sequence[int], params: SamplingParams, index: int = 0) -> Expected:
        return run_naively(model, sampler, prompt, params, index)

    return run


@pytest.fixture
def make_backend(
    model: Any, sampler: Sampler, request: pytest.FixtureRequest
) -> Callable[..., NativeBackend]:
    """Give a function that builds a backend over `model`; it is closed after the test."""

    def make(**settings: Any) -> NativeBackend:
        defaults: dict[str, Any] = {
            "eos_token_ids": (0,),
            "num_cache_blocks": 64,
            "block_size": 4,
            "max_batch_tokens": 16,
            "max_running_sequences": 4,
        }
        backend = NativeBackend(model, sampler, **(defaults | settings))

        def close() -> None:
            if model.gate is not None:
                model.gate.release(1000)
            backend.close()

        request.addfinalizer(close)
        return backend

    return make
