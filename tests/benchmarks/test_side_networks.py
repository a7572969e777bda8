"""The benchmarks of side networks: how figures are judged and batches padded."""

from typing import Any

import pytest

from adapters.qst.examples import Example
from benchmarks.qlora import pad
from benchmarks.side_networks import judge


def raw_figures(**changes: Any) -> dict[str, Any]:
    return {
        "decode_1_base": [100.0], "decode_1_adapter": [99.0, 96.0, 70.0],
        "decode_8_base": [400.0], "decode_8_one_adapter": [380.0],
        "prefill_all_adapters_s": [1.2], "switched_s": [0.022, 0.02], "own_hit_s": [0.02],
        "decode_8_eight_adapters": [361.0], "prefill_base_s": [1.0],
        "prefill_one_adapter_s": [1.0], "prefill_eight_adapters_s": [1.5],
        "switch": {"prompt_tokens": 1000, "base_tokens_found": 992, "is_equal_to_a_cold_run": True},
        "adapters_mb": 280.0, "adapters_attached_then": 56, "adapter_bytes": 5_000_000,
        **changes,
    }  # fmt: skip


def test_figures_are_medians_against_their_bounds() -> None:
    targets = judge(raw_figures())
    measured = [round(target.measured, 3) for target in targets]
    assert measured == [0.96, 0.95, 0.95, 1.5, 1.2, 1.05, 1.0, 1.0]
    assert all(target.is_met for target in targets)


@pytest.mark.parametrize(
    "changes",
    [{"decode_1_adapter": [70.0]}, {"decode_8_one_adapter": [300.0]},
     {"decode_8_eight_adapters": [200.0]}, {"prefill_eight_adapters_s": [1.9]},
     {"adapters_mb": 600.0}, {"prefill_all_adapters_s": [1.4]}, {"switched_s": [0.1]},
     {"switch": {"prompt_tokens": 1000, "base_tokens_found": 976, "is_equal_to_a_cold_run": True}}],
    ids=["one stream", "eight streams", "eight adapters", "prefill", "memory", "all", "first token",
         "switch"],
)  # fmt: skip
def test_a_missed_bound_is_told(changes: dict[str, Any]) -> None:
    assert not all(target.is_met for target in judge(raw_figures(**changes)))


def test_padding_counts_only_targets() -> None:
    examples = [
        Example(token_ids=[5, 6, 7], is_target=[0, 1, 1]),
        Example(token_ids=[8], is_target=[1]),
    ]
    batch = pad(examples)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
