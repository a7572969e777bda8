"""Measure mixed-rank compression: of the demo model on text, of an image classifier on images.

    python -m benchmarks.mixed_rank --train-text train.txt --test-text wiki.test.raw \
        --vit ./vit --train-images ./images/train --test-images ./images/test --work ./mixed

Takes hours on 2 cores. Figures are kept in `results/mixed_rank.json` after every item: a run that
was killed goes on where it was, and what is in the file is left out unless `--again` names its
stage. `benchmarks.mixed_rank_report` makes the report of the file.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adapters.format import digest
from adapters.mixed_rank.ranks import list_weighted, lower_bound, plan_ranks, plan_uniform
from benchmarks.disp import DEMO_MODEL, Figures, describe_text, run_stages
from benchmarks.report import PROA, RESULTS, ROOT, BenchmarkFailed, run_command

_OUTPUTS = ["--metric", "outputs", "--no-compensate"]
ARMS = {
    "svd": ["--plan", "uniform", "--calibration", "none", *_OUTPUTS],
    "uniform": ["--plan", "uniform", *_OUTPUTS],
    "outputs": _OUTPUTS,
    "paper": ["--metric", "outputs"],
    "mixed": ["--no-compensate"],
    "compensated": [],
}
FORMS = ("float16", "int8", "int4")
RATIOS = (20, 40)
VISION_RATIOS = (40, 60)
VISION_FORMS = ("float16", "int8")
RESULTS_FILE = RESULTS / "mixed_rank.json"


class Bench:
    """The stages.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.figures = Figures(options.results, DEMO_MODEL)
        self.stages: dict[str, Callable[[], None]] = {
            "text": self.text, "full": self.full, "decode": self.decode, "images": self.images,
        }  # fmt: skip

    def text(self) -> None:
        """Compress the demo model in every way, and compute perplexities on another text."""
        options = self.options
        settings = {
            "compress": options.compress_options, "train": describe_text(options.train_text),
            "test": describe_text(options.test_text), "windows": options.windows,
            "length": options.length,
        }  # fmt: skip
        self.figures.begin("text", settings)
        if not self.figures.has("text", "base", None):
            self.figures.keep("text", "base", None, self.perplexity())
        for ratio in RATIOS:
            for form in options.forms.split(","):
                for arm in options.arms.split(","):
                    item = f"{arm}-{ratio}-{form}"
                    if item in self.figures.items("text"):
                        continue
                    given = [*ARMS[arm], "--remove", ratio / 100, "--form", form]
                    facts = self.compress(item, [*given, *shlex.split(options.compress_options)])
                    facts |= self.perplexity("--variant", options.work / item)
                    self.figures.keep("text", item, digest(options.work / item), facts)

    def full(self) -> None:
        """Time one compression with the defaults, as a user runs it."""
        self.figures.begin("full", {"train": describe_text(self.options.train_text)})
        if "compensated-20-int8" not in self.figures.items("full"):
            folder = self.options.work / "full"
            facts = self.compress("full", ["--remove", 0.2])
            if self.options.test_text:
                facts |= self.perplexity("--variant", folder)
            self.figures.keep("full", "compensated-20-int8", digest(folder), facts)

    def compress(self, name: str, words: Sequence[object]) -> dict[str, Any]:
        """Run `proa compress` on the demo model; return what it says, its time and its memory."""
        folder = self.options.work / name
        shutil.rmtree(folder, ignore_errors=True)
        spent = run_measured([
            *PROA, "compress", "--data", self.options.train_text.resolve(), "--output",
            folder.resolve(), *words,
        ])  # fmt: skip
        report = json.loads((folder / "report.json").read_text())
        groups = report.pop("groups")
        ranks = {group: facts["rank"] for group, facts in groups.items()}
        size = sum(path.stat().st_size for path in folder.glob("adapter_*"))
        plans = plan_again(groups, report["options"])
        return {**report, **spent, "ranks": ranks, "plans": plans, "folder_bytes": size}

    def perplexity(self, *words: object) -> dict[str, Any]:
        """Compute the perplexity of what the words name, as it is served."""
        options = self.options
        return run_module(
            "perplexity", "--text", options.test_text, "--length", options.length, "--windows",
            options.windows, *words,
        )  # fmt: skip

    def decode(self) -> None:
        """Measure sizes and speeds of the variants at hand, in turn with their base."""
        self.figures.begin("decode", {"rounds": self.options.rounds})
        kept = self.figures.items("text")
        names = [f"{arm}-{ratio}-{form}" for ratio in RATIOS for form in FORMS for arm in ARMS]
        names = [name for name in names if name in kept and (self.options.work / name).is_dir()]
        if self.figures.has("decode", "models", names):
            return
        words = [w for name in names for w in ("--variant", f"{name}={self.options.work / name}")]
        rounds = ["--rounds", self.options.rounds]
        figures = run_module("variant_speed", *rounds, "--eight-bits", *words)
        self.figures.keep("decode", "models", names, figures)

    def images(self) -> None:
        """Compress an image classifier in every way, and test it on other images."""
        options = self.options
        if options.vit is None:
            raise SystemExit("benchmark: --vit: needed for the stage images")
        tuning = options.vit / "finetuning.json"
        settings = {
            "compress": options.vision_options, "test": count_images(options.test_images),
            "limit": options.images,
            "tuning": json.loads(tuning.read_text()) if tuning.exists() else None,
        }  # fmt: skip
        self.figures.begin("images", settings)
        if "base" not in self.figures.items("images"):
            self.figures.keep("images", "base", None, self.test(options.vit))
        for ratio in VISION_RATIOS:
            for form in (form for form in VISION_FORMS if form in options.forms.split(",")):
                for arm in options.arms.split(","):
                    item = f"{arm}-{ratio}-{form}"
                    if item in self.figures.items("images"):
                        continue
                    folder = options.work / "images" / item
                    shutil.rmtree(folder, ignore_errors=True)
                    spent = run_measured([
                        *PROA, "compress", "--model", options.vit.resolve(), "--data",
                        options.train_images.resolve(), "--output", folder.resolve(), "--remove",
                        ratio / 100, "--form", form, *ARMS[arm],
                        *shlex.split(options.vision_options),
                    ])  # fmt: skip
                    report = json.loads((folder / "report.json").read_text())
                    report["ranks"] = {g: f["rank"] for g, f in report.pop("groups").items()}
                    size = (folder / "mixed_rank.safetensors").stat().st_size
                    facts = {**report, **spent, "folder_bytes": size, **self.test(folder)}
                    self.figures.keep("images", item, None, facts)

    def test(self, folder: Path) -> dict[str, Any]:
        """Classify the test images; return what was right, a digit for each."""
        output = self.options.work / "predictions.jsonl"
        run_command([
            *PROA, "eval", "images", "--model", folder.resolve(), "--data",
            self.options.test_images.resolve(), "--output", output.resolve(),
            *(["--limit", self.options.images] if self.options.images else []),
        ])  # fmt: skip
        records = [json.loads(line) for line in output.read_text().splitlines()]
        return {"is_right": "".join(str(int(r["label"] == r["predicted"])) for r in records)}


