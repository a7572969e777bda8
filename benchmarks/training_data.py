"""The examples that the training benchmarks use: as `proa train qst` reads them."""

import argparse
from pathlib import Path

import torch

from adapters.qst.examples import Example
from models.checkpoints import Checkpoint
from text.records import read_records
from text.tokenizer import Tokenizer
from text.training_data import Limit, build_examples


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the data."""
    parser.add_argument("--data", type=Path, help="training data; without it: random tokens")
    parser.add_argument("--eval-data", type=Path, help="held-out data")
    parser.add_argument("--length", type=int, default=192, help="tokens of a random sequence")
    parser.add_argument("--max-length", type=int, default=512, help="longer ones are left out")
    parser.add_argument("--cache-dir", type=Path, default=None)


def load_examples(
    options: argparse.Namespace, checkpoint: Checkpoint
) -> tuple[list[Example], list[Example]]:
    """Return the examples to train on and the held-out ones, none of them without `--eval-data`."""
    if options.data is None:
        generator = torch.Generator().manual_seed(0)
        shape = (256, options.length)
        rows = torch.randint(1000, 40_000, shape, generator=generator).tolist()
        targets = bytes(options.length // 3) + bytes([1]) * (options.length - options.length // 3)
        return [Example(token_ids=row, is_target=targets) for row in rows], []
    tokenizer = Tokenizer.from_folder(checkpoint.folder)

    def read(path: Path | None) -> list[Example]:
        limit = Limit(max_tokens=options.max_length, policy="skip", reason="--max-length")
        return [] if path is None else build_examples(read_records(path), tokenizer, limit)

    return read(options.data), read(options.eval_data)
