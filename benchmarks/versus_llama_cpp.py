"""Compare decode and prefill speed with llama.cpp's on the same weights, in turn.

    python -m benchmarks.versus_llama_cpp

Fetches and builds llama.cpp the first time, makes its 4-bit formats of the demo model, and runs
llama-batched-bench and `proa bench` in turn. The peer's figure is the best of its formats, with and
without flash attention, for each load by itself.
"""

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.llama_cpp import (
    REQUIREMENT,
    Variant,
    batched_bench,
    build_tools,
    find_tools,
    make_model,
)
from benchmarks.report import (
    RESULTS,
    BenchmarkFailed,
    Target,
    describe_run,
    finish,
    run_proa_bench,
    say,
    target_table,
    warn_if_busy,
)
from models.checkpoints import DEFAULT_CACHE_DIR
from models.demo import fetch_demo_model
from serve.bench.measure import parse_streams
from serve.machine import count_processors
from serve.model_options import build_model_options

FORMATS = ("Q4_0", "Q4_1", "Q4_K_M")
REQUIRED_DECODE = {1: 1.7, 8: 2.5, 32: 3.0}
REQUIRED_PREFILL = 1.3
PREFILL = "prefill"
# After the first round a variant runs on only if it came within this of the best at some load.
CONTENDER_SHARE = 0.8

Rates = dict[str, list[float]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison.

    Returns:
        0 if every ratio reaches what is required, 1 if not or if a command failed.
    """
    options = _parser().parse_args(arguments)
    try:
        return _compare(options)
    except BenchmarkFailed as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        return 1


def cache_folder() -> Path:
    """Give the folder in which `proa` keeps downloaded models."""
    return build_model_options({}, environ=os.environ).cache_folder or DEFAULT_CACHE_DIR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gguf", type=Path, help="weights for both, a GGUF file [default: the demo model]"
    )
    parser.add_argument(
        "--llama-dir", type=Path, help="a built llama.cpp [default: build one in --cache-dir]"
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=cache_folder() / "benchmarks",
        help="where sources, build and made formats are kept [default: %(default)s]",
    )
    parser.add_argument(
        "--formats", default=",".join(FORMATS), help="llama.cpp's formats [default: %(default)s]"
    )
    parser.add_argument("--streams", type=parse_streams, default=tuple(REQUIRED_DECODE))
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="rounds [default: %(default)s]")
    parser.add_argument(
        "--threads", type=int, default=count_processors(), help="of both [default: %(default)s]"
    )
    parser.add_argument(
        "--output-dir", type=Path, default=RESULTS, help="for the result [default: %(default)s]"
    )
    return parser


def _compare(options: argparse.Namespace) -> int:
    tools = find_tools(options.llama_dir) if options.llama_dir else None
    if options.llama_dir and tools is None:
        raise BenchmarkFailed(f"--llama-dir: {options.llama_dir} holds no llama-batched-bench")
    cache = options.cache_dir / "llama_cpp"
    if tools is None:
        tools = build_tools(cache, jobs=options.threads, report=say)
    source = options.gguf or fetch_demo_model(cache_folder(), report=say)
    models = {
        name: make_model(tools, source, name, cache / "models")
        for name in options.formats.split(",")
    }
    warn_if_busy()
    description = describe_run()
    loads = [str(n) for n in options.streams] + [PREFILL]
    proa: Rates = defaultdict(list)
    peers: dict[Variant, Rates] = {
        Variant(format=name, flash_attention=flash): defaultdict(list)
        for name in models
        for flash in ("on", "off")
    }
    contenders = list(peers)
    figures: dict[str, Any] = {}
    for number in range(options.repeats):
        for variant in contenders:
            rows = _run_peer(tools, models[variant.format], variant, options)
            _note(peers[variant], rows, f"round {number + 1}: llama.cpp {variant}")
        figures = run_proa_bench([*_proa_arguments(options, source), "--repeats", "1"])
        rows = figures["decode_tokens_per_s"] | {PREFILL: figures["prefill_tokens_per_s"]}
        _note(proa, rows, f"round {number + 1}: proa")
        if number == 0:
            contenders = pick_contenders(peers, loads)
    targets = [make_target(load, proa[load], peers) for load in loads]
    print(target_table(targets))
    content = description | {
        "peer": f"llama.cpp of {REQUIREMENT}",
        "model": source.name,
        "config": figures["config"] | {"repeats": options.repeats},
        "kernels": figures["kernels"],
        "targets": [target.as_json() for target in targets],
        "tokens_per_s": {"proa": proa, **{f"llama.cpp {v}": rates for v, rates in peers.items()}},
    }
    finish("versus_llama_cpp", content, options.output_dir)
    return 0 if all(target.is_met for target in targets) else 1


def pick_contenders(peers: dict[Variant, Rates], loads: Sequence[str]) -> list[Variant]:
    """Drop the variants that are far from the best at every load."""
    best = {load: max(rates[load][0] for rates in peers.values()) for load in loads}
    return [
        variant
        for variant, rates in peers.items()
        if any(rates[load][0] >= CONTENDER_SHARE * best[load] for load in loads)
    ]


def make_target(load: str, proa: Sequence[float], peers: dict[Variant, Rates]) -> Target:
    """Hold the median at one load against the best median of the peer's variants."""
    best = max(peers, key=lambda variant: median(peers[variant][load]))
    ours, theirs = median(proa), median(peers[best][load])
    if load == PREFILL:
        name, required = "prefill, one prompt", REQUIRED_PREFILL
    else:
        name, required = f"decode, {load} streams", REQUIRED_DECODE.get(int(load), 0.0)
    detail = f"{ours:.1f} tokens/s against {theirs:.1f} ({best})"
    return Target(name=name, required=required, measured=ours / theirs, detail=detail)


def _run_peer(
    tools: Path, model: Path, variant: Variant, options: argparse.Namespace
) -> dict[str, float]:
    rows = batched_bench(
        tools,
        model,
        flash_attention=variant.flash_attention,
        streams=options.streams,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        threads=options.threads,
    )
    rates = {str(row["pl"]): round(row["speed_tg"], 1) for row in rows}
    # Of one prompt alone, or of as few as are measured.
    return rates | {PREFILL: round(min(rows, key=lambda row: row["pl"])["speed_pp"], 1)}


def _proa_arguments(options: argparse.Namespace, source: Path) -> list[str]:
    return [
        str(source),
        *("--streams", ",".join(map(str, options.streams))),
        *("--prompt-tokens", str(options.prompt_tokens)),
        *("--new-tokens", str(options.new_tokens)),
        *("--threads", str(options.threads)),
    ]


def _note(rates: Rates, figures: dict[str, float], title: str) -> None:
    for load, value in figures.items():
        rates[load].append(value)
    say(title + ": " + ", ".join(f"{load} {value}" for load, value in figures.items()))


if __name__ == "__main__":
    sys.exit(main())
