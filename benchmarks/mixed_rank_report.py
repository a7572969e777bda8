"""Make docs/results/mixed_rank.md of the figures that `benchmarks.mixed_rank` has kept.

    python -m benchmarks.mixed_rank_report

Every number of ours is read from the files; what is missing there is said to be not measured.
"""

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from benchmarks.disp_tables import NOT_MEASURED, table
from benchmarks.mixed_rank import FORMS, RATIOS, RESULTS_FILE, VISION_FORMS, VISION_RATIOS
from benchmarks.report import RESULTS, ROOT
from benchmarks.variant_speed import BASE, EIGHT_BITS
from stats.proportions import mcnemar_p, wilson_interval
from stats.summary import median_ratio

OUTPUT = ROOT / "docs" / "results" / "mixed_rank.md"
TITLES = {
    "svd": "plain SVD, one share for all", "uniform": "activation-aware, one share for all",
    "outputs": "activation-aware, mixed rank", "paper": "the same and compensation, as the paper",
    "mixed": "mixed rank by the loss", "compensated": "the same and compensation (the default)",
}  # fmt: skip
ORDERED = ("svd", "uniform", "mixed", "compensated")  # each to be better than the one before
FORM_TITLES = {"float16": "16 bits", "int8": "8 bits", "int4": "4 and 8 bits"}
LEVEL = 0.05
PAPER = (
    ("DeiT-B, 60 % of all parameters removed", "81.80", "81.10"),
    ("compressed to the size of DeiT-S; DeiT-S itself 79.80", "", "80.30"),
)


class Report:
    """The figures, by stage and item.

    Args:
        content: of the file of figures.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.stages: Mapping[str, Any] = content["stages"]

    def item(self, stage: str, name: str) -> dict[str, Any]:
        """Return an item's figures, or nothing."""
        found: dict[str, Any] = self.stages.get(stage, {}).get("items", {}).get(name, {})
        return found

    def perplexity(self, name: str) -> float | None:
        """Return a variant's perplexity."""
        found: float | None = self.item("text", name).get("perplexity")
        return found

    def right(self, name: str) -> str:
        """Return a digit for each test image, 1 where a classifier is right."""
        found: str = self.item("images", name).get("is_right", "")
        return found

    def speeds(self) -> dict[str, Any]:
        """Return what was measured of each model's decoding."""
        found: dict[str, Any] = self.item("decode", "models").get("models", {})
        return found


def number(value: float | None, form: str = ".2f") -> str:
    """Write a figure, or that there is none; without digits that say nothing."""
    return NOT_MEASURED if value is None else format(value, form if abs(value) < 1000 else ",.0f")


def top_1(right: str) -> str:
    """Write a share of images with its interval."""
    if not right:
        return NOT_MEASURED
    count = right.count("1")
    low, high = wilson_interval(count, len(right))
    return f"{count / len(right):.2%} ({low:.1%} to {high:.1%})"


def goal(name: str, measured: str, wanted: str, is_met: bool | None) -> list[str]:
    """Lay out a row of the goals."""
    return [name, measured, wanted, {True: "yes", False: "**no**", None: NOT_MEASURED}[is_met]]


