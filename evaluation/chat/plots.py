"""Plots of chat evaluations."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_categories(grades: Mapping[str, Any], path: Path) -> None:
    """Draw the mean grade of each category and model as a radar.

    Raises:
        OSError: the file cannot be written.
    """
    models = grades["models"]
    kinds = list(dict.fromkeys(kind for of in models.values() for kind in of["categories"]))
    angles = [2 * math.pi * index / len(kinds) for index in range(len(kinds))]
    figure = Figure(figsize=(6.5, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(projection="polar")
    for label, of in models.items():
        values = [of["categories"].get(kind, {}).get("value", 0.0) for kind in kinds]
        axes.plot([*angles, angles[0]], [*values, values[0]], marker="o", label=label)
    axes.set_xticks(angles, kinds)
    axes.set_ylim(0, 10)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=120)
