"""The logits processor under both of vLLM's model runners, over batches that are made up."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm")

import torch
from vllm import SamplingParams as VllmSamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from decoding import Sampler, SamplingParams, build_token_tables, parse_strategy
from serve.backends.vllm.asked import Asked
from serve.backends.vllm.models import check_parallelism
from serve.backends.vllm.rows import RowKeeper
from serve.backends.vllm.sampling import ProaLogitsProcessor

pytestmark = pytest.mark.vllm
VOCAB = 32
TABLES = build_token_tables([bytes([97 + i % 26]) for i in range(VOCAB)])
PROMPT = [1, 2, 3, 4, 5]
ADAPT = parse_strategy({"strategy": "adapt", "a": 1.2, "b": 0.6})
CONFIG = SimpleNamespace(additional_config={})


def logits(seed: int) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def ask(seed: int, **fields: Any) -> Asked:
    params = SamplingParams(**({"max_tokens": 20, "temperature": 1.0, "strategy": ADAPT} | fields))
    return Asked(params=params, seed=seed, key=f"k{seed}")


def params_of(asked: Asked) -> VllmSamplingParams:
    return VllmSamplingParams(temperature=0.0, extra_args=asked.to_extra_args())


def expected(asked: Asked, seeds: list[int]) -> list[int]:
    sampler = Sampler(TABLES)
    row = sampler.start(asked.params, PROMPT, seed=asked.seed)
    for seed in seeds:
        row.append(sampler.sample(logits(seed)[None], [row]).token_ids[0])
    return list(row.token_ids)


def make(state: Any) -> ProaLogitsProcessor:
    processor = ProaLogitsProcessor(CONFIG, state)
    processor._keeper = RowKeeper(Sampler(TABLES), send=None)
    return processor


def update(size: int, **changes: Any) -> BatchUpdate:
    return BatchUpdate(
        batch_size=size, **({"removed": [], "added": [], "moved": []} | changes)
    )  # fmt: skip


def test_v1_rows_move_leave_and_come_back() -> None:
    processor = make(torch.device("cpu"))
    assert not processor.is_argmax_invariant()
    a, b = ask(1), ask(2)
    out_a: list[int] = []
    out_b: list[int] = []
    plain = VllmSamplingParams(temperature=0.7)
    added = [(0, params_of(a), PROMPT, out_a), (1, plain, PROMPT, []),
             (2, params_of(b), PROMPT, out_b)]  # fmt: skip
    processor.update_state(update(3, added=added))
    batch = processor.apply(torch.stack([logits(0), logits(9), logits(0)]))
    assert torch.equal(batch[1], logits(9))
    out_a.append(int(batch[0].argmax()))
    out_b.append(int(batch[2].argmax()))
    processor.update_state(update(3, moved=[(0, 2, MoveDirectionality.SWAP)]))
    batch = processor.apply(torch.stack([logits(1), logits(9), logits(1)]))
    out_b.append(int(batch[0].argmax()))
    out_a.append(int(batch[2].argmax()))
    # The first is pre-empted; another row takes its place, and then it comes back.
    processor.update_state(update(2, removed=[2]))
    batch = processor.apply(torch.stack([logits(2), logits(9)]))
    out_b.append(int(batch[0].argmax()))
    processor.update_state(update(3, added=[(2, params_of(a), PROMPT, list(out_a))]))
    batch = processor.apply(torch.stack([logits(3), logits(9), logits(2)]))
    out_b.append(int(batch[0].argmax()))
    out_a.append(int(batch[2].argmax()))
    assert out_a == expected(a, [0, 1, 2])
    assert out_b == expected(b, [0, 1, 2, 3])


def test_v1_follows_vllms_order() -> None:
    processor = make(torch.device("cpu"))
    a, b = ask(1), ask(2)
    out_a: list[int] = []
    out_b: list[int] = []
    processor.update_state(update(1, added=[(0, params_of(a), PROMPT, out_a)]))
    for seed in range(4):
        out_a.append(int(processor.apply(logits(seed)[None]).argmax()))
    processor.update_state(
        update(
            2, added=[(1, params_of(b), PROMPT, out_b)], moved=[(0, 1, MoveDirectionality.SWAP)]
        )  # fmt: skip
    )
    batch = processor.apply(torch.stack([logits(0), logits(4)]))
    out_b.append(int(batch[0].argmax()))
    out_a.append(int(batch[1].argmax()))
    assert out_a == expected(a, list(range(5)))
    assert out_b == expected(b, [0])


class Slots:
    """What V2 keeps of the requests."""

    def __init__(self, count: int) -> None:
        self.device = torch.device("cpu")
        self.tokens = torch.zeros(count, 64, dtype=torch.int64)
        self.all_token_ids = SimpleNamespace(gpu=self.tokens)
        self.prompt_len = SimpleNamespace(np=np.zeros(count, dtype=np.int64))
        self.prefill_len = SimpleNamespace(np=np.zeros(count, dtype=np.int64))

    def fill(self, slot: int, tokens: list[int], prompt_length: int) -> None:
        self.tokens[slot] = 0
        self.tokens[slot, : len(tokens)] = torch.tensor(tokens)
        self.prompt_len.np[slot] = prompt_length
        self.prefill_len.np[slot] = len(tokens)


def context(slots: list[int], lengths: list[int]) -> Any:
    return SimpleNamespace(
        idx_mapping_np=np.array(slots), seq_lens_upper_bound_np=np.array(lengths)
    )  # fmt: skip


def test_v2_draws_the_same_tokens_in_whatever_order_the_rows_are() -> None:
    slots = Slots(4)
    processor = make(slots)
    a, b = ask(1), ask(2)
    slots.fill(3, PROMPT, 5)
    slots.fill(0, PROMPT, 5)
    slots.fill(1, PROMPT, 5)
    assert processor.add_request(3, params_of(a))
    assert processor.add_request(0, params_of(b))
    assert not processor.add_request(1, VllmSamplingParams(temperature=0.7))
    processor.apply_staged_writes()
    out: dict[int, list[int]] = {3: [], 0: []}
    for seed in range(6):
        order = [3, 1, 0] if seed % 2 else [0, 3, 1]
        batch = torch.stack([logits(seed)] * 3)
        batch = processor.apply(batch, context(order, [5 + seed] * 3))
        for row, slot in enumerate(order):
            if slot == 1:
                assert torch.equal(batch[row], logits(seed))
            else:
                out[slot].append(int(batch[row].argmax()))
    assert out[3] == expected(a, list(range(6)))
    assert out[0] == expected(b, list(range(6)))


def test_v2_leaves_parts_of_prompts_alone_and_reads_what_came_before() -> None:
    slots = Slots(2)
    processor = make(slots)
    request = ask(7, repetition_penalty=1.4)
    tokens = expected(request, list(range(4)))
    # As after a pre-emption: the prompt and three tokens are computed again, in two parts.
    slots.fill(1, [*PROMPT, *tokens[:3]], 5)
    processor.add_request(1, params_of(request))
    part = processor.apply(logits(8)[None].clone(), context([1], [4]))
    assert torch.equal(part[0], logits(8))
    batch = processor.apply(logits(3)[None].clone(), context([1], [8]))
    assert int(batch[0].argmax()) == tokens[3]


def test_slot_that_is_taken_again_starts_anew() -> None:
    slots = Slots(1)
    processor = make(slots)
    for request in (ask(1), ask(2)):
        slots.fill(0, PROMPT, 5)
        processor.add_request(0, params_of(request))
        out = [
            int(processor.apply(logits(seed)[None].clone(), context([0], [5 + seed]))[0].argmax())
            for seed in range(3)
        ]
        assert out == expected(request, list(range(3)))


@pytest.mark.parametrize(
    ("speculative", "stages", "match"),
    [(object(), 1, "speculative decoding"), (None, 2, "pipeline_parallel_size must be 1")],
)
def test_engine_that_would_leave_us_out_is_refused(
    speculative: object, stages: int, match: str
) -> None:
    config: Any = SimpleNamespace(
        speculative_config=speculative,
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
    )
    with pytest.raises(ValueError, match=match):
        check_parallelism(config)
    config.speculative_config, config.parallel_config.pipeline_parallel_size = None, 1
    check_parallelism(config)


def test_parameters_are_checked_before_a_request_is_admitted() -> None:
    for decoding in ('{"strategy": "adapt", "a": 9}', "{", '{"strategy": "nothing"}'):
        params = VllmSamplingParams(extra_args={"decoding": decoding})
        with pytest.raises(ValueError, match="decoding"):
            ProaLogitsProcessor.validate_params(params)
    ProaLogitsProcessor.validate_params(VllmSamplingParams())
