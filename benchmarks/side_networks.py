"""Measure serving with side networks: speed beside the bare base, many adapters, shared prompts.

    python -m benchmarks.side_networks [--side-attention base --side-layers M]

Runs the engine in this process, as the server does, on the demo model; then PEFT with as many LoRA
adapters on that model in NF4, if it is installed.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch

from adapters.qst.adapter import save_qst
from adapters.qst.config import QstConfig
from adapters.qst.network import QstNetwork
from benchmarks.report import (
    Target,
    describe_run,
    finish,
    run_command,
    say,
    target_table,
    warn_if_busy,
)
from benchmarks.serving import memory_mb
from decoding import Sampler, SamplingParams
from models.checkpoints import Checkpoint, load_checkpoint
from models.decoder import Decoder
from serve.attachments.native import NativeHost, NativeLoader, NativeRegistry
from serve.backends.native import NativeBackend
from serve.base_model import build_decoder, find_lineage, load_tokenizer
from serve.bench.streams import random_prompts
from serve.engine.limits import EngineLimits
from serve.event_loop import run_on_loop
from serve.model_options import ModelOptions
from serve.requests import Arm, GenerationRequest
from stats.timings import StreamTiming, decode_rate

STREAMS = 8
CONTEXT_TOKENS = 49_152


class Bench:
    """A backend with adapters `a0`, `a1`, ... and what is asked of it.

    Args:
        checkpoint: the base.
        decoder: made of it.
        folders: an adapter each.
    """

    def __init__(self, checkpoint: Checkpoint, decoder: Decoder, folders: Sequence[Path]) -> None:
        _, tables = load_tokenizer(checkpoint)
        lineage = find_lineage(ModelOptions(), checkpoint)
        loader = NativeLoader(
            NativeHost(decoder=decoder, lineage=lineage), partial(build_decoder, ModelOptions()),
            report=lambda _: None,
        )  # fmt: skip
        self.registry = NativeRegistry(loader.load)
        self.backend = NativeBackend(
            decoder,
            Sampler(tables, eos_token_ids=(), picker=decoder.make_picker()),
            EngineLimits(num_cache_blocks=CONTEXT_TOKENS // 16),
            eos_token_ids=(),
            adapters=self.registry,
        )
        self._folders = folders
        self._numbers = count()
        self._random = random.Random(1)

    def attach(self, number: int) -> None:
        """Attach so many of the adapters."""
        for i in range(number):
            if f"a{i}" not in {info.name for info in self.registry.infos()}:
                self.registry.attach_folder(f"a{i}", self._folders[i])

    async def stream(
        self, prompt: list[int], num_tokens: int, adapters: Sequence[str | None]
    ) -> tuple[StreamTiming, dict[int, list[int]]]:
        """Ask one prompt of some adapters; return when tokens came, and them by arm."""
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=0, temperature=0.0)
        request = GenerationRequest(
            request_id=f"bench-{next(self._numbers)}",
            prompt_token_ids=prompt,
            arms=tuple(Arm(params=params, adapter=name) for name in adapters),
        )
        tokens: dict[int, list[int]] = {i: [] for i in range(len(adapters))}
        arrivals, counts = [], []
        sent_s = time.perf_counter()
        async for outputs in self.backend.generate(request):
            arrivals.append(time.perf_counter())
            for output in outputs:
                if output.token_id is not None:
                    tokens[output.sequence_index].append(output.token_id)
            counts.append(sum(map(len, tokens.values())))
        timing = StreamTiming(sent_s=sent_s, arrivals_s=tuple(arrivals), token_counts=tuple(counts))
        return timing, tokens

    async def decode(self, adapters: Sequence[str | None], num_tokens: int) -> float:
        """Return tokens/s of one stream for each entry, while all of them decode."""
        prompts = random_prompts(range(1000, 40_000), len(adapters), 256, self._random)
        streams = (
            self.stream(prompt, num_tokens, [name])
            for prompt, name in zip(prompts, adapters, strict=True)
        )
        return decode_rate([timing for timing, _ in await asyncio.gather(*streams)])

    async def prefill(self, adapters: Sequence[str | None], prompt_tokens: int) -> float:
        """Return the seconds until every adapter has answered a new prompt with one token."""
        (prompt,) = random_prompts(range(1000, 40_000), 1, prompt_tokens, self._random)
        timing, _ = await self.stream(prompt, 1, adapters)
        return timing.arrivals_s[-1] - timing.sent_s

    async def switch(self, prompt_tokens: int) -> dict[str, Any]:
        """Ask a conversation of one adapter, then of another, and of that one once more."""
        (prompt,) = random_prompts(range(1000, 40_000), 1, prompt_tokens, self._random)
        await self.stream(prompt, 8, ["a0"])
        before = self.backend.stats()
        warm_timing, warm = await self.stream(prompt, 16, ["a1"])
        after = self.backend.stats()
        again, _ = await self.stream(prompt, 1, ["a1"])
        return {
            "prompt_tokens": prompt_tokens,
            "base_tokens_found": after.base_cached_prompt_tokens - before.base_cached_prompt_tokens,
            "prompt": prompt,
            "answer": warm[0],
            "first_token_s": warm_timing.arrivals_s[0] - warm_timing.sent_s,
            "own_hit_s": again.arrivals_s[0] - again.sent_s,
        }


def write_adapters(checkpoint: Checkpoint, folder: Path, number: int, qst: QstConfig) -> list[Path]:
    """Write random adapters that differ from the base, all of one shape."""
    folders = []
    for i in range(number):
        network = QstNetwork(checkpoint.spec, qst, seed=i)
        with torch.no_grad():
            if network.is_fork:
                for name, parameter in network.named_parameters():
                    if name.endswith(".left"):
                        parameter.uniform_(-0.01, 0.01)
            else:
                network.get_parameter("alpha").fill_(0.9)
        folders.append(folder / f"a{i}")
        save_qst(
            folders[-1], network, base_id=checkpoint.name,
            base_fingerprint=checkpoint.fingerprint, base_quantization=checkpoint.quantization,
        )  # fmt: skip
    return folders


async def in_turn(
    runs: dict[str, Callable[[], Awaitable[float]]], repeats: int
) -> dict[str, list[float]]:
    """Run each measurement once in every round; return its values."""
    for run in runs.values():
        await run()
    raw: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats):
        for name, run in runs.items():
            raw[name].append(await run())
        say(f"round {i + 1} of {repeats} done")
    return raw


async def measure(options: argparse.Namespace, checkpoint: Checkpoint, folder: Path) -> dict:
    """Measure ours; return raw figures."""
    is_fork = options.side_attention == "base"
    shape = {"side_layers": options.side_layers} if is_fork else {"reduction": options.reduction}
    qst = QstConfig(side_attention=options.side_attention, **shape)
    folders = write_adapters(checkpoint, folder, options.adapters, qst)
    decoder = Decoder(checkpoint.spec, checkpoint.weights)
    torch.set_num_threads(1)
    bench = Bench(checkpoint, decoder, folders)
    bench.attach(STREAMS)
    one, eight = ["a0"] * STREAMS, [f"a{i}" for i in range(STREAMS)]
    tokens, prompt = options.new_tokens, options.prompt_tokens
    runs: dict[str, Callable[[], Awaitable[float]]] = {
        "decode_1_base": lambda: bench.decode([None], tokens),
        "decode_1_adapter": lambda: bench.decode(["a0"], tokens),
        "decode_8_base": lambda: bench.decode([None] * STREAMS, tokens),
        "decode_8_one_adapter": lambda: bench.decode(one, tokens),
        "decode_8_eight_adapters": lambda: bench.decode(eight, tokens),
        "prefill_base_s": lambda: bench.prefill([None], prompt),
        "prefill_one_adapter_s": lambda: bench.prefill(["a0"], prompt),
        "prefill_eight_adapters_s": lambda: bench.prefill(eight, prompt),
    }
    raw: dict[str, Any] = await in_turn(runs, options.repeats)
    switches = [await bench.switch(prompt) for _ in range(options.repeats)]
    raw["switched_s"] = [switch["first_token_s"] for switch in switches]
    raw["own_hit_s"] = [switch["own_hit_s"] for switch in switches]
    switched = switches[-1]
    cold = Bench(checkpoint, decoder, folders)
    cold.attach(2)
    _, answer = await cold.stream(switched.pop("prompt"), 16, ["a1"])
    cold.backend.close()
    raw["switch"] = {**switched, "is_equal_to_a_cold_run": answer[0] == switched["answer"]}
    before = memory_mb(os.getpid(), "VmRSS")
    bench.attach(options.adapters)
    raw["adapters_mb"] = memory_mb(os.getpid(), "VmRSS") - before
    raw["adapters_attached_then"] = options.adapters - STREAMS
    raw["adapter_bytes"] = bench.registry.infos()[0].num_bytes
    every = [f"a{i}" for i in range(options.adapters)]
    raw["decode_all_adapters"] = await bench.decode(every, 16)
    raw["prefill_all_adapters_s"] = [
        await bench.prefill(every, prompt) for _ in range(options.repeats)
    ]
    raw["all_adapters_running_mb"] = memory_mb(os.getpid(), "VmRSS") - before
    bench.backend.close()
    return raw


def judge(raw: dict[str, Any]) -> list[Target]:
    """Hold the figures against what they must reach."""
    mid = {name: median(values) for name, values in raw.items() if isinstance(values, list)}

    def ratio(name: str, required: float, top: str, bottom: str, **options: Any) -> Target:
        detail = f"{mid[top]:.4g} / {mid[bottom]:.4g}"
        return Target(
            name=name, required=required, measured=mid[top] / mid[bottom], detail=detail, **options
        )

    switch = raw["switch"]
    whole_blocks = (switch["prompt_tokens"] - 1) // 16 * 16
    per_adapter = raw["adapters_mb"] * 1e6 / raw["adapters_attached_then"]
    return [
        ratio("decode, 1 stream, adapter against base", 0.95, "decode_1_adapter", "decode_1_base"),
        ratio("decode, 8 streams", 0.95, "decode_8_one_adapter", "decode_8_base"),
        ratio("8 adapters against one", 0.9, "decode_8_eight_adapters", "decode_8_one_adapter"),
        ratio(
            "prompt asked of 8 adapters against one", 1.8, "prefill_eight_adapters_s",
            "prefill_one_adapter_s", is_ceiling=True,
        ),
        ratio(
            "prompt asked of all adapters against one", 1.3, "prefill_all_adapters_s",
            "prefill_one_adapter_s", is_ceiling=True,
        ),
        ratio(
            "first token after a switch against the adapter's own hit", 1.2, "switched_s",
            "own_hit_s", is_ceiling=True,
        ),
        Target(
            name="memory of an adapter against its tensors", required=1.25,
            measured=per_adapter / raw["adapter_bytes"], is_ceiling=True,
            detail=f"{per_adapter / 1e6:.2f} MB / {raw['adapter_bytes'] / 1e6:.2f} MB",
        ),
        Target(
            name="base KV found on a switch", required=1.0,
            measured=switch["base_tokens_found"] / whole_blocks, unit="of whole blocks",
            detail=f"{switch['base_tokens_found']} of {whole_blocks} tokens, answer equal to a "
            f"cold run: {switch['is_equal_to_a_cold_run']}",
        ),
    ]  # fmt: skip


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--side-attention", choices=("own", "base"), default="own")
    parser.add_argument("--reduction", type=int, default=16)
    parser.add_argument("--side-layers", type=int, default=4, help="of a fork")
    parser.add_argument("--cache-dir", type=Path, default=None)
    parser.add_argument("--no-peer", action="store_true", help="leave PEFT out")
    options = parser.parse_args()
    warn_if_busy()
    run = describe_run()
    checkpoint = load_checkpoint(None, cache_dir=options.cache_dir)
    with tempfile.TemporaryDirectory() as folder:
        raw = run_on_loop(measure(options, checkpoint, Path(folder)))
    targets = judge(raw)
    print(target_table(targets))
    peer = None
    if not options.no_peer and find_spec("peft") is not None:
        say("now PEFT with LoRA adapters")
        command = [sys.executable, "-m", "benchmarks.multi_lora", "--adapters", options.adapters]
        cache = [] if options.cache_dir is None else ["--cache-dir", options.cache_dir]
        peer = json.loads(run_command([*command, *cache]).strip().splitlines()[-1])
    figures = {"targets": [target.as_json() for target in targets], "proa": raw, "peft": peer}
    what = "side_networks" if options.side_attention == "own" else "forks"
    finish(what, {**run, "options": {k: str(v) for k, v in vars(options).items()},
                             **figures})  # fmt: skip
    is_exact = raw["switch"]["is_equal_to_a_cold_run"]
    return 0 if is_exact and all(target.is_met for target in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
