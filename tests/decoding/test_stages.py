"""Strategies over more than one token: a learned temperature, a plan before code, look-ahead."""

import pytest
import torch

from decoding import ParameterError, Sampler, SamplingParams, build_token_tables, parse_strategy
from decoding.sampler import MIN_TEMPERATURE
from decoding.strategies import Learned, LookAheadStrategy, PlanFirst

LETTERS = [bytes([byte]) for byte in range(32, 127)]
TEXTS: list[bytes | None] = [None, b"\n", b"Plan", b":\n", b"```", b"python", *LETTERS, b"x\ny"]
TABLES = build_token_tables(TEXTS)
VOCAB = len(TEXTS)
WIDTH = 12


def id_of(text: bytes) -> int:
    return TEXTS.index(text)


def text_of(token_ids: list[int]) -> str:
    return b"".join(TEXTS[token_id] or b"<end>" for token_id in token_ids).decode()


class Head:
    """Gives the mean of a state, cut to a range."""

    def temperature(self, state: torch.Tensor) -> float:
        return min(1.5, max(0.1, 0.7 + float(state.mean())))


def test_learned_rows_are_drawn_at_what_their_own_heads_read() -> None:
    sampler = Sampler(TABLES)
    generator = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(6, VOCAB, generator=generator)
    states = torch.randn(6, WIDTH, generator=generator)
    strategies = [Learned(), Learned(scale=0.5), Learned(), None, Learned(), Learned(scale=0.0)]
    rows = []
    for i, strategy in enumerate(strategies):
        params = SamplingParams(temperature=0.0 if i == 4 else 0.9)
        if strategy is not None:
            params = SamplingParams(temperature=params.temperature, strategy=strategy)
        head = Head() if strategy else None
        rows.append(sampler.start(params, [], seed=i, is_traced=True, temperature_head=head))
    sampled = sampler.sample(logits, rows, states)
    read = [Head().temperature(states[i]) for i in range(6)]
    expected = [read[0], read[1] / 2, read[2], 0.9, 0.0, MIN_TEMPERATURE]
    assert sampled.temperatures == pytest.approx(expected, rel=1e-6)
    # Each row alone gets the same bits.
    for i, row in enumerate(rows):
        alone = sampler.sample(logits[i, None], [row], states[i, None])
        assert alone.temperatures == [sampled.temperatures[i]]
        assert alone.token_ids == [sampled.token_ids[i]]


def test_learned_without_a_head_is_refused() -> None:
    with pytest.raises(ParameterError, match="learned needs a temperature head"):
        Sampler(TABLES).start(SamplingParams(strategy=Learned()), [], seed=0)


def write(
    strategy: PlanFirst, wanted: list[int], *, count: int, temperature: float = 1.0
) -> tuple[list[int], list[float], list[str | None]]:
    """Return tokens, temperatures and stages of a model that wants certain tokens in turn."""
    sampler = Sampler(TABLES, eos_token_ids=(0,))
    params = SamplingParams(temperature=temperature, strategy=strategy)
    row = sampler.start(params, [], seed=1, is_traced=True)
    temperatures, stages = [], []
    for step in range(count):
        logits = torch.zeros(1, VOCAB)
        logits[0, id_of(b"a")] = 30.0
        logits[0, wanted[min(step, len(wanted) - 1)]] = 60.0
        sampled = sampler.sample(logits, [row])
        row.append(sampled.token_ids[0])
        temperatures += sampled.temperatures
        stages += sampled.stages
    return list(row.token_ids), temperatures, stages


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_plan_stands_between_opening_and_closing(temperature: float) -> None:
    strategy = PlanFirst(
        temperature=0.4, tokens=5, opening=("Plan:\n", "1."), closing=("\n```python\n",)
    )
    a, newline = id_of(b"a"), id_of(b"\n")
    # The line in which the tokens run out is ended; line ends before do not end the plan.
    wanted = [a] * 6 + [newline, a, a, a, a, newline] + [a] * 7
    token_ids, temperatures, stages = write(strategy, wanted, count=19, temperature=temperature)
    opening = [id_of(text) for text in (b"Plan", b":\n", b"1", b".")]
    assert token_ids[:4] == opening
    closing = [id_of(text) for text in (b"\n", b"```", b"python", b"\n")]
    assert text_of(token_ids) == "Plan:\n1.aa\naaaa\n" + "\n```python\n" + "aaa"
    assert token_ids[12:16] == closing
    assert stages == ["plan"] * 12 + ["code"] * 7
    cool = pytest.approx(0.4) if temperature else 0.0
    assert temperatures == [cool] * 12 + [temperature] * 7


