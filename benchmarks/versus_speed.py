"""Decode and prefill speed of Proa and of llama.cpp's variants, in turn, alone and in company."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.busy import busy_processes
from benchmarks.engine_in_turn import decode_in_turn
from benchmarks.llama_cpp import Load, Variant, batched_bench
from benchmarks.read_bandwidth import measure_bandwidth
from benchmarks.report import run_command, run_proa_bench, say
from benchmarks.versus_goals import Figure
from serve.bench.streams import Decoding
from stats.summary import median_ratio

PREFILL = "prefill"
MOST_STREAMS = "32"  # whose decode speed is held against the prefill's
QUALIFYING_TOKENS = 16
CONTENDERS_PER_LOAD = 2
BUSY_STREAMS = (1, 8)
BUSY_PROCESSES = 2
BUSY_PROMPT_TOKENS = 64
BUSY_NEW_TOKENS = 32
BUSY_LIMIT_S = 3600.0
SAMPLER_STREAMS = 32
# Short prompts: attention hides less of what the sampler costs.
SAMPLER_PROMPT_TOKENS = 32
SAMPLED = Decoding(temperature=0.8, top_p=0.95)
GREEDY = Decoding()
OTHERS = {"OpenVINO GenAI": "openvino_worker.py", "vLLM": "vllm_worker.py"}
"""Files that measure runtimes which are held against nothing."""

Rates = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Proa:
    """How Proa is run.

    Attributes:
        source: the GGUF file.
        given: options of the server that are not the default, by name.
    """

    source: Path
    given: Mapping[str, str] = field(default_factory=dict)

    @property
    def arguments(self) -> list[str]:
        """Model and options of its commands."""
        flags = [("--" + name.replace("_", "-"), value) for name, value in self.given.items()]
        return [str(self.source), *(word for flag in flags for word in flag)]

    def rates(self, load: Load) -> tuple[dict[str, float], dict[str, Any]]:
        """Measure a load once; return tokens per second, and all that `proa bench` says."""
        figures = run_proa_bench(
            [
                *self.arguments,
                *("--streams", ",".join(map(str, load.streams)), "--repeats", "1"),
                *("--prompt-tokens", str(load.prompt_tokens)),
                *("--new-tokens", str(load.new_tokens)),
            ]
        )
        rates = figures["decode_tokens_per_s"] | {PREFILL: figures["prefill_tokens_per_s"]}
        return rates, figures


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """A built llama.cpp and the model in its formats.

    Attributes:
        tools: folder of its programs.
        models: GGUF files by format.
    """

    tools: Path
    models: Mapping[str, Path]

    def rates(self, variant: Variant, load: Load) -> dict[str, float]:
        """Measure a load once, in tokens per second; prefill is that of one prompt."""
        rows = batched_bench(self.tools, self.models[variant.format], variant, load)
        rates = {str(row["pl"]): round(row["speed_tg"], 1) for row in rows}
        return rates | {PREFILL: round(median(row["speed_pp"] for row in rows), 1)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Other:
    """A runtime that is measured beside the two and held against nothing.

    Attributes:
        name: one of `OTHERS`.
        python: an interpreter that has it.
        model: the GGUF file, or what the runtime reads in its place.
    """

    name: str
    python: Path
    model: Path

    def rates(self, load: Load) -> dict[str, float]:
        """Measure a load once, in tokens per second; prefill is that of one prompt."""
        worker = Path(__file__).with_name(OTHERS[self.name])
        numbers = (load.threads, load.prompt_tokens, load.new_tokens)
        streams = ",".join(map(str, load.streams))
        output = run_command(
            [self.python, "-P", worker, self.model, *numbers, streams], is_quiet=True
        )
        rates: dict[str, float] = json.loads(output.splitlines()[-1])
        return rates


def qualify(peer: Peer, variants: Sequence[Variant], load: Load) -> dict[Variant, Rates]:
    """Measure every variant once, on few tokens."""
    short = replace(load, new_tokens=min(QUALIFYING_TOKENS, load.new_tokens))
    found: dict[Variant, Rates] = {variant: defaultdict(list) for variant in variants}
    for variant, rates in found.items():
        _note(rates, peer.rates(variant, short), f"qualifying: llama.cpp {variant}")
    return found


def pick_contenders(
    qualified: Mapping[Variant, Rates], loads: Sequence[str], per_load: int = CONTENDERS_PER_LOAD
) -> list[Variant]:
    """Choose the best variants of each load, by the medians of their rates."""
    best = {
        variant
        for load in loads
        for variant in sorted(qualified, key=lambda v: -median(qualified[v][load]))[:per_load]
    }
    return [variant for variant in qualified if variant in best]


def compare_decode(
    proa: Proa,
    peer: Peer,
    contenders: Sequence[Variant],
    load: Load,
    *,
    repeats: int,
    reader: Path,
    weight_bytes: int,
    others: Sequence[Other] = (),
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Compare decode and prefill, round by round, with the read bandwidth of the same rounds.

    Args:
        proa, peer: the two.
        contenders: variants of the peer.
        load: what is measured.
        repeats: rounds.
        reader: the program that measures the bandwidth.
        weight_bytes: that a step reads.
        others: measured in every round, too.
    """
    ours: Rates = defaultdict(list)
    peers: dict[Variant, Rates] = {variant: defaultdict(list) for variant in contenders}
    beside: dict[str, Rates] = {other.name: defaultdict(list) for other in others}
    bandwidths = []
    told: dict[str, Any] = {}
    for number in range(1, repeats + 1):
        for variant, rates in peers.items():
            _note(rates, peer.rates(variant, load), f"round {number}: llama.cpp {variant}")
        figures, told = proa.rates(load)
        _note(ours, figures, f"round {number}: proa")
        for other in others:
            _note(beside[other.name], other.rates(load), f"round {number}: {other.name}")
        bandwidths.append(measure_bandwidth(reader, threads=load.threads))
        say(f"round {number}: {bandwidths[-1] / 1e9:.1f} GB/s can be read")
    measured = {
        (name if name == PREFILL else f"decode_{name}"): against_best(name, ours[name], peers)
        for name in ours
    }
    if MOST_STREAMS in ours:
        decoded = ours[MOST_STREAMS]
        measured["of_prefill"] = Figure(
            value=median_ratio(decoded, ours[PREFILL]),
            detail=f"{median(decoded):.1f} tokens/s against {median(ours[PREFILL]):.1f}",
        )
    if "1" in ours:
        read = [rate * weight_bytes for rate in ours["1"]]
        measured["bandwidth"] = Figure(
            value=100 * median_ratio(read, bandwidths),
            detail=f"{median(read) / 1e9:.1f} GB/s of {median(bandwidths) / 1e9:.1f} "
            f"({weight_bytes / 1e6:.0f} MB of weights a token)",
        )
    content = {
        "config": told["config"],
        "kernels": told["kernels"],
        "weight_bytes_per_token": weight_bytes,
        "read_bandwidth_gb_per_s": [round(rate / 1e9, 2) for rate in bandwidths],
        "tokens_per_s": _by_name(ours, peers) | beside,
    }
    return measured, content