def goals(report: Report) -> list[list[str]]:
    """Hold the figures against what was asked for."""
    rows = []
    for ratio in RATIOS:
        found = [report.perplexity(f"{arm}-{ratio}-float16") for arm in reversed(ORDERED)]
        known = [p for p in found if p is not None]
        is_ordered = known == sorted(known) if len(known) == len(ORDERED) else None
        rows.append(goal(
            f"perplexity at {ratio} %: compensated, mixed, uniform, plain SVD",
            " < ".join(number(p) for p in found), "rising", is_ordered,
        ))  # fmt: skip
        pair = [report.perplexity(f"compensated-{ratio}-{form}") for form in ("int8", "float16")]
        cost = None if pair[0] is None or pair[1] is None else pair[0] / pair[1] - 1
        rows.append(goal(
            f"8 bits cost at {ratio} %, perplexity", number(cost, ".2%"), "<= 1 %",
            None if cost is None else cost <= 0.01,
        ))  # fmt: skip
        plans = report.item("text", f"mixed-{ratio}-float16").get("plans")
        rows.append(goal(
            f"summed error of the plan at {ratio} %, by the linear program's bound",
            NOT_MEASURED if plans is None else f"{plans['mixed'] / plans['lower_bound']:.3f} (one "
            f"share for all {plans['uniform'] / plans['lower_bound']:.2f}), "
            f"{plans['seconds']:.1f} s",
            "<= 1.12, never above one share for all, < 10 s",
            None if plans is None else plans["mixed"] <= 1.12 * plans["lower_bound"]
            and plans["mixed"] <= plans["uniform"] and plans["seconds"] < 10,
        ))  # fmt: skip
    for name, against in (("int8", EIGHT_BITS), ("int4", BASE)):
        ratio = speed_ratio(report, f"compensated-40-{name}", against)
        title = "the model in 8 bits" if against == EIGHT_BITS else "the base"
        rows.append(goal(
            f"decode at 40 %, {FORM_TITLES[name]}, against {title}", number(ratio, ".2f"),
            ">= 1.2", None if ratio is None else ratio >= 1.2,
        ))  # fmt: skip
    full = report.item("full", "compensated-20-int8")
    minutes, gigabytes = full.get("seconds"), full.get("peak_bytes")
    rows.append(goal(
        "128 x 512 tokens, minutes", number(minutes and minutes / 60, ".1f"), "<= 10",
        None if minutes is None else minutes <= 600,
    ))  # fmt: skip
    rows.append(goal(
        "the same, memory in GB", number(gigabytes and gigabytes / 1e9), "<= 2",
        None if gigabytes is None else gigabytes <= 2e9,
    ))  # fmt: skip
    return rows + image_goals(report)


def image_goals(report: Report) -> list[list[str]]:
    """Hold the classifier's figures against what was asked for."""
    rows, base = [], report.right("base")
    for ratio, most in zip(VISION_RATIOS, (1, 3), strict=True):
        found = report.right(f"compensated-{ratio}-float16")
        points = lost_points(base, found)
        rows.append(goal(
            f"top-1 points lost at {ratio} %", number(points), f"<= {most}",
            None if points is None else points <= most,
        ))  # fmt: skip
        more = lost_points(found, report.right(f"compensated-{ratio}-int8"))
        rows.append(goal(
            f"points that 8 bits lose beyond at {ratio} %", number(more), "<= 0.3",
            None if more is None else more <= 0.3,
        ))  # fmt: skip
        for worse, better in pairwise(ORDERED):
            first, second = (report.right(f"{arm}-{ratio}-float16") for arm in (better, worse))
            points, p = lost_points(first, second), paired_p(first, second)
            is_met = None if p is None or points is None else points > 0 and p < LEVEL
            rows.append(goal(
                f"{ratio} %: {TITLES[better]} above {TITLES[worse]}",
                NOT_MEASURED
                if p is None
                else f"{points:+.2f} points, p {f'= {p:.2g}' if p else '< 1e-300'}",
                f"above, p < {LEVEL}", is_met,
            ))  # fmt: skip
    return rows


def lost_points(before: str, after: str) -> float | None:
    """Return points of top-1 lost on the same images."""
    if not before or not after:
        return None
    return 100 * (before.count("1") - after.count("1")) / len(before)


def paired_p(first: str, second: str) -> float | None:
    """Return the p of a paired test."""
    if not first or not second:
        return None
    pairs = list(zip(first, second, strict=True))
    return mcnemar_p(pairs.count(("1", "0")), pairs.count(("0", "1")))


