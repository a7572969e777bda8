"""Tables of the report on pruning: what the kept figures say, laid out and judged."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.disp import KINDS, RATIOS

NOT_MEASURED = "not measured"
TITLES = {
    "disp": "DISP-LLM",
    "shared": "one shared set of residual channels",
    "magnitude": "magnitude",
    "random": "random",
}
# LLaMA-2-7B on WikiText-2, by share removed in percent: of the whole model, windows of 4,096 (the
# paper's abstract and tables as quoted by others), and of the linears, windows of 2,048 (re-run).
PAPER = {0: 5.12, 20: 6.10, 30: 6.85, 40: 8.11, 50: 9.84}
RERUN = {0: 5.47, 14.3: 6.80, 25.0: 8.52, 35.6: 10.92}
DECODE_GOALS = {20: 1.1}
HEALING_GOAL = 0.5
ACCURACY_GOAL = 0.01
SEARCH_GOAL_S = 25 * 60


class Report:
    """The figures, looked up by what they are; what is missing is remembered.

    Args:
        content: of `results/disp.json`.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.stages: Mapping[str, Any] = content["stages"]
        self.missing: list[str] = []

    def item(self, stage: str, name: str) -> Mapping[str, Any]:
        """Return the figures of an item, empty if there are none."""
        found = self.stages.get(stage, {}).get("items", {}).get(name)
        if found is None and (label := f"{stage}: {name}") not in self.missing:
            self.missing.append(label)
        return found or {}

    def perplexity(self, name: str, stage: str = "perplexity") -> float | None:
        """Return a model's perplexity on the test text, before healing unless told otherwise."""
        return self.item(stage, name).get("perplexity")

    def variant(self, name: str) -> Mapping[str, Any]:
        """Return what a searched variant's folder says: its fields, and facts of the search."""
        found = self.item("search-shared" if name.startswith("shared") else "search", name)
        return {**found["training"], **found["fields"]} if found else {}

    def speed(self, name: str) -> Mapping[str, Any]:
        """Return the speeds of a model."""
        found: Mapping[str, Any] = self.item("decode", "models").get("models", {}).get(name)
        if found is None and (label := f"decode: {name}") not in self.missing:
            self.missing.append(label)
        return found or {}

    def size(self, name: str) -> Mapping[str, Any]:
        """Return the sizes of a model."""
        found: Mapping[str, Any] = self.item("size", "models").get("models", {}).get(name)
        if found is None and (label := f"size: {name}") not in self.missing:
            self.missing.append(label)
        return found or {}


def number(value: float | None, digits: int = 2) -> str:
    """Write a number, or that there is none."""
    if value is None:
        return NOT_MEASURED
    if math.isinf(value):
        return "infinite"
    return f"{value:,.{0 if value >= 1000 else digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """Write a share as percent, or that there is none."""
    if value is None:
        return NOT_MEASURED
    return "all" if math.isinf(value) else f"{100 * value:.{digits}f} %"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay out a table in Markdown."""
    return [
        f"| {' | '.join(head)} |", "|" + "---|" * len(head),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]  # fmt: skip


def perplexity_table(report: Report, stage: str) -> list[str]:
    """Lay out perplexities, a row for each kind; the least of a column in bold."""
    found = {
        kind: [report.perplexity(f"{kind}-{ratio}", stage) for ratio in RATIOS] for kind in KINDS
    }
    rows = []
    for kind, values in found.items():
        cells = []
        for i, value in enumerate(values):
            others = [row[i] for row in found.values() if row[i] is not None]
            is_best = value is not None and len(others) > 1 and value == min(others)
            text = number(value)
            cells.append(f"**{text}**" if is_best else text)
        rows.append([TITLES[kind], *cells])
    return table(["linears removed", *(f"{ratio} %" for ratio in RATIOS)], rows)


