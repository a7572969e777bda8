"""A scripted model that keeps token ids in its caches, and a naive loop to compare with."""

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
from serve.engine.engine import Engine
from serve.engine.limits import EngineLimits
from serve.engine.sequence import LiveRequest, ModelVariant, SideAdapter

VOCAB_SIZE = 48
EOS_TOKEN_ID = 0


class HistoryModel:
    """Its next-token logits depend on every token that it finds through the block tables.

    A wrong block table, position, context length or cached prefix therefore changes the text. Base,
    variants and side networks have names; caches keep the names beside each token, so that nothing
    reads what another one wrote.

    Attributes:
        name: of the base or variant; each says something else.
        fails: called with the number of the forward call; true makes it raise.
        gate: when set, each forward call waits for one release of it.
        is_inside: set once a forward call has begun.
        num_tokens, num_outputs: tokens and rows of logits of each step.
        num_side_tokens: tokens that side networks read in each step.
        side_shapes: of the side caches made.
    """

    def __init__(self, max_position_embeddings: int = 256, name: str = "base") -> None:
        self.name = name
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
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        self._logits = 3 * torch.randn(997, VOCAB_SIZE, generator=generator)
        self.fails: Callable[[int], bool] = lambda call: False
        self.gate: threading.Semaphore | None = None
        self.is_inside = threading.Event()
        self.num_calls = 0
        self.num_tokens: list[int] = []
        self.num_outputs: list[int] = []
        self.num_side_tokens: list[int] = []
        self.side_shapes: list[object] = []

    def logits(
        self, history: Sequence[int], adapter: SideAdapter | None = None, scale: float = 1.0
    ) -> Tensor:
        """Return the (V,) logits after a history."""
        logits = self._logits[zlib.crc32(bytes(history)) % len(self._logits)]
        if adapter is None:
            return logits
        side = zlib.crc32(bytes(history) + adapter.side.name.encode())  # type: ignore[attr-defined]
        return logits + scale * self._logits[side % len(self._logits)]

    def make_cache(
        self, *, num_blocks: int, block_size: int = 16, dtype: torch.dtype | None = None
    ) -> Any:
        slots: list[tuple[Any, ...]] = [("", VOCAB_SIZE)] * (num_blocks * block_size)

        def copy_blocks(sources: Sequence[int], targets: Sequence[int]) -> None:
            copied = [slots[i * block_size : (i + 1) * block_size] for i in sources]
            for target, block in zip(targets, copied, strict=True):
                slots[target * block_size : (target + 1) * block_size] = block

        return SimpleNamespace(
            num_blocks=num_blocks, block_size=block_size, slots=slots, copy_blocks=copy_blocks
        )

    def make_side_cache(self, side: Any, **sizes: Any) -> Any:
        self.side_shapes.append(side.cache_shape)
        return self.make_cache(**sizes)

    def forward(self, batch: PackedBatch, cache: Any, *, states: Tensor | None = None) -> Tensor:
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

        owners = [range(starts[b], starts[b + 1]) for b in range(len(lengths))]
        for b, length in enumerate(lengths):
            own = [positions[i] for i in owners[b]]
            assert own == list(range(length - len(own), length))
        tokens = [[(positions[i], token_ids[i]) for i in own] for own in owners]
        firsts = [0] * len(lengths) if batch.write_starts is None else batch.write_starts.tolist()
        written: set[tuple[int, int]] = set()
        for own, table, first in zip(tokens, tables, firsts, strict=True):
            marks = [(position, (self.name, token_id)) for position, token_id in own]
            _fill(cache, table, marks, first, written)
        sides = self._run_sides(batch, tokens, written)
        logits = []
        for b, own in enumerate(owners):
            for row in sorted(set(rows).intersection(own)):
                positions_seen = range(positions[row] + 1)
                found = [cache.slots[_slot(cache, tables[b], p)] for p in positions_seen]
                assert {name for name, _ in found} == {self.name}
                history = [token_id for _, token_id in found]
                side_cache, table, name, scale = sides.get(b, (None, (), "", 0.0))
                adapter = None
                if scale:
                    marks = [side_cache.slots[_slot(side_cache, table, p)] for p in positions_seen]
                    assert marks == [(self.name, name, token_id) for token_id in history]
                    adapter = SideAdapter(SimpleNamespace(name=name), name)  # type: ignore[arg-type]
                logits.append(self.logits(history, adapter, scale))
        return torch.stack(logits) if logits else torch.empty(0, VOCAB_SIZE)

    def _run_sides(
        self, batch: PackedBatch, tokens: list[list[tuple[int, int]]], written: set[Any]
    ) -> dict[int, tuple[Any, list[int], str, float]]:
        """Fill the side caches; give cache, block table, name and scale by row of the batch."""
        found: dict[int, tuple[Any, list[int], str, float]] = {}
        num_tokens = 0
        side = batch.side
        if side is not None:
            rows = side.sequences.tolist()
            tables, scales = side.block_tables.tolist(), side.scales.tolist()
            assert len(rows) == len(side.networks) == len(side.caches) == len(tables) == len(scales)
            firsts = side.write_starts.tolist()
            for i, b in enumerate(rows):
                network: Any = side.networks[i]
                marks = [(p, (self.name, network.name, token_id)) for p, token_id in tokens[b]]
                _fill(side.caches[i], tables[i], marks, firsts[i], written)
                num_tokens += len(marks)
                if scales[i]:
                    assert b not in found
                    found[b] = (side.caches[i], tables[i], network.name, scales[i])
        self.num_side_tokens.append(num_tokens)
        return found


