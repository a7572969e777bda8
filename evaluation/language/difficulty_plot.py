"""Plots of prediction difficulty."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_difficulty(summary: Mapping[str, Any], path: Path) -> None:
    """Draw the losses of code and prose, and the mean rank of code's tokens by place.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(1, 2, 1)
    for kind, of in summary["kinds"].items():
        counts, largest = of["histogram"]["counts"], of["histogram"]["largest"]
        width = largest / len(counts)
        axes.step(
            [width * index for index in range(len(counts))],
            [count / of["tokens"] for count in counts], where="post", label=kind,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("loss of a token, nats")
    axes.set_ylabel("share of tokens")
    axes.legend()
    axes = figure.add_subplot(1, 2, 2)
    names = list(summary["places"])
    axes.barh(names, [of["mean_rank"] for of in summary["places"].values()])
    axes.axvline(0.5, color="black", lw=0.8)
    axes.set_xlabel("mean rank of the loss within its text")
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)
