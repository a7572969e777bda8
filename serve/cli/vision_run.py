"""Image classifiers from the command line: compress one, and test it."""

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from adapters.mixed_rank.compress_config import CompressConfig
from adapters.mixed_rank.images import ImageError, ImageFolder
from adapters.mixed_rank.ranks import BudgetError
from adapters.mixed_rank.vision import VisionResult, compress_vision
from adapters.mixed_rank.vision_folder import VisionError, VisionModel, open_vision
from serve.cli.arguments import CommandError, UserError, say
from serve.cli.long_run import run_to_end
from serve.cli.stop_signals import INTERRUPTED
from serve.machine import count_processors
from serve.model_options import ModelOptions, resolve_model_options
from stats.proportions import wilson_interval


def run_vision_compression(
    arguments: argparse.Namespace, config: CompressConfig, options: ModelOptions
) -> int:
    """Compress an image classifier as `serve.cli.compress` was told; see its `run`."""
    options = resolve_model_options(options, has_cuda=False, num_processors=count_processors())
    torch.set_num_threads(int(options.threads))
    assert options.model is not None
    model, images = _load(Path(options.model), arguments.data)
    if len(images) < config.sequences:
        raise UserError(
            f"--data: {arguments.data} has {len(images)} images; --sequences is {config.sequences}"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed))
    try:
        pixels = images.pixels(order[: config.sequences].tolist())
    except ImageError as error:
        raise UserError(f"--data: {error}") from None
    say(f"{arguments.data}: {len(pixels)} of {len(images)} images; {options.threads} threads")
    digest = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()

    def start(should_stop: Callable[[], bool]) -> VisionResult:
        return compress_vision(
            model, pixels, arguments.output, data=digest, config=config, resume=arguments.resume,
            description=arguments.description, should_stop=should_stop, report=say,
        )  # fmt: skip

    try:
        result = run_to_end(start)
    except BudgetError as error:
        raise UserError(f"--remove: {error}") from None
    except VisionError as error:
        raise CommandError(str(error)) from None
    if result is None:
        return INTERRUPTED
    say(
        f"{result.folder}: {result.remove_linears:.1%} of the linears' parameters removed, "
        f"{result.remove_total:.1%} of the whole model"
    )
    say(f"test it with: proa eval images --model {result.folder} --data IMAGES")
    return 0


def run_image_test(arguments: argparse.Namespace) -> int:
    """Test image classifiers as `serve.cli.eval` was told; see its `run`."""
    torch.set_num_threads(arguments.threads or count_processors())
    model, images = _load(arguments.model, arguments.data)
    count = min(len(images), arguments.limit or len(images))
    # A part of the images is one of all classes.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    numbers = sorted(order[:count])
    try:
        predicted = classify(model.module, images, numbers, arguments.batch_size)
    except ImageError as error:
        raise UserError(f"--data: {error}") from None
    labels = [images.labels[number] for number in numbers]
    right = sum(map(int.__eq__, predicted, labels))
    low, high = wilson_interval(right, count)
    print(
        f"{arguments.model}: top-1 {right / count:.2%} (95 % interval {low:.2%} to {high:.2%}), "
        f"{right} of {count} images"
    )
    if arguments.output is not None:
        records = [
            {"image": images.paths[number].relative_to(arguments.data).as_posix(), "label": label,
             "predicted": found}
            for number, label, found in zip(numbers, labels, predicted, strict=True)
        ]  # fmt: skip
        _write_lines(arguments.output, records)
    return 0


@torch.inference_mode()
def classify(
    model: nn.Module, images: ImageFolder, numbers: list[int], batch_size: int
) -> list[int]:
    """Return the number of the likeliest class of each of some images.

    Raises:
        ImageError: one cannot be read.
    """
    found: list[int] = []
    with tqdm(total=len(numbers), unit="image", disable=None) as bar:
        for start in range(0, len(numbers), batch_size):
            chosen = numbers[start : start + batch_size]
            found += model(pixel_values=images.pixels(chosen)).logits.argmax(-1).tolist()
            bar.update(len(chosen))
    return found


def _load(model: Path, data: Path) -> tuple[VisionModel, ImageFolder]:
    try:
        return open_vision(model), ImageFolder.open(data, model)
    except VisionError as error:
        raise UserError(f"--model: {error}") from None
    except ImageError as error:
        raise UserError(f"--data: {error}") from None


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    part.replace(path)
