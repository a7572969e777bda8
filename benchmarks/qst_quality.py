"""Hold side networks against QLoRA on the same base and the same examples.

    python -m benchmarks.qst_quality --data roleplay=FILE --data sst2=train.tsv ...

For each data set and contender, every learning rate is tried with the first seed; the one with the
least validation loss is run with the other seeds, too. Each run is a process of its own and is kept
as it ends in `benchmarks/results/qst_quality.json`: the same command goes on where it was cut off.
`--report` only draws the curves and prints the tables. QLoRA is PEFT (`pip install peft`).
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import RESULTS, describe_run, run_command, say, warn_if_busy

KEPT = RESULTS / "qst_quality.json"
PLOT = Path(__file__).resolve().parents[1] / "docs" / "results" / "qst.png"
QLORA = "QLoRA"
CONTENDERS: dict[str, dict[str, Any] | None] = {
    QLORA: None,
    "QST, paper's form": {},
    "fork of 4 layers": {"side_attention": "base", "side_layers": 4},
    "fork of 8 layers": {"side_attention": "base", "side_layers": 8},
    "fork of 15 layers": {"side_attention": "base", "side_layers": 15},
}
RATES = {QLORA: (1e-3, 2e-3, 4e-3), "": (5e-3, 1e-2, 2e-2)}
SEEDS = (0, 1, 2)
Run = dict[str, Any]


def read_runs(path: Path = KEPT) -> list[Run]:
    """Return what was kept, the oldest first."""
    if not path.is_file():
        return []
    runs: list[Run] = json.loads(path.read_text(encoding="utf-8"))["runs"]
    return runs


def keep_run(run: Run, path: Path = KEPT) -> None:
    """Add a run to those that were kept; the file is whole at any time."""
    content = {"runs": [*read_runs(path), run]}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def runs_of(runs: Sequence[Run], **wanted: Any) -> list[Run]:
    """Return the runs with these values."""
    return [run for run in runs if all(run[name] == value for name, value in wanted.items())]


def final(run: Run, part: str, figure: str = "loss") -> float:
    """Return a figure of one of the parts at a run's end."""
    value: float = run["curve"][-1][part][figure]
    return value


def best_rate(runs: Sequence[Run]) -> float | None:
    """Return the learning rate with the least validation loss at the first seed."""
    first = runs_of(runs, seed=SEEDS[0])
    if not first:
        return None
    rate: float = min(first, key=lambda run: final(run, "validation"))["learning_rate"]
    return rate


def next_run(
    runs: Sequence[Run], common: Mapping[str, Any], rates: Sequence[float]
) -> tuple[int, float] | None:
    """Return seed and learning rate of what a contender lacks first on a data set, if anything."""
    of_it = runs_of(runs, **common)
    known = {(run["seed"], run["learning_rate"]) for run in of_it}
    wanted = [(SEEDS[0], rate) for rate in rates]
    if known.issuperset(wanted):
        rate = best_rate(of_it)
        assert rate is not None
        wanted = [(seed, rate) for seed in SEEDS[1:]]
    return next((run for run in wanted if run not in known), None)


def tuned(runs: Sequence[Run], **common: Any) -> list[Run]:
    """Return a contender's runs at its best learning rate, one for each seed."""
    of_it = runs_of(runs, **common)
    rate = best_rate(of_it)
    return [] if rate is None else runs_of(of_it, learning_rate=rate)


