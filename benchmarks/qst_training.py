"""Measure training a side network against QLoRA: time of a step, and memory above the weights.

    python -m benchmarks.qst_training

Both train on the same random sequences, each in a process of its own, in turn. QLoRA is PEFT with
bitsandbytes (`pip install peft`), in float32, with and without gradient checkpointing, and on the
base unpacked to float32. Side networks train on the base as it is served.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import (
    Target,
    describe_run,
    finish,
    run_command,
    say,
    target_table,
    warn_if_busy,
)

CONTENDERS: dict[str, list[str]] = {
    "qst": ["benchmarks.qst_worker"],
    "fork_4": ["benchmarks.qst_worker", "--side-layers", "4"],
    "fork_8": ["benchmarks.qst_worker", "--side-layers", "8"],
    "qlora": ["benchmarks.qlora"],
    "qlora_checkpointing": ["benchmarks.qlora", "--gradient-checkpointing"],
    "lora_unpacked": ["benchmarks.qlora", "--quantization", "none"],
}

OURS = ("qst", "fork_4", "fork_8")


def judge(raw: dict[str, list[dict[str, Any]]]) -> list[Target]:
    """Hold each side network against the better QLoRA of each figure."""

    def middle(name: str, field: str) -> float:
        return median(run[field] for run in raw[name])

    peers = [name for name in raw if name not in OURS]
    targets = []
    for title, field, required, unit in (
        ("time of a step against QLoRA", "median_step_s", 1 / 3, "s"),
        ("memory above the weights against QLoRA", "memory_above_start_bytes", 1 / 5, "bytes"),
    ):
        theirs = min(middle(name, field) for name in peers)
        for name in OURS:
            ours = middle(name, field)
            targets.append(
                Target(
                    name=f"{name}: {title}", required=required, measured=ours / theirs,
                    is_ceiling=True, detail=f"{ours:.4g} / {theirs:.4g} {unit}",
                )
            )  # fmt: skip
    return targets


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="of each run")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=192)
    parser.add_argument("--cache-dir", type=Path, default=None)
    options = parser.parse_args()
    warn_if_busy()
    run = describe_run()
    raw: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    settings = [
        "--steps", options.steps, "--batch-size", options.batch_size, "--length", options.length,
        *(["--cache-dir", options.cache_dir] if options.cache_dir else []),
    ]  # fmt: skip
    for i in range(options.repeats):
        for name, words in CONTENDERS.items():
            output = run_command([sys.executable, "-m", *words, *settings], is_quiet=True)
            raw[name].append(json.loads(output.strip().splitlines()[-1]))
            say(f"round {i + 1} of {options.repeats}: {name} done")
    targets = judge(raw)
    print(target_table(targets))
    figures = {"targets": [target.as_json() for target in targets], "raw": raw}
    options_text = {k: str(v) for k, v in vars(options).items()}
    finish("qst_training", {**run, "options": options_text, **figures})
    return 0 if all(target.is_met for target in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