def speed_ratio(report: Report, name: str, against: str) -> float | None:
    """Return the median over rounds of a model's decode rate by another's in the same round."""
    speeds = report.speeds()
    if name not in speeds or against not in speeds:
        return None
    return median_ratio(speeds[name]["raw"]["decode"], speeds[against]["raw"]["decode"])


def perplexity_lines(report: Report) -> list[str]:
    """Lay out perplexities by arm, share and form."""
    columns = [(ratio, form) for ratio in RATIOS for form in FORMS]
    head = ["", *(f"{ratio} %, {FORM_TITLES[form]}" for ratio, form in columns)]
    rows = [
        [title, *(number(report.perplexity(f"{arm}-{ratio}-{form}")) for ratio, form in columns)]
        for arm, title in TITLES.items()
    ]
    removed = [
        number(report.item("text", f"compensated-{r}-{f}").get("remove_total"), ".1%")
        for r, f in columns
    ]
    return table(head, [*rows, ["share of the whole model removed", *removed]])


def speed_lines(report: Report) -> list[str]:
    """Lay out bytes and speeds."""
    speeds = report.speeds()
    titles = {BASE: "base, as its file has it", EIGHT_BITS: "base in 8 bits"}
    rows = []
    for name, found in speeds.items():
        arm, _, rest = name.partition("-")
        ratio, _, form = rest.partition("-")
        title = titles.get(name) or f"{ratio} % removed, {FORM_TITLES[form]}: {TITLES[arm]}"
        layers = found.get("layer_bytes")
        rows.append([
            title, number(layers and layers / 1e6, ".1f"),
            number(report.perplexity(name)).replace(NOT_MEASURED, ""),
            number(found["decode"]["tokens_per_s"], ".0f"), number(speed_ratio(report, name, BASE)),
            number(speed_ratio(report, name, EIGHT_BITS)),
            number(found["prefill"]["tokens_per_s"], ".0f"),
        ])  # fmt: skip
    head = ["model", "bytes of its layers, MB", "perplexity", "decode, tokens/s", "by the base",
            "by the base in 8 bits", "prefill, tokens/s"]  # fmt: skip
    return table(head, rows) if rows else [f"Speeds: {NOT_MEASURED}."]


def disp_points() -> list[tuple[str, float, float]]:
    """Return name, megabytes and perplexity of the pruned variants, as another benchmark has it."""
    stages = json.loads((RESULTS / "disp.json").read_text(encoding="utf-8"))["stages"]
    sizes = stages.get("size", {}).get("items", {}).get("models", {}).get("models", {})
    found = stages.get("perplexity", {}).get("items", {})
    return [
        (name, sizes[name]["layer_bytes"] / 1e6, found[name]["perplexity"])
        for name in found
        if name.startswith("disp-") and "layer_bytes" in sizes.get(name, {})
    ]


def size_lines(report: Report) -> list[str]:
    """Lay out what each way has for its bytes, smallest first."""
    points = [(f"DISP-LLM, {name[5:]} % removed", *rest) for name, *rest in disp_points()]
    for name, found in report.speeds().items():
        size = found.get("layer_bytes")
        perplexity = report.perplexity(name)
        arm, _, rest = name.partition("-")
        if size is not None and perplexity is not None and arm in (BASE, "compensated"):
            ratio, _, form = rest.partition("-")
            title = "base" if name == BASE else f"mixed rank, {ratio} %, {FORM_TITLES[form]}"
            points.append((title, size / 1e6, perplexity))
    rows = [[n, f"{size:.1f}", f"{p:.2f}"] for n, size, p in sorted(points, key=lambda x: x[1])]
    return table(["", "bytes of its layers, MB", "perplexity"], rows) if rows else [NOT_MEASURED]