def _slot(cache: Any, table: Sequence[int], position: int) -> int:
    block, offset = divmod(position, cache.block_size)
    return int(table[block] * cache.block_size + offset)


def _fill(
    cache: Any, table: Sequence[int], marks: Sequence[Any], first: int, written: set[Any]
) -> None:
    """Write (position, mark) pairs to a cache; those before `first` must be there already."""
    for position, mark in marks:
        slot = _slot(cache, table, position)
        if position >= first:
            assert (id(cache), slot) not in written, "a slot is written twice in a step"
            written.add((id(cache), slot))
            cache.slots[slot] = mark
        else:
            assert cache.slots[slot] == mark


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
    adapter: SideAdapter | None = None,
    scale: float = 1.0,
) -> Expected:
    """Generate one sequence token by token, without an engine."""
    assert params.seed is not None
    row = sampler.start(params, prompt, seed=derive_seed(params.seed, index))
    expected = Expected()
    for _ in range(params.max_tokens or 0):
        logits = model.logits([*prompt, *expected.token_ids], adapter, scale)[None]
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
            "num_cache_blocks": 64,
            "block_size": 4,
            "max_batch_tokens": 32,
            "max_running_sequences": 8,
        }
        limits = EngineLimits(**(defaults | settings))
        return Engine(model, sampler, limits, eos_token_ids=(EOS_TOKEN_ID,))

    return make


@pytest.fixture
def expect(model: HistoryModel, sampler: Sampler) -> Callable[..., Expected]:
    """Give a function that runs a prompt naively over `model`."""

    def run(prompt: Sequence[int], params: SamplingParams, index: int = 0, *side: Any) -> Expected:
        return run_naively(model, sampler, prompt, params, index, *side)

    return run


@pytest.fixture
def expect_all(model: HistoryModel, sampler: Sampler) -> Callable[[LiveRequest], list[Expected]]:
    """Give a function that runs each sequence of a request naively."""

    def run(request: LiveRequest) -> list[Expected]:
        asked = request.asked
        return [
            run_naively(
                on.variant.model if on.variant else model,  # type: ignore[arg-type]
                sampler, asked.prompt_token_ids, arm.params, i, on.side, arm.adapter_scale,
            )
            for arm, on in zip(asked.arms, request.attachments, strict=True)
            for i in range(arm.num_sequences)
        ]  # fmt: skip

    return run


@pytest.fixture
def adapters() -> list[SideAdapter]:
    """Give side networks for `model`, of two shapes."""
    sides = [SimpleNamespace(name=name, cache_shape=("abc".index(name) // 2,)) for name in "abc"]
    return [SideAdapter(side, side.name) for side in sides]  # type: ignore[arg-type]


@pytest.fixture
def variants() -> list[ModelVariant]:
    """Give two variants of `model`."""
    return [ModelVariant(HistoryModel(name=name), name) for name in ("small", "smaller")]
