"""QLoRA with PEFT and bitsandbytes: the peer of side networks in training.

    python -m benchmarks.qlora --data FILE --eval-data FILE --steps 200

Prints one JSON object: losses, seconds a step, and memory. The base is in NF4, as QLoRA has it, or
with `--quantization none` the very weights that `proa train qst` trains on, unpacked: bitsandbytes
reads no block formats. The examples, their order and the batches are the same, padded as PEFT needs
it. PEFT is no requirement of Proa: `pip install peft`.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from adapters.qst.examples import DataOrder, Example
from adapters.qst.memory import PeakMemory
from adapters.qst.training_config import TrainingConfig
from benchmarks.training_data import add_data_arguments, load_examples
from models.checkpoints import load_checkpoint

ALL_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build_model(folder: Path, rank: int, *, dtype: torch.dtype, checkpointing: bool) -> Any:
    """Return the base with LoRA matrices of a rank on every linear of its layers."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    elif checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=ALL_LINEARS,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, config)


def pad(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Return (B, S) input_ids, attention_mask and labels."""
    longest = max(len(example.token_ids) for example in examples)
    ids, masks, labels = [], [], []
    for example in examples:
        missing = longest - len(example.token_ids)
        ids.append([*example.token_ids, *[0] * missing])
        masks.append([1] * len(example.token_ids) + [0] * missing)
        pairs = zip(example.token_ids, example.is_target, strict=True)
        labels.append([t if wanted else -100 for t, wanted in pairs] + [-100] * missing)
    parts = {"input_ids": ids, "attention_mask": masks, "labels": labels}
    return {name: torch.tensor(rows) for name, rows in parts.items()}


def sum_loss(model: Any, examples: Sequence[Example]) -> torch.Tensor:
    """Return the sum of the cross entropies over the targets."""
    batch = pad(examples)
    labels = batch.pop("labels")
    logits = model(**batch).logits[:, :-1].float()
    return F.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


@torch.no_grad()
def evaluate(model: Any, examples: Sequence[Example], batch_size: int) -> float:
    """Return the mean loss over the targets of held-out examples."""
    batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    total = sum(float(sum_loss(model, batch)) for batch in batches)
    return total / sum(example.num_targets for example in examples)


def train(
    model: Any,
    examples: Sequence[Example],
    eval_examples: Sequence[Example],
    config: TrainingConfig,
    *,
    eval_every: int,
) -> dict[str, Any]:
    """Train; return losses and times."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    steps, order = config.num_steps(len(examples)), DataOrder(len(examples), config.seed)
    result: dict[str, Any] = {
        "trainable_parameters": sum(p.numel() for p in parameters), "held_out": [], "step_s": [],
    }  # fmt: skip
    if eval_examples:
        with model.disable_adapter():
            result["base_held_out_loss"] = evaluate(model, eval_examples, config.batch_size)
    memory = PeakMemory(torch.device("cpu"))
    for step in range(steps):
        batch = [examples[i] for i in order.take(step * config.batch_size, config.batch_size)]
        start_s = time.perf_counter()
        loss = sum_loss(model, batch) / sum(example.num_targets for example in batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * config.rate_factor(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        result["step_s"].append(time.perf_counter() - start_s)
        result["loss"] = float(loss.detach())
        if math.isnan(result["loss"]):
            break
        if eval_examples and ((step + 1) % eval_every == 0 or step + 1 == steps):
            held_out = evaluate(model, eval_examples, config.batch_size)
            result["held_out"].append([step + 1, held_out])
            print(f"step {step + 1}: held-out loss {held_out:.4f}", flush=True)
    result["median_step_s"] = statistics.median(result.pop("step_s"))
    result["memory_above_start_bytes"] = memory.read()[1]
    return result


def main() -> None:
    """Train as the command line says and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_data_arguments(parser)
    parser.add_argument("--quantization", choices=("nf4", "none"), default="nf4")
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    arguments = parser.parse_args()
    checkpoint = load_checkpoint(
        None, quantization=arguments.quantization, cache_dir=arguments.cache_dir
    )
    examples, eval_examples = load_examples(arguments, checkpoint)
    model = build_model(
        checkpoint.folder, arguments.rank, dtype=getattr(torch, arguments.dtype),
        checkpointing=arguments.gradient_checkpointing,
    )  # fmt: skip
    config = TrainingConfig(
        steps=arguments.steps, batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
    )  # fmt: skip
    result = train(model, examples, eval_examples, config, eval_every=arguments.eval_every)
    print(json.dumps({"options": {k: str(v) for k, v in vars(arguments).items()}, **result}))


if __name__ == "__main__":
    main()
