"""Whole runs: what they leave behind, and that an interrupted one ends as any other."""

import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adapters.format import CONFIG_FILE, TENSOR_FILE, AdapterError, read_adapter
from adapters.qst import training as module
from adapters.qst.adapter import load_qst
from adapters.qst.config import QstConfig
from adapters.qst.examples import Example
from adapters.qst.training_plot import PLOT_FILE
from adapters.run_log import METRICS_FILE, read_metrics
from adapters.training_state import FOLDER, TrainingError, TrainingInterrupted
from models.checkpoints import Checkpoint
from models.decoder import Decoder
from tests.adapters.qst.training.small_run import HANGING, make_examples, run
from tests.models.gguf_files import TOKENS, load_kept, write_gguf
from tests.models.tiny_models import make_model

ROOT = Path(__file__).parents[4]
Base = tuple[Checkpoint, Decoder]


@pytest.fixture(scope="session")
def finished(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("runs") / "finished"
    run(base, output)
    return output


def without_speed(folder: Path) -> list[dict]:
    """Metrics without what depends on the machine."""
    records = read_metrics(folder)
    for record in records:
        record.pop("tokens_per_s", None)
        record.pop("memory", None)
    return records


def test_run_leaves_adapter_metrics_and_plot(finished: Path, base: Base) -> None:
    assert sorted(path.name for path in finished.iterdir()) == sorted(
        [CONFIG_FILE, TENSOR_FILE, METRICS_FILE, PLOT_FILE]
    )
    assert (finished / PLOT_FILE).read_bytes().startswith(b"\x89PNG")
    checkpoint, decoder = base
    adapter = load_qst(finished, decoder.spec, fingerprint=checkpoint.fingerprint, model_id="tiny")
    assert adapter.config.training["steps"] == 12
    assert adapter.config.training["options"]["seed"] == 0
    assert adapter.config.training["options"]["accumulate"] == 2


def test_metrics_have_every_step_and_evaluation(finished: Path) -> None:
    records = read_metrics(finished)
    steps = [r for r in records if r["event"] == "step"]
    evals = [r for r in records if r["event"] == "eval"]
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert [r["step"] for r in evals] == [4, 8, 12]
    assert set(steps[0]) == {
        "event", "step", "loss", "learning_rate", "gradient_norm", "alpha", "tokens", "tokens_per_s"
    }  # fmt: skip
    assert len({r["base_loss"] for r in evals}) == 1
    assert evals[-1]["perplexity"] == pytest.approx(math.exp(evals[-1]["loss"]))
    assert records[-1]["event"] == "summary"
    assert records[-1]["held_out_loss"] == evals[-1]["loss"]
    assert records[-1]["base_held_out_loss"] == evals[0]["base_loss"]
    assert records[-1]["tokens"] == sum(r["tokens"] for r in steps)
    assert set(records[-1]["memory"]) == {
        "base_weights", "side_network", "optimizer", "activations", "peak"
    }  # fmt: skip


def test_side_network_trains_on_a_base_of_a_gguf_files_own_codes(tmp_path: Path) -> None:
    kinds = ("Q4_1", "Q8_0", "F16")
    make_model("smollm", vocab_size=len(TOKENS)).save_pretrained(tmp_path / "tiny")
    checkpoint = load_kept(write_gguf(tmp_path / "Tiny.gguf", tmp_path / "tiny", kinds=kinds))
    decoder = Decoder(checkpoint.spec, checkpoint.weights, kernels="reference")
    output = tmp_path / "run"
    result = run((checkpoint, decoder), output, steps=60, batch_size=8, eval_every=60)
    assert result.evaluation is not None
    assert result.evaluation.base_loss is not None
    assert result.loss < result.evaluation.base_loss / 2
    assert read_adapter(output).config.base_quantization == "gguf"


def test_training_lowers_the_loss(base: Base, tmp_path: Path) -> None:
    result = run(base, tmp_path / "run", steps=60, batch_size=8, eval_every=60)
    assert result.evaluation is not None
    assert result.evaluation.base_loss is not None
    losses = [r["loss"] for r in read_metrics(tmp_path / "run") if r["event"] == "step"]
    assert sum(losses[-10:]) < sum(losses[:10]) - 1
    assert result.steps == 60


def test_same_seed_gives_the_same_bits(finished: Path, base: Base, tmp_path: Path) -> None:
    run(base, tmp_path / "run")
    assert (tmp_path / "run" / TENSOR_FILE).read_bytes() == (finished / TENSOR_FILE).read_bytes()
    run(base, tmp_path / "other", seed=1)
    assert (tmp_path / "other" / TENSOR_FILE).read_bytes() != (finished / TENSOR_FILE).read_bytes()


@pytest.mark.parametrize("stop_after", [1, 3, 7, 11])
def test_resumed_run_ends_as_an_uninterrupted_one(
    stop_after: int, finished: Path, base: Base, tmp_path: Path
) -> None:
    steps = iter(range(1, 100))
    with pytest.raises(TrainingInterrupted, match=f"stopped after step {stop_after}"):
        run(base, tmp_path, should_stop=lambda: next(steps) == stop_after)
    lines: list[str] = []
    run(base, tmp_path, resume=True, report=lines.append)
    assert lines[0] == f"resuming after step {stop_after} of 12"
    assert (tmp_path / TENSOR_FILE).read_bytes() == (finished / TENSOR_FILE).read_bytes()
    assert without_speed(tmp_path) == without_speed(finished)
    assert not (tmp_path / FOLDER).exists()


def test_fork_trains_and_resumes_to_the_same_file(base: Base, tmp_path: Path) -> None:
    qst = QstConfig(side_attention="base", side_layers=2, rank=4)
    whole = run(base, tmp_path / "whole", qst=qst)
    assert whole.evaluation is not None
    assert whole.evaluation.loss < whole.evaluation.base_loss  # type: ignore[operator]
    steps = iter(range(1, 100))
    with pytest.raises(TrainingInterrupted):
        run(base, tmp_path / "parts", qst=qst, should_stop=lambda: next(steps) == 7)
    run(base, tmp_path / "parts", qst=qst, resume=True)
    files = [(tmp_path / name / TENSOR_FILE).read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


@pytest.mark.parametrize(("where", "resumes_at"), [("step", 6), ("save", 6)], ids=HANGING.values())
def test_killed_run_loses_the_steps_since_its_checkpoint_and_no_more(
    where: str, resumes_at: int, finished: Path, base: Base, tmp_path: Path, tiny_llama_folder: Path
) -> None:
    program = "tests.adapters.qst.training.small_run"
    process = subprocess.Popen(
        [sys.executable, "-m", program, str(tiny_llama_folder), str(tmp_path), where],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "hanging\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    assert len(read_metrics(tmp_path)) > resumes_at
    lines: list[str] = []
    run(base, tmp_path, resume=True, report=lines.append)
    assert lines[0] == f"resuming after step {resumes_at} of 12"
    assert (tmp_path / TENSOR_FILE).read_bytes() == (finished / TENSOR_FILE).read_bytes()
    assert without_speed(tmp_path) == without_speed(finished)


def interrupt(base: Base, output: Path, **options: object) -> None:
    with pytest.raises(TrainingInterrupted):
        run(base, output, should_stop=lambda: True, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.5}, "learning_rate: 0.01 then, 0.5 now"),
        ({"steps": 13, "seed": 2}, "seed: 0 then, 2 now; steps: 12 then, 13 now"),
        ({"qst": QstConfig(reduction=2)}, "reduction: 4 then, 2 now"),
        ({"examples": make_examples()[:-1]}, "data: '[0-9a-f]{64}' then, '[0-9a-f]{64}' now"),
        ({"eval_examples": make_examples()[:2]}, "eval_data: "),
    ],
    ids=["rate", "several", "side network", "data", "held out"],
)
def test_run_is_not_resumed_with_other_options(
    change: dict, message: str, base: Base, tmp_path: Path
) -> None:
    interrupt(base, tmp_path)
    with pytest.raises(TrainingError, match=message):
        run(base, tmp_path, resume=True, **change)
    assert (tmp_path / FOLDER / "step-00000001").is_dir()