def plan_again(groups: dict[str, Any], options: dict[str, Any]) -> dict[str, float]:
    """Plan ranks for measured matrices once more; return summed errors, the bound and the time."""
    layers = [list_weighted(facts, step=options["rank_step"]) for facts in groups.values()]
    budget = int(sum(each[-1].cost for each in layers) * (1 - options["remove"]))
    start_s = time.monotonic()
    plan = plan_ranks(layers, budget)
    seconds = time.monotonic() - start_s
    return {
        "mixed": sum(option.error for option in plan), "seconds": seconds,
        "uniform": sum(option.error for option in plan_uniform(layers, budget) or ()),
        "lower_bound": lower_bound(layers, budget),
    }  # fmt: skip


def run_module(name: str, *words: object) -> dict[str, Any]:
    """Run a module of the benchmarks in a process; return the JSON object it prints."""
    lines = run_command([sys.executable, "-m", f"benchmarks.{name}", *words]).strip().splitlines()
    figures: dict[str, Any] = json.loads(lines[-1])
    return figures


def run_measured(command: Sequence[object]) -> dict[str, float]:
    """Run a command; return its seconds and the most bytes that it held.

    Raises:
        BenchmarkFailed: it ended with an error.
    """
    words = [str(word) for word in command]
    start_s = time.monotonic()
    with subprocess.Popen(words, cwd=ROOT) as running:
        _, status, usage = os.wait4(running.pid, 0)
        running.returncode = os.waitstatus_to_exitcode(status)
    if running.returncode:
        raise BenchmarkFailed(f"status {running.returncode} from: {shlex.join(words)}")
    return {"seconds": time.monotonic() - start_s, "peak_bytes": usage.ru_maxrss * 1024}


def count_images(folder: Path) -> dict[str, int]:
    """Return the number of images by class."""
    return {each.name: len(list(each.iterdir())) for each in sorted(folder.iterdir())}


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train-text", type=Path, required=True, help="to compress on")
    parser.add_argument("--test-text", type=Path, required=True, help="another one")
    parser.add_argument("--vit", type=Path, default=None, help="image classifier")
    parser.add_argument("--train-images", type=Path, default=None, help="class folders")
    parser.add_argument("--test-images", type=Path, default=None, help="other class folders")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made")
    parser.add_argument("--results", type=Path, default=RESULTS_FILE)
    parser.add_argument("--stages", default="text,full,decode,images")
    parser.add_argument("--again", default="", help="stages to do anew")
    parser.add_argument("--arms", default=",".join(ARMS), help="[default: %(default)s]")
    parser.add_argument("--forms", default=",".join(FORMS), help="[default: %(default)s]")
    parser.add_argument(
        "--compress-options", default="--sequences 32",
        help="more options of `proa compress` for text [default: %(default)s]",
    )  # fmt: skip
    parser.add_argument("--vision-options", default="", help="more options of it for images")
    parser.add_argument("--images", type=int, help="most to test on [default: all]")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a test window")
    parser.add_argument("--windows", type=int, default=8, help="test windows")
    parser.add_argument("--rounds", type=int, default=21, help="of the speed measurement")
    return parser.parse_args()


def main() -> int:
    """Do the stages, keep their figures."""
    options = parse_options()
    bench = Bench(options)
    options.work.mkdir(parents=True, exist_ok=True)
    run_stages(bench.stages, options, bench.figures.drop)
    return 0


if __name__ == "__main__":
    sys.exit(main())
