"""What a compression tells: `report.json`, and two pictures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.mixed_rank.ranks import break_even
from adapters.pictures import new_figure, save_figure
from adapters.training_state import TrainingError

REPORT_FILE = "report.json"
RANKS_PLOT = "ranks.png"
ERRORS_PLOT = "errors.png"


def write_report(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the report and its pictures.

    Args:
        folder: of the variant.
        content: with `options` and, by the name of what is factored together, `groups`.

    Raises:
        TrainingError: a file cannot be written.
    """
    part = folder / f".{REPORT_FILE}.part"
    try:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(folder / REPORT_FILE)
    except OSError as error:
        raise TrainingError(f"{folder / REPORT_FILE}: cannot be written ({error})") from error
    _plot_ranks(folder / RANKS_PLOT, content)
    _plot_errors(folder / ERRORS_PLOT, content)


def _by_kind(groups: Mapping[str, dict[str, Any]]) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """Sort groups by what they are, each with the number of its layer."""
    found: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for facts in groups.values():
        found.setdefault(facts["kind"], []).append((facts["layer"], facts))
    return found


def _plot_ranks(path: Path, content: Mapping[str, Any]) -> None:
    """Draw what each matrix loses at every rank, with the rank chosen; below, ranks by layer."""
    kinds = _by_kind(content["groups"])
    step = content["options"]["rank_step"]
    figure = new_figure(4 * len(kinds), 7)
    rows = figure.subplots(2, len(kinds), squeeze=False)
    for column, (kind, found) in enumerate(kinds.items()):
        above, below = rows[0][column], rows[1][column]
        for layer, facts in found:
            errors = [max(error, 1e-6) for error in facts["errors"]]
            share = layer / max(1, len(found) - 1)
            color = (share, 0.3, 1 - share)
            above.plot([step * k for k in range(len(errors))], errors, color=color, lw=0.8)
            if facts["rank"] is not None:
                above.plot(facts["rank"], max(facts["error"], 1e-6), "o", color=color, ms=4)
        above.set_yscale("log")
        above.set_title(f"{kind} (first layers blue, last ones red)", fontsize=9)
        above.set_xlabel("rank")
        above.set_ylabel("share of the outputs' energy lost")
        layers = [layer for layer, _ in found]
        limit = break_even(found[0][1]["outputs"], found[0][1]["inputs"])
        heights = [limit if facts["rank"] is None else facts["rank"] for _, facts in found]
        colors = ["0.8" if facts["rank"] is None else "C0" for _, facts in found]
        below.bar(layers, heights, color=colors)
        below.axhline(limit, color="k", lw=0.8, ls="--")
        below.set_xlabel("layer")
        below.set_ylabel("rank (grey: whole; line: no gain from here)")
    save_figure(figure, path)


def _plot_errors(path: Path, content: Mapping[str, Any]) -> None:
    """Draw errors by layer: as planned, on drifted inputs, and at the end."""
    kinds = _by_kind(content["groups"])
    figure = new_figure(4 * (len(kinds) + 1), 4)
    axes = figure.subplots(1, len(kinds) + 1, squeeze=False)[0]
    titles = {"error": "planned, inputs as they were"}
    titles |= {"error_fitted": "fitted", "error_stored": "trained and rounded"}
    for column, (kind, found) in zip(axes, kinds.items(), strict=False):
        for field, title in titles.items():
            points = [(layer, facts[field]) for layer, facts in found if facts.get(field)]
            column.plot([x for x, _ in points], [y for _, y in points], ".-", lw=0.8, label=title)
        column.set_title(kind, fontsize=9)
        column.set_xlabel("layer")
        column.set_ylabel("share of the outputs' energy lost")
        column.legend(fontsize="x-small")
    layers: dict[int, dict[str, Any]] = {}
    for found in kinds.values():
        for layer, facts in found:
            layers.setdefault(layer, {}).update(facts)
    for field, title in (("layer_error_fitted", "fitted"), ("layer_error_trained", "trained")):
        points = [
            (layer, facts[field]) for layer, facts in sorted(layers.items()) if field in facts
        ]
        axes[-1].plot([x for x, _ in points], [y for _, y in points], ".-", lw=0.8, label=title)
    axes[-1].set_title("residual stream after the layer", fontsize=9)
    axes[-1].set_xlabel("layer")
    axes[-1].set_ylabel("share of its energy lost")
    axes[-1].legend(fontsize="x-small")
    save_figure(figure, path)