def test_resuming_where_nothing_is_starts(base: Base, finished: Path, tmp_path: Path) -> None:
    run(base, tmp_path / "new", resume=True)
    assert (tmp_path / "new" / TENSOR_FILE).read_bytes() == (finished / TENSOR_FILE).read_bytes()


def test_complete_run_is_not_done_again(base: Base, finished: Path) -> None:
    with pytest.raises(TrainingError, match="is complete"):
        run(base, finished, resume=True)
    with pytest.raises(TrainingError, match="is not empty; name a new folder, or resume"):
        run(base, finished)


def test_output_that_is_a_file_is_refused(base: Base, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="file is a file; name a folder"):
        run(base, tmp_path / "file")
    with pytest.raises(TrainingError, match="cannot be made"):
        run(base, tmp_path / "file" / "below")


def test_full_disk_keeps_the_last_checkpoint(
    base: Base, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(base, tmp_path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("adapters.training_state._write", fail)
        with pytest.raises(TrainingError, match=r"step 3 cannot .* No space left .*step-00000001"):
            run(base, tmp_path, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr("adapters.run_log.os.fsync", fail)
        with pytest.raises(TrainingError, match=r"metrics.jsonl: cannot be written .*No space"):
            run(base, tmp_path, resume=True)
    run(base, tmp_path, resume=True)
    assert (tmp_path / TENSOR_FILE).read_bytes() == (finished / TENSOR_FILE).read_bytes()


def test_disk_that_is_full_at_the_end_costs_no_step(
    base: Base, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AdapterError("the adapter cannot be written")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_qst", fail)
        with pytest.raises(AdapterError, match="cannot be written"):
            run(base, tmp_path)
    lines: list[str] = []
    result = run(base, tmp_path, resume=True, report=lines.append)
    assert lines[0] == "resuming after step 12 of 12"
    assert math.isnan(result.loss)
    assert (tmp_path / TENSOR_FILE).read_bytes() == (finished / TENSOR_FILE).read_bytes()
    assert without_speed(tmp_path) == without_speed(finished)


def test_loss_that_is_not_finite_stops_the_run(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = module.Trainer.step, iter(range(1, 100))

    def spoilt(self: module.Trainer, *arguments: object) -> object:
        if next(calls) == 5:
            with torch.no_grad():
                self.network.get_parameter("up.bias").fill_(torch.nan)
        return step(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module.Trainer, "step", spoilt)
    with pytest.raises(TrainingError, match="step 5: the loss is nan; the last checkpoint is kept"):
        run(base, tmp_path)
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["step-00000003"]


def test_best_weights_are_kept_and_survive_a_stop(base: Base, tmp_path: Path) -> None:
    options: dict = {"keep": "best", "eval_every": 1, "alpha_learning_rate": 0.9, "warmup": 0.0}
    steps = iter(range(1, 100))
    whole = run(base, tmp_path / "whole", **options)
    with pytest.raises(TrainingInterrupted):
        run(base, tmp_path / "parts", should_stop=lambda: next(steps) == 6, **options)
    parts = run(base, tmp_path / "parts", resume=True, **options)
    evals = [r for r in read_metrics(tmp_path / "whole") if r["event"] == "eval"]
    assert whole.evaluation is not None
    assert whole.evaluation.loss == min(r["loss"] for r in evals) < evals[-1]["loss"]
    assert parts.evaluation == whole.evaluation
    files = [(tmp_path / name / TENSOR_FILE).read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_epochs_end_with_the_last_example(base: Base, tmp_path: Path) -> None:
    result = run(base, tmp_path, steps=None, epochs=2, eval_fraction=0.0)
    records = read_metrics(tmp_path)
    assert result.steps == 8
    assert result.evaluation is None
    assert records[-1]["tokens"] == 2 * sum(len(e.token_ids) for e in make_examples())


def test_classifier_is_trained_and_written(base: Base, tmp_path: Path) -> None:
    examples = [Example(token_ids=[i, i + 1, 100 + 50 * (i % 2)], label=i % 2) for i in range(24)]
    qst = QstConfig(reduction=4, task="sequence_classification", num_labels=2, labels=("no", "yes"))
    result = run(base, tmp_path, examples, qst, learning_rate=0.03, steps=20, keep="best")
    assert result.evaluation is not None
    assert result.evaluation.accuracy == 1.0
    stored = read_adapter(tmp_path)
    assert stored.config.fields["labels"] == ["no", "yes"]
    assert "classifier.weight" in stored.tensors


TEXT = Example(token_ids=[1, 2], is_target=[0, 1])


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "there are no examples"),
        ([TEXT, Example(token_ids=[], is_target=[])], "example 2: needs token ids from 0 to 259"),
        ([Example(token_ids=[1, 260], is_target=[0, 1])], "example 1: needs token ids"),
        ([Example(token_ids=[1, 2], is_target=[0])], "is_target must have one entry"),
        ([Example(token_ids=[1, 2], is_target=[1, 0])], "has no token to predict"),
        ([Example(token_ids=[1, 2], label=0)], "causal_lm takes examples without labels"),
    ],
    ids=["none", "empty", "unknown token", "short mask", "no target", "label"],
)
def test_examples_that_cannot_be_learnt_are_refused(
    examples: list, message: str, base: Base, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=message):
        run(base, tmp_path / "run", examples, eval_examples=[])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("example", "message"),
    [(TEXT, "takes examples with labels"), (Example(token_ids=[1], label=2), "label 2 is not")],
)
def test_classes_that_do_not_exist_are_refused(
    example: Example, message: str, base: Base, tmp_path: Path
) -> None:
    qst = QstConfig(reduction=4, task="sequence_classification", num_labels=2)
    with pytest.raises(TrainingError, match=message):
        run(base, tmp_path / "run", [example], qst, eval_examples=[])


def test_metrics_lost_with_the_file_do_not_stop_a_run(base: Base, tmp_path: Path) -> None:
    interrupt(base, tmp_path)
    (tmp_path / METRICS_FILE).unlink()
    run(base, tmp_path, resume=True)
    assert [r["step"] for r in read_metrics(tmp_path) if r["event"] == "step"] == list(range(2, 13))
