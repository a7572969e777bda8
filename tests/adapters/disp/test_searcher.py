"""One step of a search: what pulls the masks to the target."""

from dataclasses import replace

import pytest
import torch

from adapters.disp import searcher as module
from adapters.disp.masked import MaskedDecoder
from adapters.disp.search_config import SearchConfig
from adapters.disp.searcher import Searcher
from adapters.training_state import TrainingError
from adapters.windows import Windows, step_generator
from models.weights import Weight
from tests.adapters.fitted_base import LENGTH, fitted_checkpoint, make_text


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_searcher(weights: dict[str, Weight] | None = None, **options: object) -> Searcher:
    checkpoint = fitted_checkpoint()
    config = SearchConfig(length=LENGTH, **options)  # type: ignore[arg-type]
    return Searcher(MaskedDecoder(checkpoint.spec, weights or checkpoint.weights), config)


def take_steps(searcher: Searcher, count: int, target: float, rate_factor: float = 1.0) -> None:
    windows = Windows(make_text(), LENGTH, held_out=0, spec=searcher.spec)
    for step in range(count):
        generator = step_generator(0, step)
        searcher.step(windows.draw(2, generator), generator, target=target, rate_factor=rate_factor)


def test_share_follows_the_target_down_and_up(monkeypatch: pytest.MonkeyPatch) -> None:
    searcher = make_searcher()
    for target in (0.8, 0.5, 0.6):
        take_steps(searcher, 60, target=target)
        assert searcher.kept() == pytest.approx(target, rel=0.01)
    monkeypatch.setattr(module, "_LARGEST_SHIFT", 0.0)
    without = make_searcher(penalty=0.1)
    take_steps(without, 60, target=0.5)
    assert without.kept() > 0.6


def test_fixed_widths_stay_while_channels_are_exchanged() -> None:
    searcher = make_searcher(align=8, learning_rate=0.05)
    take_steps(searcher, 30, target=0.7)
    searcher.fix_widths(0.7)
    before, kept = searcher.selections(), searcher.kept()
    assert kept == pytest.approx(0.7, rel=0.005)
    take_steps(searcher, 30, target=0.7)
    after = searcher.selections()
    assert [s.widths for s in after] == [s.widths for s in before]
    assert after != before
    assert searcher.kept() == kept
    above = searcher.structures.threshold(searcher.network())
    assert float(above.sum()) == pytest.approx(sum(searcher.counts or ()), abs=2)
    searcher.free_widths()
    take_steps(searcher, 80, target=0.5)
    take_steps(searcher, 10, target=0.5, rate_factor=0.01)  # as at the end of a search
    assert searcher.kept() == pytest.approx(0.5, rel=0.01)


def test_head_start_tells_apart_which_channels_matter() -> None:
    text = make_text()
    windows = Windows(text, LENGTH, held_out=0, spec=make_searcher().spec)
    searcher, without = make_searcher(align=8), make_searcher(align=8)
    searcher.give_head_start(windows.draw(8, step_generator(0, 0)))
    losses = []
    for one in (searcher, without):
        one.fix_widths(0.7)
        losses.append(one.evaluate(windows.draw(16, step_generator(0, 1)), one.selections()))
    assert losses[0] < losses[1]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_loss_that_is_not_finite_changes_nothing(broken: float) -> None:
    weights = dict(fitted_checkpoint().weights)
    weights["final_norm.weight"] = torch.full((64,), broken)
    searcher = make_searcher(weights)
    before = searcher.network()
    with pytest.raises(TrainingError, match="the loss is nan"):
        take_steps(searcher, 1, target=0.7)
    assert torch.equal(searcher.network(), before)


@pytest.mark.parametrize("is_fixed", [False, True], ids=["free", "fixed"])
def test_state_is_all_that_is_needed_to_go_on(is_fixed: bool) -> None:
    searcher = make_searcher(align=8)
    take_steps(searcher, 3, target=0.7)
    if is_fixed:
        searcher.fix_widths(0.7)
    other = make_searcher(seed=5, align=8)
    other.load_state_tensors({n: t.clone() for n, t in searcher.state_tensors().items()})
    for each in (searcher, other):
        take_steps(each, 2, target=0.7)
    assert torch.equal(searcher.network(), other.network())
    assert searcher.counts == other.counts


def test_text_has_to_fit() -> None:
    spec = fitted_checkpoint().spec
    with pytest.raises(TrainingError, match=r"at least length \+ 1 = 33 tokens, got 32; give"):
        Windows(make_text(32), 32, held_out=1, spec=spec)
    with pytest.raises(TrainingError, match="at least length .*, got 0"):
        Windows(torch.empty(0, dtype=torch.long), 32, held_out=1, spec=spec)
    with pytest.raises(TrainingError, match="length must be at most the model's 128 positions"):
        Windows(make_text(), 129, held_out=1, spec=spec)
    with pytest.raises(TrainingError, match="token ids from 0 to 49"):
        Windows(make_text(), 32, held_out=1, spec=replace(spec, vocab_size=50))


def test_held_out_windows_are_the_end_and_a_tenth_at_most() -> None:
    spec, text = fitted_checkpoint().spec, torch.arange(3000) % 97
    windows = Windows(text, 29, held_out=4, spec=spec)
    assert torch.equal(windows.held_out.flatten(), text[-120:])
    assert len(Windows(text, 29, held_out=100, spec=spec).held_out) == 10
    assert len(Windows(text[:50], 29, held_out=4, spec=spec).held_out) == 0
    only = Windows(text[:30], 29, held_out=4, spec=spec)
    assert torch.equal(only.draw(2, step_generator(0, 1)), text[:30].expand(2, -1))


def test_windows_follow_from_seed_and_step() -> None:
    windows = Windows(torch.arange(5000) % 97, 16, held_out=4, spec=fitted_checkpoint().spec)
    drawn = {
        (seed, step): windows.draw(8, step_generator(seed, step)).flatten().tolist()
        for seed in (0, 1, 2**40)
        for step in (1, 2)
    }
    assert len({tuple(tokens) for tokens in drawn.values()}) == 6
    assert windows.draw(8, step_generator(1, 2)).flatten().tolist() == drawn[1, 2]
