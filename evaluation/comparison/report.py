"""The report of a comparison: Markdown, HTML with the plots in it, CSV."""

import base64
import csv
import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from evaluation.comparison.figures import SIGNIFICANT, Outcomes
from evaluation.tables import p_value, percent, points, table

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;padding:.3rem .6rem}"
    "img{max-width:100%}"
)


def to_markdown(summary: Mapping[str, Any], title: str, plots: Mapping[str, str]) -> str:
    """Return the figures as a page.

    Args:
        summary: of `figures.compare`.
        title: of the page.
        plots: file names of pictures, by what they show.
    """
    labels = list(summary["arms"])
    lines = [f"# {title}", ""]
    lines += [f"{summary['tasks']} tasks, {summary['samples']} samples of each by each arm.", ""]
    lines += table(
        ["", "mean, %"], [[f"`{m}`", percent(of["mean"])] for m, of in summary["arms"].items()]
    )
    lines.append("")
    if summary["samples"] > 1 and "any_of" in next(iter(summary["arms"].values())):
        for name, words in (("any_of", "pass@k: any of k"), ("all_of", "pass^k: all of k")):
            ks = list(next(iter(summary["arms"].values()))[name])
            lines += [f"{words} samples right, %:", ""]
            lines += table(
                ["", *(f"k = {k}" for k in ks)],
                [
                    [f"`{m}`", *(percent(of[name].get(k)) for k in ks)]
                    for m, of in summary["arms"].items()
                ],
            )
            lines.append("")
    lines += [f"## Against `{labels[0]}`", ""]
    lines += table(
        ["", "difference, points", "p", "test", "verdict"],
        [
            [f"`{m}`", points(p["difference"]), f"{p['difference']['p']:.3f}", p["test"],
             _verdict(p)]
            for m, p in summary["pairs"].items()
        ],
    )  # fmt: skip
    lines += ["", "What pairing saves, of the variance of the difference:", ""]
    lines += table(
        ["", "same tasks", "same random numbers"],
        [
            [f"`{m}`", _saved(p["variance"]["pairing"]), _saved(p["variance"]["random_numbers"])]
            for m, p in summary["pairs"].items()
        ],
    )
    lines.append("")
    if summary["calibration"] is not None:
        lines += _calibration(summary["calibration"], labels[0])
    for words, name in plots.items():
        lines += [f"![{words}]({name})", ""]
    lines.append(
        "Brackets: 95 % intervals by bootstrap over tasks. p is two-sided and of each pair by "
        f"itself; with several arms, judge at {SIGNIFICANT:g} divided by their number."
    )
    return "\n".join(lines) + "\n"


def _calibration(pair: Mapping[str, Any], label: str) -> list[str]:
    is_quiet = not pair["is_decided"]
    return [
        "## Calibration",
        "",
        f"`{label}` against itself with other random numbers: {points(pair['difference'])} "
        f"points, {p_value(pair['difference']['p'])}. "
        + (
            "So large a difference is noise."
            if is_quiet
            else "That is more than chance makes in 19 of 20 runs: look for what differs."
        ),
        "",
    ]


def _verdict(pair: Mapping[str, Any]) -> str:
    if pair["is_decided"]:
        return "better" if pair["difference"]["value"] > 0 else "worse"
    if pair["more_tasks"]:
        return f"undecided; {pair['more_tasks']} more tasks would show a difference of this size"
    return "undecided"


def _saved(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def to_html(page: str, folder: Path) -> str:
    """Return a Markdown page as one HTML file, its pictures inside.

    Args:
        page: in Markdown.
        folder: where its pictures are.

    Raises:
        OSError: a picture cannot be read.
    """
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(page)
    for path in sorted(folder.glob("*.png")):
        data = base64.b64encode(path.read_bytes()).decode()
        body = body.replace(f'src="{path.name}"', f'src="data:image/png;base64,{data}"')
    title = html.escape(page.partition("\n")[0].lstrip("# "))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style><body>{body}</body></html>\n"
    )


def to_csv(arms: Mapping[str, Outcomes]) -> str:
    """Return every outcome as a row: arm, task, sample, outcome."""
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(["arm", "task", "sample", "outcome"])
    for label, outcomes in arms.items():
        for task, samples in outcomes.items():
            for number, value in enumerate(samples):
                writer.writerow([label, task, number, f"{value:g}"])
    return output.getvalue()