def compare_busy(
    proa: Proa, peer: Peer, contenders: Sequence[Variant], *, threads: int, repeats: int
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Compare decode beside processes that compute without pause, round by round.

    The peer's threads may wait in either way; the better one counts.
    """
    load = Load(
        streams=BUSY_STREAMS, prompt_tokens=BUSY_PROMPT_TOKENS, new_tokens=BUSY_NEW_TOKENS,
        threads=threads,
    )  # fmt: skip
    ours: Rates = defaultdict(list)
    peers: dict[Variant, Rates] = {
        replace(variant, waits_actively=active): defaultdict(list)
        for variant in contenders
        for active in (True, False)
    }
    with busy_processes(BUSY_PROCESSES, limit_s=BUSY_LIMIT_S):
        for number in range(1, repeats + 1):
            for variant, rates in peers.items():
                title = f"beside busy processes, round {number}"
                _note(rates, peer.rates(variant, load), f"{title}: llama.cpp {variant}")
            _note(ours, proa.rates(load)[0], f"{title}: proa")
    measured = {f"busy_{n}": against_best(str(n), ours[str(n)], peers) for n in BUSY_STREAMS}
    return measured, {"processes": BUSY_PROCESSES, "tokens_per_s": _by_name(ours, peers)}


def compare_sampler(
    proa: Proa, *, new_tokens: int, rounds: int
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Compare decoding at a temperature with top_p to greedy decoding."""
    rates = decode_in_turn(
        {"model": str(proa.source), **proa.given}, {"greedy": GREEDY, "sampled": SAMPLED},
        num_streams=SAMPLER_STREAMS, prompt_tokens=SAMPLER_PROMPT_TOKENS, new_tokens=new_tokens,
        rounds=rounds,
    )  # fmt: skip
    sampled, greedy = (median(rates[name]) for name in ("sampled", "greedy"))
    measured = Figure(
        value=median_ratio(rates["sampled"], rates["greedy"]),
        detail=f"{sampled:.1f} tokens/s against {greedy:.1f}, {SAMPLER_STREAMS} streams, "
        f"temperature {SAMPLED.temperature}, top_p {SAMPLED.top_p}",
    )
    return {"sampler": measured}, {"tokens_per_s": rates}


def against_best(load: str, proa: Sequence[float], peers: Mapping[Variant, Rates]) -> Figure:
    """Compare the median at one load with the best median of the peer's variants."""
    best = max(peers, key=lambda variant: median(peers[variant][load]))
    ours, theirs = median(proa), median(peers[best][load])
    return Figure(value=ours / theirs, detail=f"{ours:.1f} tokens/s against {theirs:.1f} ({best})")


def _by_name(ours: Rates, peers: Mapping[Variant, Rates]) -> dict[str, Rates]:
    return {"proa": ours, **{f"llama.cpp {variant}": rates for variant, rates in peers.items()}}


def _note(rates: Rates, figures: Mapping[str, float], title: str) -> None:
    for load, value in figures.items():
        rates[load].append(value)
    say(title + ": " + ", ".join(f"{load} {value}" for load, value in figures.items()))