def test_model_that_opens_a_fence_itself_has_ended_its_plan() -> None:
    strategy = PlanFirst(opening=("1",), tokens=20)
    a, fence = id_of(b"a"), id_of(b"```")
    token_ids, _, stages = write(strategy, [a, a, a, fence, a], count=8)
    assert text_of(token_ids) == "1aa```aaaa"
    assert stages == ["plan"] * 4 + ["code"] * 4


def test_plan_without_line_ends_is_closed_all_the_same_and_cannot_end_the_answer() -> None:
    strategy = PlanFirst(opening=("1",), tokens=3, closing=("```",))
    token_ids, _, _ = write(strategy, [0], count=1 + 3 + 32 + 2)
    assert 0 not in token_ids[:-1]
    assert token_ids[36] == id_of(b"```")
    assert token_ids[37] == 0  # code may end


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 129}, "decoding.tokens must be an integer from 1 to 128"),
        ({"opening": ["x" * 65]}, "decoding.opening must be a list of at most 8 strings"),
        ({"opening": ["x" * 60, "y" * 40]}, None),
        ({"tokens": 128, "opening": ["x" * 60] * 2}, "decoding.opening must be at most 95 bytes"),
        ({"closing": ["x" * 64] * 2}, "decoding.closing must be at most 119 bytes beside"),
    ],
)
def test_texts_that_are_too_long_are_refused(
    fields: dict[str, object], message: str | None
) -> None:
    value = {"strategy": "plan_first", **fields}
    if message is None:
        fits = parse_strategy(value)
        assert isinstance(fits, PlanFirst)
        fits.bind(TABLES)
        return
    with pytest.raises(ParameterError, match=message):
        parse_strategy(value)


def test_text_that_the_vocabulary_cannot_spell_is_refused() -> None:
    with pytest.raises(ParameterError, match="no token for 'Größe'"):
        PlanFirst(opening=("Größe",)).bind(TABLES)


def test_hard_tokens_have_candidates_with_their_log_probabilities() -> None:
    sampler = Sampler(TABLES)
    sure, unsure = torch.zeros(VOCAB), torch.zeros(VOCAB)
    sure[7] = 30.0
    unsure[[40, 9, 20, 30]] = torch.tensor([6.0, 5.0, 5.0, 5.0])
    strategy = LookAheadStrategy(threshold=1.0, candidates=3)
    params = SamplingParams(temperature=0.0, strategy=strategy, logit_bias={30: -3.0})
    rows = [sampler.start(params, [], seed=i) for i in range(2)]
    rows.append(sampler.start(SamplingParams(temperature=0.0), [], seed=2))
    sampled = sampler.sample(torch.stack([sure, unsure, unsure]), rows)
    assert sampled.token_ids == [7, 40, 40]
    assert [len(tried) for tried in sampled.candidates] == [0, 3, 0]
    assert [token_id for token_id, _ in sampled.candidates[1]] == [40, 9, 20]
    biased = unsure.double()
    biased[30] -= 3.0
    logprobs = biased.log_softmax(0)
    for token_id, logprob in sampled.candidates[1]:
        assert logprob == pytest.approx(float(logprobs[token_id]), abs=1e-6)


def test_candidates_are_possible_tokens_only() -> None:
    sampler = Sampler(TABLES)
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, [4, 8]] = 0.0
    params = SamplingParams(strategy=LookAheadStrategy(threshold=0.1, candidates=5))
    sampled = sampler.sample(logits, [sampler.start(params, [], seed=0)])
    assert [token_id for token_id, _ in sampled.candidates[0]] == [4, 8]
