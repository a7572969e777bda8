"""Fine-tune an image classifier on a folder of class folders, so that it is worth compressing.

    python -m benchmarks.finetune_vision --model ./vit --data ./images/train --output ./tuned

One pass over 10,000 images of 112 pixels with a ViT-S takes some 15 minutes on 2 cores. Every image
is seen once in a pass, mirrored by lot; nothing is held out, so test on other images. What comes
out can be tuned further by the same command.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor

from adapters.mixed_rank.images import ImageFolder
from benchmarks.report import describe_run, say, warn_if_busy

FACTS_FILE = "finetuning.json"
WARM_UP = 0.1  # of all steps


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder as transformers has it")
    parser.add_argument("--data", type=Path, required=True, help="folder of class folders")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="[default: as many as see every image once]")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="of all but the head")
    parser.add_argument("--head-learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def mirror(pixels: Tensor) -> Tensor:
    """Mirror each of (B, C, H, W) images or not, by lot."""
    chosen = torch.rand(len(pixels)) < 0.5
    return torch.where(chosen[:, None, None, None], pixels.flip(-1), pixels)


def main() -> int:
    """Train, and write the model."""
    options = parse_options()
    warn_if_busy()
    torch.manual_seed(options.seed)
    images = ImageFolder.open(options.data, options.model)
    model = transformers.AutoModelForImageClassification.from_pretrained(options.model).train()
    head = [p for n, p in model.named_parameters() if n.startswith("classifier")]
    body = [p for n, p in model.named_parameters() if not n.startswith("classifier")]
    optimizer = torch.optim.AdamW(
        [{"params": body, "lr": options.learning_rate},
         {"params": head, "lr": options.head_learning_rate}],
        weight_decay=options.weight_decay,
    )  # fmt: skip
    steps = options.steps or len(images) // options.batch_size

    def rate(step: int) -> float:
        if step < WARM_UP * steps:
            return (step + 1) / (WARM_UP * steps)
        return 0.5 * (1 + math.cos(math.pi * (step - WARM_UP * steps) / ((1 - WARM_UP) * steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start_s, order, mean = time.monotonic(), [], math.nan
    for step in range(1, steps + 1):
        if len(order) < options.batch_size:
            order = torch.randperm(len(images)).tolist()
        chosen = [order.pop() for _ in range(options.batch_size)]
        labels = torch.tensor([images.labels[number] for number in chosen])
        loss = model(mirror(images.pixels(chosen)), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean = loss.item() if math.isnan(mean) else 0.95 * mean + 0.05 * loss.item()
        if step % 10 == 0:
            say(f"step {step} of {steps}: loss {mean:.3f}, {time.monotonic() - start_s:.0f} s")
    model.save_pretrained(options.output)
    transformers.AutoImageProcessor.from_pretrained(options.model).save_pretrained(options.output)
    before = options.model / FACTS_FILE
    facts = {
        "before": json.loads(before.read_text()) if before.exists() else None,
        "steps": steps, "options": {n: getattr(v, "name", v) for n, v in vars(options).items()},
        "images": len(images), "loss": mean, "seconds": time.monotonic() - start_s,
        "run": describe_run(),
    }  # fmt: skip
    (options.output / FACTS_FILE).write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