def ratio_table(report: Report) -> list[str]:
    """Lay out what was asked for, what was reached, and what that is of the whole model."""
    rows = []
    for kind in ("disp", "shared"):
        for ratio in RATIOS:
            found = report.variant(f"{kind}-{ratio}")
            seconds = found.get("seconds")
            rows.append(
                [TITLES[kind], f"{ratio} %", percent(found.get("ratio_error"), 2),
                 percent(found.get("remove_linears"), 2), percent(found.get("remove_total"), 2),
                 number(None if seconds is None else seconds / 60, 1)]
            )  # fmt: skip
    return table(
        ["search", "linears, asked for", "kept parameters off target before rounding",
         "linears removed", "whole model removed", "search, minutes"], rows,
    )  # fmt: skip


def speed_table(report: Report) -> list[str]:
    """Lay out sizes and speeds."""
    rows = []
    for name in ("base", *(f"disp-{ratio}" for ratio in RATIOS)):
        size, speed = report.size(name), report.speed(name)
        decode, prefill = speed.get("decode", {}), speed.get("prefill", {})
        own = size.get("layer_bytes" if name == "base" else "own_bytes")
        folder = size.get("folder_bytes")
        rows.append(
            ["base" if name == "base" else f"{name[5:]} % of the linears removed",
             number(None if own is None else own / 1e6, 1),
             "" if name == "base" else number(None if folder is None else folder / 1e3, 0),
             number(decode.get("tokens_per_s"), 0), number(decode.get("ratio")),
             number(prefill.get("tokens_per_s"), 0), number(prefill.get("ratio"))]
        )  # fmt: skip
    return table(
        ["model", "weights of its own, MB", "folder, kB", "decode, tokens/s", "against the base",
         "prefill, tokens/s", "against the base"], rows,
    )  # fmt: skip


def shared_mb(report: Report) -> float | None:
    """Return the megabytes of the weights that base and variants share."""
    base = report.size("base")
    return (base["weight_bytes"] - base["layer_bytes"]) / 1e6 if base else None


def recovered(report: Report, name: str, stage: str = "heal") -> float | None:
    """Return the share of the lost perplexity that healing gives back, against the plain base.

    It is infinite where nothing was lost.
    """
    before, after = report.perplexity(name), report.perplexity(name, stage)
    base = report.perplexity("base")
    if before is None or after is None or base is None:
        return None
    return (before - after) / (before - base) if before > base else math.inf


def winners(report: Report, stage: str) -> list[str]:
    """Say for each share whether DISP has the least perplexity, and else what has."""
    lines = []
    for ratio in RATIOS:
        values = {kind: report.perplexity(f"{kind}-{ratio}", stage) for kind in KINDS}
        known = {kind: value for kind, value in values.items() if value is not None}
        if len(known) < len(KINDS):
            lines.append(f"at {ratio} % {NOT_MEASURED}")
            continue
        order = sorted(known, key=lambda kind: known[kind])
        first, second = order[0], order[1]
        lines.append(
            f"at {ratio} % {TITLES[first]} has the least perplexity ({number(known[first])}), then "
            f"{TITLES[second]} ({number(known[second])})"
        )
    return lines


def goals(report: Report) -> list[str]:
    """Lay out what was to be reached and what was."""

    def verdict(is_met: bool | None) -> str:
        return NOT_MEASURED if is_met is None else "yes" if is_met else "no"

    rows = []
    for ratio in RATIOS:
        ours = report.perplexity(f"disp-{ratio}")
        others = [report.perplexity(f"{kind}-{ratio}") for kind in KINDS[1:]]
        known = [value for value in others if value is not None]
        is_met = None if ours is None or len(known) < len(others) else ours < min(known)
        rows.append(
            [f"perplexity at {ratio} %, DISP against the best of the others",
             f"{number(ours)} / {number(min(known, default=None))}", "less", verdict(is_met)]
        )  # fmt: skip
    names = [f"{kind}-{ratio}" for kind in ("disp", "shared") for ratio in RATIOS]
    errors = [report.variant(name).get("ratio_error") for name in names]
    worst = max((abs(e) for e in errors if e is not None), default=None)
    worst = None if None in errors else worst
    rows.append(
        ["kept parameters off target before rounding, the worst", percent(worst, 2),
         f"< {ACCURACY_GOAL:.0%}", verdict(None if worst is None else worst < ACCURACY_GOAL)]
    )  # fmt: skip
    for ratio, goal in DECODE_GOALS.items():
        ratio_found = report.speed(f"disp-{ratio}").get("decode", {}).get("ratio")
        rows.append(
            [f"decode, 1 stream, at {ratio} % against the base", number(ratio_found), f">= {goal}",
             verdict(None if ratio_found is None else ratio_found >= goal)]
        )  # fmt: skip
    share, steps = recovered(report, "disp-20", "heal-long"), heal_steps(report, "heal-long")
    healing = "a long healing" if share is None else f"healing of {steps} steps"
    rows.append(
        [f"perplexity lost at 20 % that {healing} gives back", percent(share, 0),
         f">= {HEALING_GOAL:.0%}", verdict(None if share is None else share >= HEALING_GOAL)]
    )  # fmt: skip
    what, seconds = search_seconds(report)
    rows.append(
        [f"search for one share, minutes ({what})",
         number(None if seconds is None else seconds / 60, 1), f"<= {SEARCH_GOAL_S // 60}",
         verdict(None if seconds is None else seconds <= SEARCH_GOAL_S)]
    )  # fmt: skip
    return table(["goal", "measured", "wanted", "reached"], rows)


