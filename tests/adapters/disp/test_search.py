"""Whole searches: what they leave behind, and that an interrupted one ends as any other."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapters import run_loop
from adapters.disp import search as module
from adapters.disp.budget import BudgetError
from adapters.disp.masked import MaskedDecoder
from adapters.disp.search import SearchResult, search
from adapters.disp.search_config import SearchConfig
from adapters.disp.search_plots import PLOT_FILE
from adapters.disp.searcher import mean_loss, selection_masks
from adapters.disp.variant import load_disp
from adapters.format import CONFIG_FILE, TENSOR_FILE
from adapters.run_log import METRICS_FILE, read_metrics
from adapters.training_state import (
    FOLDER,
    Progress,
    TrainingError,
    TrainingInterrupted,
    load_progress,
)
from adapters.windows import Windows
from models.checkpoints import Checkpoint
from models.pruning import (
    MODULES,
    LayerSelection,
    Selections,
    count_fixed,
    count_linears,
    widths_of,
)
from tests.adapters.fitted_base import LENGTH, fitted_checkpoint, make_text

CPU = torch.device("cpu")
SERVED = "5" * 64
OPTIONS: dict[str, object] = {
    "compute_dtype": "float32",
    "remove": (0.4, 0.2), "steps": 6, "further_steps": 6, "batch_size": 2, "length": LENGTH,
    "align": 8, "eval_windows": 4, "eval_every": 4, "checkpoint_every": 5,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def _without_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the second that drawing takes."""
    monkeypatch.setattr(module, "plot_widths", lambda *_: None)


def run(
    output: Path,
    tokens: Tensor | Sequence[int] | None = None,
    checkpoint: Checkpoint | None = None,
    **options: object,
) -> tuple[SearchResult, ...]:
    """Search with `OPTIONS`, changed by those of them and of `search` that are given."""
    rest = {k: options.pop(k) for k in list(options) if k not in SearchConfig.__slots__}
    return search(
        checkpoint or fitted_checkpoint(), make_text() if tokens is None else tokens, output,
        base_fingerprint=SERVED, base_quantization="nf4",
        config=SearchConfig(**{**OPTIONS, **options}), **rest,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[SearchResult, ...]]:
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("searches") / "finished"
    return output, run(output, description="for tests")


def without_speed(folder: Path) -> list[dict]:
    """Metrics without what depends on the machine."""
    records = read_metrics(folder)
    for record in records:
        record.pop("tokens_per_s", None)
        record.pop("seconds", None)
    return records


def test_search_leaves_variants_metrics_and_a_picture(
    finished: tuple[Path, tuple[SearchResult, ...]],
) -> None:
    output, results = finished
    assert {p.name for p in output.iterdir()} == {
        METRICS_FILE, PLOT_FILE, "remove-20", "remove-40",
    }  # fmt: skip
    assert (output / PLOT_FILE).read_bytes().startswith(b"\x89PNG")
    checkpoint = fitted_checkpoint()
    assert [r.remove for r in results] == [0.2, 0.4]
    for result in results:
        assert {p.name for p in result.folder.iterdir()} == {CONFIG_FILE, TENSOR_FILE}
        found = load_disp(
            result.folder, checkpoint.spec, fingerprint=SERVED, quantization="nf4", model_id="tiny"
        )
        assert found.disp.dense_fingerprint == checkpoint.fingerprint
        assert (found.disp.align, found.disp.residual) == (8, "independent")
        assert found.disp.remove_linears == result.remove_linears
        assert result.remove_linears == pytest.approx(result.remove, abs=0.01)
        assert result.remove_total < result.remove_linears
        widths = [s.widths for s in found.selections]
        linears = count_linears(checkpoint.spec, widths)
        assert result.parameters == linears + count_fixed(checkpoint.spec)
        assert found.config.training["options"]["seed"] == 0
        windows = Windows(make_text(), LENGTH, held_out=4, spec=checkpoint.spec)
        base = MaskedDecoder(checkpoint.spec, checkpoint.weights)
        masks = selection_masks(found.selections, widths_of(checkpoint.spec), CPU)
        assert result.loss == mean_loss(base, windows.held_out, 2, masks)
        assert result.dense_loss == mean_loss(base, windows.held_out, 2)


