import pytest

from serve.engine.limits import EngineLimits


@pytest.mark.parametrize(
    "name",
    [
        "num_cache_blocks", "block_size", "max_context_tokens", "max_running_sequences",
        "max_prompt_logits", "max_waiting_requests", "max_waiting_tokens",
    ],
)  # fmt: skip
def test_limit_below_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        EngineLimits(**({"num_cache_blocks": 4} | {name: 0}))


def test_fewer_tokens_than_sequences_are_refused() -> None:
    message = r"max_batch_tokens must be at least max_running_sequences \(4\).*; got 3"
    with pytest.raises(ValueError, match=message):
        EngineLimits(num_cache_blocks=4, max_running_sequences=4, max_batch_tokens=3)


@pytest.mark.parametrize(
    ("positions", "asked", "context"), [(64, 99, 40), (30, 99, 30), (64, 20, 20)],
    ids=["cache", "model", "asked"],
)  # fmt: skip
def test_context_is_what_model_cache_and_operator_allow(
    positions: int, asked: int, context: int
) -> None:
    limits = EngineLimits(num_cache_blocks=10, block_size=4, max_context_tokens=asked)
    assert limits.fit(max_position_embeddings=positions).max_context_tokens == context


def test_side_cache_has_four_blocks_for_each_of_the_base_unless_told() -> None:
    assert EngineLimits(num_cache_blocks=10).num_side_blocks == 40
    assert EngineLimits(num_cache_blocks=10, num_side_cache_blocks=12).num_side_blocks == 12


@pytest.mark.parametrize("num_blocks", [0, 9])
def test_side_cache_too_small_for_a_sequence_is_refused(num_blocks: int) -> None:
    limits = EngineLimits(num_cache_blocks=10, num_side_cache_blocks=num_blocks)
    message = f"must be at least 10, for a sequence of 160 tokens; got {num_blocks}"
    with pytest.raises(ValueError, match=message):
        limits.fit(max_position_embeddings=999)