def search_seconds(report: Report) -> tuple[str, float | None]:
    """Return what a search for one share took: by itself, or as the first of several."""
    alone = report.stages.get("one", {})
    if alone.get("run_seconds"):
        return "30 %, the whole command", alone["run_seconds"]
    return "20 %, the first of a run, steps only", report.variant("disp-20").get("seconds")


def paper_table(report: Report) -> list[str]:
    """Lay out the published perplexities beside ours, each against its own dense model."""
    rows = []
    for source, of_linears, figures in (
        ("paper, LLaMA-2-7B, windows of 4,096", False, PAPER),
        ("independent re-run, LLaMA-2-7B, windows of 2,048", True, RERUN),
    ):
        for share, value in figures.items():
            if share:
                part = f"{share:g} %"
                rows.append(
                    [source, part if of_linears else "", "" if of_linears else part,
                     number(figures[0]), number(value), number(value / figures[0])]
                )  # fmt: skip
    base = report.perplexity("base")
    for ratio in RATIOS:
        found, value = report.variant(f"disp-{ratio}"), report.perplexity(f"disp-{ratio}")
        growth = None if value is None or base is None else value / base
        rows.append(
            ["ours", percent(found.get("remove_linears")), percent(found.get("remove_total")),
             number(base), number(value), number(growth)]
        )  # fmt: skip
    return table(
        ["model", "linears removed", "whole model removed", "dense", "pruned", "pruned / dense"],
        rows,
    )


def healing_lines(report: Report) -> list[str]:
    """Say what healing gives back, and what the same training does to the base itself."""
    base, healed = report.perplexity("base"), report.perplexity("base", "heal")
    lines = [
        f"The same training takes the base itself from {number(base)} to {number(healed)}: what it "
        "gains is how the text is written, not what pruning took.",
        "",
        "Of the perplexity that pruning cost (against the plain base), healing gives back:",
        "",
    ]
    rows = [
        [TITLES[kind], *(percent(recovered(report, f"{kind}-{r}"), 0) for r in RATIOS)]
        for kind in KINDS
    ]
    lines += table(["linears removed", *(f"{ratio} %" for ratio in RATIOS)], rows)
    before, after = report.perplexity("disp-20"), report.perplexity("disp-20", "heal-long")
    told = f"That is after {heal_steps(report, 'heal')} steps each. "
    if after is None:
        told += "A longer training was not measured."
    else:
        told += (
            f"{heal_steps(report, 'heal-long')} steps take DISP-LLM at 20 % from {number(before)} "
            f"to {number(after)}, which gives back "
            f"{percent(recovered(report, 'disp-20', 'heal-long'), 0)}."
        )
    return [*lines, "", told]


def heal_steps(report: Report, stage: str) -> str:
    """Return how many steps healing took."""
    settings = report.stages.get(stage, {}).get("settings", {})
    return str(settings.get("training", {}).get("steps", NOT_MEASURED))
