"""Plots of code evaluations."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evaluation.code.report import BASE, PLUS


def plot_pass_at_k(summary: Mapping[str, Any], path: Path) -> None:
    """Draw pass@k of each arm over k with its 95 % interval, one panel for each set of tests.

    Raises:
        OSError: the file cannot be written.
    """
    names = [name for name in (BASE, PLUS) if any(name in of for of in summary["arms"].values())]
    figure = Figure(figsize=(5.5 * len(names), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for index, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), index + 1)
        for label, of in summary["arms"].items():
            points = of.get(name, {}).get("pass_at", {})
            ks = [int(k) for k in points]
            values = [100 * point["value"] for point in points.values()]
            errors = [
                [100 * (point["value"] - point["low"]) for point in points.values()],
                [100 * (point["high"] - point["value"]) for point in points.values()],
            ]
            axes.errorbar(ks, values, yerr=errors, marker="o", capsize=3, label=label)
        axes.set_xlabel("k")
        axes.set_ylabel("pass@k, %")
        axes.set_title("tests of the data set" if name == BASE else "with the further tests")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
