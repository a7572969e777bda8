"""Pictures of runs: figures without a display, written whole or not at all."""

from pathlib import Path
from typing import Any

from adapters.training_state import TrainingError


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure, so many inches wide and high."""
    # Takes a second to load and is of no use until the end of a run.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as a PNG file.

    Raises:
        TrainingError: the file cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(part, format="png")
        part.replace(path)
    except OSError as error:
        raise TrainingError(f"{path}: cannot be written ({error})") from error
