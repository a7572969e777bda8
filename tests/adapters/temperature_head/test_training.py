"""Learning temperatures from programs that passed and failed."""

import math

import pytest
import torch

from adapters.format import AdapterError
from adapters.temperature_head.head import HeadConfig
from adapters.temperature_head.training import (
    HeadTraining,
    Program,
    Readings,
    advantages,
    read_programs,
    train_head,
)
from models.decoder import Decoder
from tests.models.kernels.random_decoders import make_decoder_parts, pack_batch

CONFIG = HeadConfig(width=8, least=0.1, most=1.5)
TRAINING = HeadTraining(drawn_at=0.8, epochs=120, learning_rate=0.02)


def program(task: str, passed: bool, tokens: list[int] | None = None) -> Program:
    return Program(task=task, prompt_token_ids=[1, 2, 3], token_ids=tokens or [4, 5], passed=passed)


@pytest.mark.parametrize("kernels", ["native", "reference"])
@pytest.mark.parametrize("num_prompt", [1, 16, 17, 40])
def test_readings_are_what_the_model_says_of_each_program_alone(
    kernels: str, num_prompt: int
) -> None:
    spec, weights = make_decoder_parts("llama")
    decoder = Decoder(spec, weights, kernels=kernels)  # type: ignore[arg-type]
    programs = []
    for i, length in enumerate((3, 20, 1, 9, 5)):
        task = "ab"[i // 3]
        prompt = [(11 * j + ord(task)) % 97 for j in range(num_prompt)]
        drawn = [(5 * j + i) % 97 for j in range(length)]
        programs.append(
            Program(task=task, prompt_token_ids=prompt, token_ids=drawn, passed=i % 2 == 0)
        )
    training = HeadTraining(drawn_at=0.8, batch_rows=24)
    told: list[int] = []
    readings = read_programs(decoder, programs, CONFIG, training, progress=told.append)
    assert sum(told) == len(programs)
    assert readings.owner.tolist() == [i for i, p in enumerate(programs) for _ in p.token_ids]
    assert 0.8 in [pytest.approx(t) for t in readings.grid.tolist()]
    at = 0
    for one in programs:
        whole = [*one.prompt_token_ids, *one.token_ids]
        batch = pack_batch([whole], [list(range(8))], [(0, len(whole))])
        states = torch.empty(len(whole), spec.hidden_size)
        logits = decoder.forward(batch, decoder.make_cache(num_blocks=8), states=states)
        before = slice(len(whole) - len(one.token_ids) - 1, len(whole) - 1)
        rows = slice(at, at + len(one.token_ids))
        torch.testing.assert_close(
            readings.states[rows].float(), states[before], rtol=2e-3, atol=2e-3
        )
        for column, temperature in enumerate(readings.grid):
            expected = (logits[before] / temperature).log_softmax(-1)
            expected = expected.gather(1, torch.tensor(one.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(
                readings.logprobs[rows, column], expected, rtol=1e-3, atol=1e-2
            )
        at += len(one.token_ids)


def test_advantages_compare_a_program_with_the_others_of_its_task() -> None:
    programs = [
        *(program("easy", right) for right in (True, True, False)),
        *(program("hard", right) for right in (False, False, True)),
        *(program("solved", True) for _ in range(3)),
    ]
    found = advantages(programs, 2)
    # By hand: 2 (1 - p) times what is above the mean of the two others.
    raw = [*(2 / 3 * x for x in (0.5, 0.5, -1)), *(4 / 3 * x for x in (-0.5, -0.5, 1)), 0, 0, 0]
    scale = math.sqrt(sum(x * x for x in raw) / 6)
    assert found.tolist() == pytest.approx([x / scale for x in raw], rel=1e-5)


def test_programs_that_tell_nothing_are_refused() -> None:
    with pytest.raises(AdapterError, match="nothing can be learned"):
        advantages([program("a", True), program("a", True), program("b", False)], 10)


def make_readings(programs: list[Program]) -> Readings:
    """Return states that say whether a token is to be drawn hot: those of token 4 are."""
    grid = torch.linspace(0.1, 1.5, 9)
    generator = torch.Generator().manual_seed(0)
    states, logprobs, owner = [], [], []
    for number, one in enumerate(programs):
        for token_id in one.token_ids:
            is_first = token_id in (4, 6)
            mark = torch.tensor([3.0, 0.0] if is_first else [0.0, 3.0])
            states.append(torch.cat([mark, torch.randn(6, generator=generator) * 0.1]))
            # Two tokens whose logits are 0 and -2; 4 and 7 are the rarer ones.
            logit = -2.0 if token_id in (4, 7) else 0.0
            logprobs.append(
                torch.tensor([logit / t - math.log(1 + math.exp(-2 / t)) for t in grid.tolist()])
            )
            owner.append(number)
    return Readings(
        states=torch.stack(states).half(), logprobs=torch.stack(logprobs), grid=grid,
        owner=torch.tensor(owner),
    )  # fmt: skip


def make_programs() -> list[Program]:
    """Programs pass with the rare token 4 at the first place and the likely 5 at the second."""
    return [
        program(f"task{i}", passed, tokens)
        for i in range(12)
        for passed, tokens in (
            (True, [4, 5]), (False, [6, 5]), (False, [6, 7]), (False, [4, 7]), (True, [4, 5]),
        )
    ]  # fmt: skip


def test_head_is_hot_where_rare_tokens_help_and_cool_where_they_harm() -> None:
    programs = make_programs()
    readings = make_readings(programs)
    told: list[int] = []
    result = train_head(programs, readings, CONFIG, TRAINING, progress=told.append)
    assert sum(told) == TRAINING.epochs
    first = readings.states[:, 0] > 1
    assert float(result.temperatures[first].mean()) > 1.0
    assert float(result.temperatures[~first].mean()) < 0.6
    assert result.held_out_gain > 0.01
    assert result.gain > 0.01
    assert result.num_tasks == 12
    again = train_head(programs, readings, CONFIG, TRAINING)
    assert torch.equal(again.temperatures, result.temperatures)


def test_head_that_does_not_generalise_is_the_fixed_temperature() -> None:
    # What passes is chance, another in each task: held-out tasks cannot become better for long.
    generator = torch.Generator().manual_seed(1)
    programs = [
        program(
            f"task{i}", bool(j == i % 5), torch.randint(4, 8, (2,), generator=generator).tolist()
        )
        for i in range(12)
        for j in range(5)
    ]
    result = train_head(
        programs, make_readings(programs), CONFIG,
        HeadTraining(drawn_at=0.8, epochs=1, learning_rate=1e-9),
    )  # fmt: skip
    assert result.temperatures.tolist() == pytest.approx([0.8] * 120, abs=1e-3)


@pytest.mark.parametrize("drawn_at", [0.1, 1.5, 1.9])
def test_programs_drawn_outside_of_the_bounds_are_refused(drawn_at: float) -> None:
    programs = make_programs()
    with pytest.raises(AdapterError, match="must be between the least and the largest"):
        train_head(programs, make_readings(programs), CONFIG, HeadTraining(drawn_at=drawn_at))


@pytest.mark.parametrize(
    ("field", "value"),
    [("drawn_at", 0.0), ("drawn_at", 3), ("k", 0), ("epochs", 0), ("learning_rate", 0.0),
     ("weight_decay", -1), ("clip", 2), ("held_out", 0.9), ("seed", -1), ("batch_rows", 0)],
)  # fmt: skip
def test_settings_out_of_range_are_refused(field: str, value: float) -> None:
    given = {"drawn_at": 0.8, field: value}
    with pytest.raises(AdapterError, match=f"{field} must be from"):
        HeadTraining(**given)  # type: ignore[arg-type]
