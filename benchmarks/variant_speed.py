"""Size and speed of variants beside their base, all in one process, in turn.

    python -m benchmarks.variant_speed --variant small=./small --variant thin=./thin --eight-bits

With `--eight-bits` the base with all of its layers in 8 bits is one more model, for variants whose
factors are in 8 bits. Each model runs in an engine as the server does, one stream at a time;
variants share what they have in common with the base, as they do when they are served. Prints one
JSON object.
"""

import argparse
import json
import os
import random
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from serve.environment import let_threads_sleep

let_threads_sleep(os.environ)  # before torch is imported

import torch  # noqa: E402

from adapters.format import digest  # noqa: E402
from adapters.qst.memory import weight_bytes  # noqa: E402
from benchmarks.perplexity import add_model_arguments, model_options  # noqa: E402
from benchmarks.report import say  # noqa: E402
from decoding import Sampler  # noqa: E402
from models.checkpoints import Checkpoint  # noqa: E402
from models.decoder import Decoder  # noqa: E402
from models.q8_0 import quantize_q8_0  # noqa: E402
from models.weights import Weight, dense, iterate_matrices  # noqa: E402
from serve.backends.native import NativeBackend  # noqa: E402
from serve.base_model import load_base, load_tokenizer, load_variant  # noqa: E402
from serve.bench.engine import EngineStreams  # noqa: E402
from serve.bench.streams import Decoding, random_prompts  # noqa: E402
from serve.engine.limits import EngineLimits  # noqa: E402
from serve.event_loop import run_on_loop  # noqa: E402
from stats.summary import median_ratio  # noqa: E402
from stats.timings import decode_rate, prefill_rate  # noqa: E402

BASE = "base"
EIGHT_BITS = "base-8-bits"
_BLOCK_TOKENS = 16


def own_bytes(checkpoint: Checkpoint, base: Checkpoint) -> int:
    """Return the bytes of a variant's weights that are not the base's own tensors."""
    own = (w for name, w in checkpoint.weights.items() if w is not base.weights.get(name))
    return sum(weight_bytes(matrix) for matrix in iterate_matrices(own))


def layer_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of the weights of a model's layers."""
    layers = (w for name, w in checkpoint.weights.items() if name.startswith("layers."))
    return sum(map(weight_bytes, iterate_matrices(layers)))


def in_eight_bits(base: Checkpoint) -> Checkpoint:
    """Return a base whose layers are rounded to 8 bits."""
    weights = {
        name: quantize_q8_0(dense(weight)) if _is_matrix(name, weight) else weight
        for name, weight in base.weights.items()
    }
    return replace(base, weights=weights)


def _is_matrix(name: str, weight: Weight) -> bool:
    return name.startswith("layers.") and len(weight.shape) == 2


async def measure_speed(
    decoders: dict[str, Decoder], sampler: Sampler, options: argparse.Namespace
) -> dict[str, dict[str, list[float]]]:
    """Measure every model once in each round; return tokens/s by model."""
    most = max(options.prefill_tokens + 1, options.prompt_tokens + options.new_tokens)
    limits = EngineLimits(num_cache_blocks=4 * (most // _BLOCK_TOKENS + 1))
    backends = {
        name: NativeBackend(decoder, sampler, limits, eos_token_ids=())
        for name, decoder in decoders.items()
    }
    runners = {name: EngineStreams(found, Decoding()) for name, found in backends.items()}
    rng = random.Random(0)
    pool = range(decoders[BASE].spec.vocab_size)
    raw: dict[str, dict[str, list[float]]] = {n: {"decode": [], "prefill": []} for n in runners}
    names = list(runners)
    for i in range(-1, options.rounds):  # the first warms up
        for name in names[i % len(names) :] + names[: i % len(names)]:
            prompts = random_prompts(pool, 1, options.prompt_tokens, rng)
            decode = decode_rate(await runners[name].run(prompts, options.new_tokens))
            prompts = random_prompts(pool, 1, options.prefill_tokens, rng)
            timings = await runners[name].run(prompts, 1)
            if i >= 0:
                raw[name]["decode"].append(decode)
                raw[name]["prefill"].append(prefill_rate(timings, options.prefill_tokens))
        say(f"round {i + 1} of {options.rounds} done")
    for backend in backends.values():
        backend.close()
    return raw


def ratios(raw: dict[str, dict[str, list[float]]], name: str, what: str) -> dict[str, float]:
    """Return the median of a model's rates, and of their ratios to the base's of the same round."""
    ours, base = raw[name][what], raw[BASE][what]
    return {
        "tokens_per_s": median(ours),
        "ratio": median_ratio(ours, base),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Load base and variants, and measure what the command line asks for."""
    parts = [text.partition("=") for text in options.variant]
    about = model_options(options)
    base = load_base(about, report=say)
    _, tables = load_tokenizer(base)
    found: dict[str, dict[str, Any]] = {
        BASE: {
            "weight_bytes": sum(map(weight_bytes, base.weights.values())),
            "layer_bytes": layer_bytes(base),
        }
    }
    variants: dict[str, Checkpoint] = {}
    for name, _, text in parts:
        folder = Path(text)
        variants[name] = load_variant(about, base, [folder], report=say)
        found[name] = {
            "variant": digest(folder),
            "folder_bytes": sum(path.stat().st_size for path in folder.glob("adapter_*")),
        }
    decoders = {BASE: Decoder(base.spec, base.weights)} if options.rounds else {}
    if options.eight_bits:
        variants[EIGHT_BITS] = in_eight_bits(base)
    for name, pruned in variants.items():
        sizes = {"own_bytes": own_bytes(pruned, base), "layer_bytes": layer_bytes(pruned)}
        found.setdefault(name, {}).update(sizes)
        if options.rounds:
            decoders[name] = Decoder(pruned.spec, pruned.weights, base=decoders[BASE])
    if options.rounds:
        torch.set_num_threads(1)
        sampler = Sampler(tables, eos_token_ids=(), picker=decoders[BASE].make_picker())
        raw = run_on_loop(measure_speed(decoders, sampler, options))
        for name in found:
            found[name] |= {what: ratios(raw, name, what) for what in ("decode", "prefill")}
            found[name]["raw"] = raw[name]
    kernels = decoders[BASE].kernels if decoders else None
    return {"kernels": kernels, "models": found}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--variant", metavar="NAME=DIR", action="append", default=[])
    parser.add_argument("--eight-bits", action="store_true", help="the base in 8 bits too")
    parser.add_argument("--rounds", type=int, default=9, help="0: sizes only")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prefill-tokens", type=int, default=512)
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