def tables(runs: Sequence[Run]) -> str:
    """Return Markdown: a table for each data set, a row for each contender."""
    lines: list[str] = []
    for data in dict.fromkeys(run["data"] for run in runs):
        is_task = "accuracy" in runs_of(runs, data=data)[0]["curve"][-1]["held_out"]
        baseline = tuned(runs, data=data, contender=QLORA)
        lines += [
            "", f"### {data}", "",
            "| | seeds | learning rate | held-out loss | against QLoRA | "
            + ("accuracy | " if is_task else "")
            + "parameters | memory above the weights |",
            "|---" * (8 if is_task else 7) + "|",
        ]  # fmt: skip
        for contender in CONTENDERS:
            chosen = tuned(runs, data=data, contender=contender)
            if not chosen:
                continue
            losses = [final(run, "held_out") for run in chosen]
            ratio = "-"
            if baseline:
                theirs = median(final(run, "held_out") for run in baseline)
                ratio = f"{100 * (median(losses) / theirs - 1):+.1f} %"
            accuracy = ""
            if is_task:
                right = [final(run, "held_out", "accuracy") for run in chosen]
                accuracy = f"{100 * median(right):.1f} % | "
            memory = median(run["memory_above_start_bytes"] for run in chosen) / 1e6
            lines.append(
                f"| {contender} | {len(chosen)} | {chosen[0]['learning_rate']:g} | "
                f"{median(losses):.3f} ({min(losses):.3f} .. {max(losses):.3f}) | {ratio} | "
                f"{accuracy}{chosen[0]['trainable_parameters']:,} | {memory:,.0f} MB |"
            )
        start = runs_of(runs, data=data)[0]["curve"][0]["held_out"]["loss"]
        lines.append(f"\nBefore training: {start:.3f}.")
    return "\n".join(lines).strip()


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw each data set's held-out loss against examples, time and memory."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(run["data"] for run in runs))
    figure, axes = plt.subplots(len(names), 3, figsize=(12, 3 * len(names)), squeeze=False)
    for row, data in zip(axes, names, strict=True):
        for contender in CONTENDERS:
            chosen = tuned(runs, data=data, contender=contender)
            if not chosen:
                continue
            points = list(zip(*(run["curve"] for run in chosen), strict=True))
            losses = [median(point["held_out"]["loss"] for point in at) for at in points]
            for axis, unit in ((row[0], "examples"), (row[1], "seconds")):
                places = [median(point[unit] for point in at) for at in points]
                axis.plot(places, losses, marker="o", markersize=3, label=contender)
            memory = median(run["memory_above_start_bytes"] for run in chosen) / 1e6
            row[2].scatter([memory], losses[-1:], label=contender)
        row[0].set_ylabel(f"{data}: held-out loss")
        for axis, label in zip(row, ("examples", "seconds of training", "MB"), strict=True):
            axis.set_xlabel(label)
            axis.grid(alpha=0.3)
        row[2].set_xscale("log")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", metavar="NAME=FILE", action="append", default=[])
    parser.add_argument("--contender", choices=list(CONTENDERS), action="append")
    parser.add_argument("--quantization", choices=("none", "nf4"), default="none")
    parser.add_argument("--steps", type=int, default=24, help="of 8 sequences")
    parser.add_argument("--num-evaluated", type=int, default=48)
    parser.add_argument("--cache-dir", default=None)
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    about = describe_run()
    if not options.report:
        warn_if_busy()
    for item in [] if options.report else options.data:
        name, _, file = item.partition("=")
        for contender in options.contender or CONTENDERS:
            common = {
                "data": name, "contender": contender, "quantization": options.quantization,
                "steps": options.steps, "num_evaluated": options.num_evaluated,
            }  # fmt: skip
            rates = RATES.get(contender, RATES[""])
            while missing := next_run(read_runs(), common, rates):
                seed, rate = missing
                say(f"{name}: {contender}, learning rate {rate:g}, seed {seed}")
                settings = {
                    "data": file, "qst": CONTENDERS[contender], "learning_rate": rate,
                    "seed": seed, "steps": options.steps, "cache_dir": options.cache_dir,
                    "quantization": options.quantization, "num_evaluated": options.num_evaluated,
                }  # fmt: skip
                words = ["benchmarks.qst_quality_worker", json.dumps(settings)]
                output = run_command([sys.executable, "-m", *words], is_quiet=True)
                figures = json.loads(output.strip().splitlines()[-1])
                keep_run({**common, "seed": seed, "learning_rate": rate, "cpu": about["cpu"],
                          "commit": about["commit"], "date": about["date"], **figures})  # fmt: skip
    runs = read_runs()
    print(tables(runs))
    draw(runs, PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
