"""Time the sampler, native beside torch, and what it costs of the engine's decode speed.

    python -m benchmarks.sampling

The sampler works on random logits of the demo model's vocabulary, flat and peaked. The engine runs
the same load greedily and with a temperature of 0.8 and a top_p of 0.95, in turn.
"""

import argparse
import itertools
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from serve.environment import let_threads_sleep

let_threads_sleep(os.environ)  # before torch is imported

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.engine_in_turn import decode_in_turn  # noqa: E402
from benchmarks.perplexity import add_model_arguments, model_options  # noqa: E402
from benchmarks.report import (  # noqa: E402
    RESULTS,
    Target,
    describe_run,
    finish,
    say,
    target_table,
    warn_if_busy,
)
from decoding import Sampler, SamplingParams, build_token_tables  # noqa: E402
from decoding.strategies import Adapt, DynaTemp  # noqa: E402
from models.decoder import Decoder  # noqa: E402
from serve.base_model import load_base  # noqa: E402
from serve.bench.streams import Decoding  # noqa: E402
from stats.summary import median_ratio  # noqa: E402

CASES = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=0.8),
    "top_k": SamplingParams(temperature=0.8, top_k=40),
    "top_p": SamplingParams(temperature=0.8, top_p=0.95),
    "min_p": SamplingParams(temperature=0.8, min_p=0.05),
    "typical_p": SamplingParams(temperature=0.8, typical_p=0.9),
    "penalties": SamplingParams(
        temperature=0.8, repetition_penalty=1.1, frequency_penalty=0.2, presence_penalty=0.1
    ),
    "adapt": SamplingParams(strategy=Adapt()),
    "dynatemp": SamplingParams(strategy=DynaTemp()),
    "logprobs": SamplingParams(temperature=0.8, logprobs=5),
    "all": SamplingParams(
        top_k=40, typical_p=0.9, top_p=0.95, min_p=0.05, repetition_penalty=1.1,
        strategy=DynaTemp(), logprobs=5,
    ),
}  # fmt: skip
SCALES = {"flat": 0.5, "peaked": 4.0}
PROMPT_TOKENS, NEW_TOKENS = 256, 64
MIN_SHARE = 0.95


def make_logits(kind: str, num_rows: int, vocab_size: int) -> Tensor:
    """Return (num_rows, vocab_size) random logits."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_rows, vocab_size, generator=generator) * SCALES[kind]


def time_ms(call: Callable[[], object], repeats: int) -> float:
    """Return the median time of a call in milliseconds, after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times) * 1e3


def measure_sampler(
    samplers: dict[str, Sampler], vocab_size: int, num_rows: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Time every case on rows that are all alike; return milliseconds by case and sampler."""
    found: dict[str, dict[str, float]] = {}
    prompt = random.Random(0).choices(range(vocab_size), k=PROMPT_TOKENS)
    for kind, (case, params) in itertools.product(SCALES, CASES.items()):
        logits = make_logits(kind, num_rows, vocab_size)
        times = found[f"{case}, {kind}"] = {}
        for name, sampler in samplers.items():
            rows = [sampler.start(params, prompt, seed=seed) for seed in range(num_rows)]
            times[name] = time_ms(lambda s=sampler, x=logits, r=rows: s.sample(x, r), repeats)  # type: ignore[misc]
    return found


def table(found: dict[int, dict[str, dict[str, float]]]) -> str:
    """Lay the sampler's times out, a line for each case."""
    cases = list(next(iter(found.values())))
    width = max(map(len, cases))
    heads = [f"{rows} {name}" for rows, times in found.items() for name in times[cases[0]]]
    lines = [f"{'ms, rows':<{width}}" + "".join(f"  {head:>10}" for head in heads)]
    for case in cases:
        cells = [value for times in found.values() for value in times[case].values()]
        lines.append(f"{case:<{width}}" + "".join(f"  {cell:>10.3f}" for cell in cells))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurements.

    Returns:
        0, or 1 if sampling costs more of the decode speed than it may.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--rows", default="1,8,32", help="[default: %(default)s]")
    parser.add_argument("--repeats", type=int, default=21, help="[default: %(default)s]")
    parser.add_argument("--streams", type=int, default=32, help="[default: %(default)s]")
    parser.add_argument("--rounds", type=int, default=7, help="[default: %(default)s]")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="[default: %(default)s]")
    options = parser.parse_args(arguments)
    warn_if_busy()
    content = describe_run()
    checkpoint = load_base(model_options(options), report=say)
    decoder = Decoder(checkpoint.spec, checkpoint.weights)
    torch.set_num_threads(1)
    vocab_size = checkpoint.spec.vocab_size
    tables = build_token_tables([b"x"] * vocab_size)
    samplers = {"torch": Sampler(tables), "native": Sampler(tables, picker=decoder.make_picker())}
    rows = [int(part) for part in options.rows.split(",")]
    with torch.inference_mode():
        found = {n: measure_sampler(samplers, vocab_size, n, options.repeats) for n in rows}
    print(table(found))
    given = {name: getattr(options, name) for name in ("model", "cache_dir")}
    rates = decode_in_turn(
        {name: str(value) for name, value in given.items() if value is not None},
        {"greedy": Decoding(), "sampled": Decoding(temperature=0.8, top_p=0.95)},
        num_streams=options.streams, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS,
        rounds=options.rounds,
    )  # fmt: skip
    target = Target(
        name=f"temperature 0.8, top_p 0.95 against greedy, {options.streams} streams",
        required=MIN_SHARE,
        measured=median_ratio(rates["sampled"], rates["greedy"]),
        detail=f"{median(rates['sampled']):.1f} and {median(rates['greedy']):.1f} tokens/s",
    )
    print(target_table([target]))
    content |= {
        "kernels": decoder.kernels,
        "milliseconds": {
            str(n): {case: {k: round(v, 4) for k, v in times.items()} for case, times in of.items()}
            for n, of in found.items()
        },
        "decode_tokens_per_s": rates,
        "targets": [target.as_json()],
    }
    finish("sampling", content, options.output_dir)
    return 0 if target.is_met else 1


if __name__ == "__main__":
    sys.exit(main())
