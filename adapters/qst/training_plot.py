"""The picture of a training run."""

from pathlib import Path

from adapters.pictures import new_figure, save_figure
from adapters.run_log import read_metrics

PLOT_FILE = "loss.png"


def plot_losses(folder: Path) -> None:
    """Draw the losses of `metrics.jsonl` into `loss.png`.

    Raises:
        TrainingError: the file cannot be written.
    """
    records = read_metrics(folder)
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    steps = [r for r in records if r["event"] == "step"]
    evals = [r for r in records if r["event"] == "eval"]
    axes.plot([r["step"] for r in steps], [r["loss"] for r in steps], lw=0.8, label="training")
    if evals:
        axes.plot([r["step"] for r in evals], [r["loss"] for r in evals], "o-", label="held out")
    if evals and evals[0].get("base_loss") is not None:
        axes.axhline(evals[0]["base_loss"], color="grey", ls="--", label="base, held out")
    axes.set_xlabel("step")
    axes.set_ylabel("cross entropy (nats)")
    axes.legend()
    save_figure(figure, folder / PLOT_FILE)