def test_metrics_have_every_step_evaluation_and_result(
    finished: tuple[Path, tuple[SearchResult, ...]],
) -> None:
    records = read_metrics(finished[0])
    steps = [r for r in records if r["event"] == "step"]
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert set(steps[0]) == {
        "event", "step", "remove", "target", "learning_rate", "loss", "penalty",
        "kept_drawn", "kept", "widths", "gradient_norm", "num_tokens", "tokens_per_s",
    }  # fmt: skip
    assert [r["remove"] for r in steps] == [0.2] * 6 + [0.4] * 6
    targets = [1 - 0.2 * i / 3 for i in (1, 2, 3)] + [0.8] * 3
    assert [r["target"] for r in steps[:6]] == pytest.approx(targets)
    assert steps[6]["target"] == pytest.approx(0.8 - 0.2 / 3)
    assert [(r["event"], r["step"]) for r in records if r["event"] != "step"] == [
        ("eval", 4), ("result", 6), ("eval", 8), ("result", 12),
    ]  # fmt: skip


@pytest.mark.usefixtures("_without_picture")
def test_one_share_is_written_to_the_output_itself(tmp_path: Path) -> None:
    (result,) = run(tmp_path, remove=(0.3,))
    assert result.folder == tmp_path
    assert (tmp_path / TENSOR_FILE).exists()
    assert not (tmp_path / FOLDER).exists()
    with pytest.raises(TrainingError, match="is complete"):
        run(tmp_path, remove=(0.3,), resume=True)
    with pytest.raises(TrainingError, match="is not empty"):
        run(tmp_path)


def stop_after(step: int, output: Path, **options: object) -> None:
    steps = iter(range(1, 100))
    with pytest.raises(TrainingInterrupted, match="stopped after step"):
        run(output, should_stop=lambda: next(steps) >= step, **options)