def image_lines(report: Report) -> list[str]:
    """Lay out top-1 by arm, share and form."""
    columns = [(ratio, form) for ratio in VISION_RATIOS for form in VISION_FORMS]
    head = ["", *(f"{ratio} %, {FORM_TITLES[form]}" for ratio, form in columns)]
    rows = [
        [title, *(top_1(report.right(f"{arm}-{ratio}-{form}")) for ratio, form in columns)]
        for arm, title in TITLES.items()
    ]
    sizes = [report.item("images", f"compensated-{r}-{f}").get("folder_bytes") for r, f in columns]
    rows.append(["file, MB", *(number(size and size / 1e6, ".1f") for size in sizes)])
    shares = [report.item("images", f"compensated-{r}-{f}").get("remove_total") for r, f in columns]
    rows.append(["share of the whole model removed", *(number(s, ".1%") for s in shares)])
    return table(head, rows)


def stage_line(report: Report, stage: str) -> str:
    """Tell where and how a stage was measured."""
    found = report.stages.get(stage)
    if found is None:
        return f"- `{stage}`: {NOT_MEASURED}"
    settings = {k: v for k, v in found["settings"].items() if k != "tuning"}
    line = f"- `{stage}`: {describe(found.get('run', {}))}, settings `{json.dumps(settings)}`"
    for earlier in found.get("earlier", ()):
        line += f"; {', '.join(earlier['items'])}: {describe(earlier['run'])}"
    return line


def describe(run: Mapping[str, Any]) -> str:
    """Tell when and where figures are from."""
    commit = str(run.get("commit"))[:12]
    return f"{run.get('date', '?')[:10]}, {run.get('cpu', '?')}, commit `{commit}`"


def write_report(report: Report) -> str:
    """Return the report in Markdown."""
    tuning = report.stages.get("images", {}).get("settings", {}).get("tuning") or {}
    base, eight = report.perplexity("base"), report.perplexity("compensated-20-int8")
    points = sorted(disp_points())
    disp = points[0][2] if points else None
    verdict = (
        f"At 20 % of the linears removed and 8 bits the demo model goes from {number(base)} to "
        f"{number(eight)}; DISP-LLM at the same share, in its 4 bits, has {number(disp)}."
    )
    if base and eight:
        verdict += f" In nats the compression costs {math.log(eight / base):.2f}"
        verdict += f", pruning {math.log(disp / base):.2f}." if disp else "."
    lines = [
        "# Mixed-rank compression", "",
        "Made by `python -m benchmarks.mixed_rank_report` of "
        "[raw figures](../../benchmarks/results/mixed_rank.json); "
        "[mixed_rank.md](../mixed_rank.md) says how it works. Shares are of the parameters of the "
        "linears in layers or blocks.", "", "## Goals", "",
        *table(["goal", "measured", "wanted", "reached"], goals(report)), "",
        "## A language model", "",
        f"SmolLM2-135M-Instruct from its Q4_1 file, served perplexity on WikiText-2 (raw test "
        f"text). The base has {number(base)}.", "", *perplexity_lines(report), "", verdict, "",
        "### Size and speed", "",
        "One stream, medians of rounds in turn; ratios are of the same round. The base in 8 bits "
        "is the model in the precision of 8-bit factors.", "", *speed_lines(report), "",
        "### At equal bytes", "", *size_lines(report), "",
        "## An image classifier", "",
        f"ViT-S/14 at 112 pixels, fine-tuned on {tuning.get('images', '?')} training images of "
        "CIFAR-10 (`benchmarks.finetune_vision`); top-1 on other images, with its 95 % interval "
        f"(Wilson). Uncompressed: {top_1(report.right('base'))}.", "", *image_lines(report), "",
        "Of the paper (ImageNet-1k, other models, four times as wide):", "",
        *table(["model", "top-1 before", "after"], [list(row) for row in PAPER]), "",
        "## Settings", "",
        *(stage_line(report, stage) for stage in ("text", "full", "decode", "images")),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the report."""
    content = json.loads(RESULTS_FILE.read_text(encoding="utf-8"))
    OUTPUT.write_text(write_report(Report(content)), encoding="utf-8")


if __name__ == "__main__":
    main()
