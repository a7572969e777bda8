"""Make docs/results/disp.md and disp.png of the figures that `benchmarks.disp` has kept.

    python -m benchmarks.disp_report

Every number of ours is read from the file. What is missing there is named and nothing is written,
unless `--partial` lets the report say "not measured".
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.disp import KINDS, RATIOS, RESULTS_FILE
from benchmarks.disp_tables import (
    NOT_MEASURED,
    TITLES,
    Report,
    goals,
    healing_lines,
    number,
    paper_table,
    perplexity_table,
    ratio_table,
    shared_mb,
    speed_table,
    winners,
)
from benchmarks.report import ROOT

OUTPUT = ROOT / "docs" / "results"
BASES = {
    "gguf": "computed from its file's own codes; of a variant, matrices whose inputs are cut are "
    "rounded once more, to Q4_1",
    "nf4": "in NF4, variants too",
    "none": "without quantisation",
}


class MissingFigures(ValueError):
    """The file lacks figures that the report needs."""


def setting_lines(report: Report, content: Mapping[str, Any]) -> list[str]:
    """List texts, options and machines."""
    lines = []
    for stage, found in content["stages"].items():
        run = found.get("run", {})
        lines.append(
            f"- `{stage}`: {run.get('date', '?')[:10]}, {run.get('cpu', '?')}, commit "
            f"`{_short_commit(run.get('commit'))}`, settings "
            f"`{json.dumps(_shown(found['settings']))}`"
        )
    options = report.variant("disp-30").get("options")
    shown = NOT_MEASURED if options is None else f"`{json.dumps(options)}`"
    return [*lines, "", f"Options of the search, with the defaults: {shown}."]


def _short_commit(commit: str | None) -> str:
    """Shorten a hash, but not what tells that files differed from it."""
    return "unknown" if commit is None else commit[:12] + commit[40:]


def _shown(value: object) -> object:
    """Shorten hashes."""
    if isinstance(value, dict):
        return {k: str(v)[:12] if k == "sha256" else _shown(v) for k, v in value.items()}
    return value


def write_report(content: Mapping[str, Any], report: Report) -> str:
    """Return the report in Markdown."""
    test = report.stages.get("perplexity", {}).get("settings", {})
    windows = report.item("perplexity", "base").get("windows")
    dense = report.perplexity("base-dense")
    base = report.item("perplexity", "base").get("quantization", "")
    speeds = report.item("decode", "models")
    lines = [
        "# Pruning with DISP-LLM",
        "",
        "Made by `python -m benchmarks.disp_report` of "
        "[raw figures](../../benchmarks/results/disp.json); [pruning.md](../pruning.md) tells how "
        f"to repeat them. {content['model']}, {BASES.get(base, NOT_MEASURED)}. Ratios are medians "
        "of rounds run in turn, each against the base in the same round.",
        "",
        "## Goals",
        "",
        *goals(report),
        "",
        "## What is removed",
        "",
        "A share names what is removed of the parameters of the decoder's linears. The embeddings, "
        "which are also the output layer, and the norms stay, so the share of the whole model is "
        "smaller. The paper's tables count the whole model. Each search was one run over all its "
        "shares, each going on from the one before; its minutes are those of its own steps.",
        "",
        *ratio_table(report),
        "",
        "## Perplexity",
        "",
        f"WikiText-2, raw test text: {windows or NOT_MEASURED} windows of "
        f"{test.get('length', NOT_MEASURED)} tokens, each by itself. Searches and healing saw "
        "another text, a slice of the training part. The base has "
        f"{number(report.perplexity('base'))}; unpacked and without rounding of activations "
        f"{number(dense)}.",
        "",
        "*Magnitude* and *random* keep as many channels as DISP-LLM in every selection of every "
        "layer, so all are of equal size. *One shared set of residual channels* is the same search "
        "made dimension-dependent.",
        "",
        *perplexity_table(report, "perplexity"),
        "",
        "Before healing " + "; ".join(winners(report, "perplexity")) + ".",
        "",
        "![Perplexity against the share removed](disp.png)",
        "",
        "## Healing",
        "",
        "A QST side network trained on each pruned model, on the search text.",
        "",
        *perplexity_table(report, "heal"),
        "",
        "After healing " + "; ".join(winners(report, "heal")) + ".",
        "",
        *healing_lines(report),
        "",
        "## Size and speed",
        "",
        "Weights of its own: those that are not the base's own tensors, in 4 bits; for the base, "
        "its layers. Embeddings, norms and output layer are shared, "
        f"{number(shared_mb(report), 1)} MB as stored. Speeds are of the kernels "
        f"`{speeds.get('kernels', NOT_MEASURED)}`.",
        "",
        *speed_table(report),
        "",
        "## Beside the paper",
        "",
        "Other models, texts cut otherwise, and far more training: only the growth against the "
        "dense model compares, and roughly. The paper's searches see 41 million tokens.",
        "",
        *paper_table(report),
        "",
        "## Settings",
        "",
        *setting_lines(report, content),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def draw(report: Report, path: Path) -> None:
    """Draw perplexity against the share removed, before and after healing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number_of, kind in enumerate(KINDS):
        for stage, style in (("perplexity", "o-"), ("heal", "s--")):
            found = {
                ratio: report.stages.get(stage, {}).get("items", {}).get(name, {}).get("perplexity")
                for ratio, name in [(0, "base"), *((r, f"{kind}-{r}") for r in RATIOS)]
            }
            known = {ratio: value for ratio, value in found.items() if value is not None}
            label = TITLES[kind] + (", healed" if stage == "heal" else "")
            axes.plot(
                list(known), list(known.values()), style, color=f"C{number_of}", label=label, lw=1,
                ms=4,
            )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("parameters of the linears removed (%)")
    axes.set_ylabel("perplexity, WikiText-2 raw test")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, format="png")


def make_report(content: Mapping[str, Any], output: Path, *, is_partial: bool = False) -> None:
    """Write the report and its picture.

    Raises:
        MissingFigures: names what is missing, unless a partial report is wanted.
    """
    report = Report(content)
    text = write_report(content, report)
    if report.missing and not is_partial:
        raise MissingFigures(f"no figures of {'; '.join(sorted(report.missing))}")
    output.mkdir(parents=True, exist_ok=True)
    (output / "disp.md").write_text(text, encoding="utf-8")
    draw(report, output / "disp.png")


def main() -> int:
    """Make the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS_FILE)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--partial", action="store_true", help="write it with figures missing")
    options = parser.parse_args()
    content = json.loads(options.results.read_text(encoding="utf-8"))
    try:
        make_report(content, options.output, is_partial=options.partial)
    except MissingFigures as error:
        print(f"benchmark: {options.results}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
