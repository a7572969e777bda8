"""Many LoRA adapters on one 4-bit base with PEFT: the peer of side networks in serving.

    python -m benchmarks.multi_lora --adapters 64

Prints one JSON object. The base is the NF4 checkpoint that Proa serves, loaded by transformers with
bitsandbytes; rows of a batch choose their adapter by `adapter_names`. PEFT is no requirement of
Proa: `pip install peft`.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.qlora import ALL_LINEARS
from benchmarks.serving import memory_mb
from models.checkpoints import load_checkpoint


def build_model(folder: Path, rank: int, num_adapters: int) -> tuple[Any, int]:
    """Return the base with LoRA adapters `a0`, `a1`, ..., and the memory that those took."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = LoraConfig(r=rank, target_modules=ALL_LINEARS, init_lora_weights=False)
    before = int(1e6 * memory_mb(os.getpid(), "VmRSS"))
    peft = get_peft_model(model, config, adapter_name="a0")
    for i in range(1, num_adapters):
        peft.add_adapter(f"a{i}", config)
    return peft.eval(), int(1e6 * memory_mb(os.getpid(), "VmRSS")) - before


@torch.inference_mode()
def prefill(model: Any, prompts: torch.Tensor, names: Sequence[str]) -> Any:
    """Compute (B, S) prompts; return keys and values."""
    return model(
        input_ids=prompts, adapter_names=list(names), use_cache=True, logits_to_keep=1
    ).past_key_values


@torch.inference_mode()
def decode_rate(model: Any, prompts: torch.Tensor, names: Sequence[str], num_tokens: int) -> float:
    """Return tokens/s of all rows together after (B, S) prompts."""
    cache = prefill(model, prompts, names)
    token = prompts[:, -1:]
    start_s = time.perf_counter()
    for _ in range(num_tokens):
        output = model(
            input_ids=token, past_key_values=cache, adapter_names=list(names), use_cache=True
        )
        cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
    return len(prompts) * num_tokens / (time.perf_counter() - start_s)


def timed(run: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s


def main() -> None:
    """Measure as the command line says and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--cache-dir", type=Path, default=None)
    arguments = parser.parse_args()
    checkpoint = load_checkpoint(None, quantization="nf4", cache_dir=arguments.cache_dir)
    model, adapter_bytes = build_model(checkpoint.folder, arguments.rank, arguments.adapters)
    generator = torch.Generator().manual_seed(1)
    short = torch.randint(1000, 40_000, (8, 256), generator=generator)
    long = torch.randint(1000, 40_000, (1, arguments.prompt_tokens), generator=generator)
    one, eight = ["a0"] * 8, [f"a{i}" for i in range(8)]
    runs: dict[str, Callable[[], float]] = {
        "decode_8_one_adapter": lambda: decode_rate(model, short, one, arguments.new_tokens),
        "decode_8_eight_adapters": lambda: decode_rate(model, short, eight, arguments.new_tokens),
        "prefill_one_adapter_s": lambda: timed(lambda: prefill(model, long, ["a0"])),
        "prefill_eight_adapters_s": lambda: timed(
            lambda: prefill(model, long.expand(8, -1), eight)
        ),
    }
    raw: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.repeats):
        for name, run in runs.items():
            raw[name].append(run())
    medians = {name: statistics.median(values) for name, values in raw.items()}
    print(
        json.dumps({**medians, "adapter_bytes": adapter_bytes, "rank": arguments.rank, "raw": raw})
    )


if __name__ == "__main__":
    main()
