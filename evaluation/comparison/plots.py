"""Plots of comparisons."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_effects(summary: Mapping[str, Any], path: Path) -> None:
    """Draw each arm's difference to the first with its interval.

    Raises:
        OSError: the file cannot be written.
    """
    pairs = dict(summary["pairs"])
    if summary["calibration"] is not None:
        pairs["the first arm again"] = summary["calibration"]
    figure = Figure(figsize=(7, 1.2 + 0.5 * len(pairs)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, pair in enumerate(pairs.values()):
        value, low, high = (100 * pair["difference"][name] for name in ("value", "low", "high"))
        axes.errorbar(
            value, -place, xerr=[[value - low], [high - value]], marker="o", capsize=4,
            color="C0" if pair["is_decided"] else "grey",
        )  # fmt: skip
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks([-place for place in range(len(pairs))], list(pairs))
    axes.set_xlabel(f"points against {next(iter(summary['arms']))}")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
