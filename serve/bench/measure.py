"""Measure a set of loads on a stream runner and sum up the repeats."""

import argparse
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from serve.bench.streams import StreamRunner, random_prompts
from stats.summary import latency, spread
from stats.timings import StreamTiming, decode_rate, output_rate, prefill_rate

WARM_UP_TOKENS = 8
PREFILLS_PER_REPEAT = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to measure.

    Attributes:
        streams: numbers of streams to run at once.
        prompt_tokens: tokens of each prompt.
        new_tokens: tokens each stream generates, >= 2.
        repeats: times that everything is measured; the figures are medians.
        seed: of the prompts.
    """

    streams: tuple[int, ...] = (1, 8, 32)
    prompt_tokens: int = 256
    new_tokens: int = 64
    repeats: int = 5
    seed: int = 0


@dataclass(slots=True)
class Measurement:
    """What was measured so far.

    Attributes:
        prefill_rates: prompt tokens per second of one prompt alone.
        rounds: for each number of streams, the timings of each repeat.
    """

    prefill_rates: list[float] = field(default_factory=list)
    rounds: dict[int, list[list[StreamTiming]]] = field(default_factory=dict)


def parse_streams(text: str) -> tuple[int, ...]:
    """Parse the argument of --streams.

    Raises:
        ArgumentTypeError: not a list of positive whole numbers, each given once.
    """
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1 or len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of different whole numbers above 0, such as 1,8,32"
        )
    return numbers


async def measure(
    runners: Mapping[str, StreamRunner], plan: Plan, *, report: Callable[[str], None]
) -> dict[str, Measurement]:
    """Warm up, then run every load `repeats` times, the loads and the runners in turn.

    Args:
        runners: what is measured, by name; one alone may be called "".
        plan: the loads.
        report: called with one line at a time about what was measured.
    """
    rng = random.Random(plan.seed)
    pools = {name: await runner.token_pool() for name, runner in runners.items()}

    async def run(
        name: str, num_streams: int, new_tokens: int, prompt_tokens: int = plan.prompt_tokens
    ) -> list[StreamTiming]:
        prompts = random_prompts(pools[name], num_streams, prompt_tokens, rng)
        return await runners[name].run(prompts, new_tokens)

    for name in runners:
        new_tokens = min(WARM_UP_TOKENS, plan.new_tokens)
        await run(name, 1, new_tokens)
        await run(name, max(plan.streams), new_tokens, min(WARM_UP_TOKENS, plan.prompt_tokens))
    results = {name: Measurement(rounds={num: [] for num in plan.streams}) for name in runners}
    for repeat in range(plan.repeats):
        for name, result in results.items():
            for _ in range(PREFILLS_PER_REPEAT):
                rate = prefill_rate(await run(name, 1, 1), plan.prompt_tokens)
                result.prefill_rates.append(rate)
        for num_streams in plan.streams:
            for name, result in results.items():
                result.rounds[num_streams].append(await run(name, num_streams, plan.new_tokens))
        for name, result in results.items():
            speeds = ", ".join(f"{n}: {decode_rate(r[-1]):.1f}" for n, r in result.rounds.items())
            which = f"{name}, " if name else ""
            report(f"{which}repeat {repeat + 1} of {plan.repeats}: decode tokens/s {speeds}")
    return results


def summarise(measured: Measurement, plan: Plan) -> dict[str, Any]:
    """Give medians over the repeats, with their spread; latencies over all streams of all repeats.

    Returns:
        What `proa bench --json` prints, without what describes the machine and the run.
    """
    figures: dict[str, Any] = {
        "decode_tokens_per_s": {},
        "prefill_tokens_per_s": round(median(measured.prefill_rates), 1),
        "batch_prefill_tokens_per_s": {},
        "output_tokens_per_s": {},
        "ttft_ms": {},
        "tpot_ms": {},
        "spread": {
            "decode_tokens_per_s": {},
            "prefill_tokens_per_s": spread(measured.prefill_rates),
        },
    }
    for num_streams, rounds in measured.rounds.items():
        key = str(num_streams)
        decode = [decode_rate(timings) for timings in rounds]
        streams = [timing for timings in rounds for timing in timings]
        prefill = [prefill_rate(timings, plan.prompt_tokens) for timings in rounds]
        figures["decode_tokens_per_s"][key] = round(median(decode), 1)
        figures["batch_prefill_tokens_per_s"][key] = round(median(prefill), 1)
        figures["output_tokens_per_s"][key] = round(median(map(output_rate, rounds)), 1)
        figures["ttft_ms"][key] = latency([1000 * t.ttft_s for t in streams])
        figures["tpot_ms"][key] = latency(
            [1000 * tpot for t in streams if (tpot := t.tpot_s) is not None]
        )
        figures["spread"]["decode_tokens_per_s"][key] = spread(decode)
    return figures