@pytest.mark.usefixtures("_without_picture")
@pytest.mark.parametrize(
    ("residual", "stops"),
    [("independent", (1,)), ("independent", (6,)), ("shared", (7, 2))],
    ids=str,
)
def test_resumed_search_ends_as_any_other(
    residual: str, stops: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: dict[Path, dict[str, Tensor]] = {}
    save = run_loop.save_progress

    def save_and_note(folder: Path, progress: Progress, tensors: dict[str, Tensor]) -> None:
        saved[folder.parent] = {name: tensor.clone() for name, tensor in tensors.items()}
        save(folder, progress, tensors)

    monkeypatch.setattr(run_loop, "save_progress", save_and_note)
    for stop in stops:
        stop_after(stop, tmp_path / "parts", resume=True, residual=residual)
    for name in ("parts", "whole"):
        run(tmp_path / name, resume=True, residual=residual)
    parts, whole = saved[tmp_path / "parts"], saved[tmp_path / "whole"]
    assert float(whole["step.norm.weight"]) == 12
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    assert without_speed(tmp_path / "parts") == without_speed(tmp_path / "whole")
    for share in ("remove-20", "remove-40"):
        files = [(tmp_path / n / share / TENSOR_FILE).read_bytes() for n in ("whole", "parts")]
        assert files[0] == files[1]


def test_other_options_or_text_are_not_resumed(tmp_path: Path) -> None:
    stop_after(2, tmp_path)
    with pytest.raises(TrainingError, match=r"other options or data: .*penalty: 6.0 then, 3.0 now"):
        run(tmp_path, resume=True, penalty=3.0)
    with pytest.raises(TrainingError, match="other options or data: data: "):
        run(tmp_path, tokens=make_text(3000), resume=True)
    assert load_progress(tmp_path / FOLDER) is not None


@pytest.mark.usefixtures("_without_picture")
def test_loss_that_is_not_finite_stops_at_its_step_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = MaskedDecoder.loss, iter(range(1, 1000))

    def spoilt(self: MaskedDecoder, windows: Tensor, masks: object = None) -> Tensor:
        value = loss(self, windows, masks)  # type: ignore[arg-type]
        return value * torch.nan if masks is not None and next(calls) == 9 else value

    monkeypatch.setattr(MaskedDecoder, "loss", spoilt)
    options: dict[str, object] = {"eval_windows": 0}
    with pytest.raises(
        TrainingError, match=r"step 9: the loss is nan; the last checkpoint is kept in .*; a lower"
    ):
        run(tmp_path, **options)
    found = load_progress(tmp_path / FOLDER)
    assert found is not None
    assert found[0].step == 6
    assert all(t.isfinite().all() for t in found[1].values())
    monkeypatch.undo()
    assert len(run(tmp_path, resume=True, **options)) == 2


@pytest.mark.parametrize("tokens", [[], [1] * LENGTH], ids=["empty", "short"])
def test_text_shorter_than_a_window_is_refused(tokens: list[int], tmp_path: Path) -> None:
    message = rf"at least length \+ 1 = {LENGTH + 1} tokens, got {len(tokens)}"
    with pytest.raises(TrainingError, match=message):
        run(tmp_path / "run", tokens=tokens)
    assert not (tmp_path / "run").exists()


def test_share_that_cannot_be_removed_is_refused_with_the_maximum(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"remove must be at most 0.7857 .*, got 0.9: .*32"):
        run(tmp_path / "run", remove=(0.3, 0.9), align=32)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("_without_picture")
def test_text_of_one_window_is_searched_on_without_holding_out(tmp_path: Path) -> None:
    results = run(tmp_path, tokens=make_text(LENGTH + 1), steps=2)
    assert {(r.loss, r.dense_loss) for r in results} == {(None, None)}


@pytest.mark.usefixtures("_without_picture")
@pytest.mark.parametrize("estimator", ["ste", "gumbel"])
def test_other_estimators_and_checkpointing_run(estimator: str, tmp_path: Path) -> None:
    (result,) = run(
        tmp_path, remove=(0.3,), estimator=estimator, gradient_checkpointing=True, steps=10
    )
    assert result.remove_linears == pytest.approx(0.3, abs=0.01)


def random_like(selections: Selections, seed: int) -> Selections:
    """Return random channels in the same widths."""
    generator = torch.Generator().manual_seed(seed)
    full = widths_of(fitted_checkpoint().spec)

    def draw(count: int, width: int) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(width, generator=generator)[:count].tolist()))

    return tuple(
        LayerSelection(
            **{
                name: draw(len(getattr(s, name)), width)
                for name, width in zip(MODULES, layer, strict=True)
            }
        )
        for s, layer in zip(selections, full, strict=True)
    )


@pytest.mark.usefixtures("_without_picture")
def test_search_beats_random_channels_and_keeps_to_the_target(tmp_path: Path) -> None:
    checkpoint = fitted_checkpoint()
    (result,) = run(tmp_path, remove=(0.3,), steps=300, eval_every=300, eval_windows=12)
    assert abs(result.ratio_error) < 0.01
    last = [r for r in read_metrics(tmp_path) if r["event"] == "step"][-1]
    assert abs(last["kept"] / 0.7 - 1) < 0.01
    assert result.loss is not None
    assert result.dense_loss is not None
    found = load_disp(
        tmp_path, checkpoint.spec, fingerprint=SERVED, quantization="nf4", model_id="tiny"
    )
    held_out = Windows(make_text(), LENGTH, held_out=12, spec=checkpoint.spec).held_out
    base = MaskedDecoder(checkpoint.spec, checkpoint.weights)
    masks = [
        selection_masks(random_like(found.selections, seed), widths_of(checkpoint.spec), CPU)
        for seed in range(5)
    ]
    losses = [mean_loss(base, held_out, 4, chosen) for chosen in masks]
    assert result.loss < sum(losses) / 5 - 0.03
