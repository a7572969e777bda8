"""A few steps of training a side network, for `benchmarks.qst_training`; prints one JSON object."""

import argparse
import json
import os
import statistics
import time

from serve.environment import let_threads_sleep

let_threads_sleep(os.environ)  # before torch is imported

import torch  # noqa: E402

from adapters.frozen_head import FrozenHead, head_weight  # noqa: E402
from adapters.qst.config import QstConfig  # noqa: E402
from adapters.qst.examples import DataOrder  # noqa: E402
from adapters.qst.memory import PeakMemory  # noqa: E402
from adapters.qst.network import QstNetwork  # noqa: E402
from adapters.qst.trainer import Trainer  # noqa: E402
from adapters.qst.training_config import TrainingConfig  # noqa: E402
from benchmarks.training_data import add_data_arguments, load_examples  # noqa: E402
from models.checkpoints import load_checkpoint  # noqa: E402
from models.decoder import Decoder  # noqa: E402


def main() -> None:
    """Train as the command line says and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_data_arguments(parser)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--reduction", type=int, default=16)
    parser.add_argument("--side-layers", type=int, help="a fork of so many layers instead")
    options = parser.parse_args()
    checkpoint = load_checkpoint(None, cache_dir=options.cache_dir)
    examples, _ = load_examples(options, checkpoint)
    decoder = Decoder(checkpoint.spec, checkpoint.weights)
    device = torch.device("cpu")
    head = FrozenHead(decoder, head_weight(checkpoint), device)
    head.pull_back(torch.zeros(1, decoder.spec.vocab_size))  # brings mapped weights to memory
    memory = PeakMemory(device)
    qst = QstConfig(reduction=options.reduction)
    if options.side_layers is not None:
        qst = QstConfig(side_attention="base", side_layers=options.side_layers)
    network = QstNetwork(decoder.spec, qst)
    config = TrainingConfig(steps=options.steps, batch_size=options.batch_size)
    trainer = Trainer(decoder, network, head, config)
    order, size, times = DataOrder(len(examples), config.seed), options.batch_size, []
    for step in range(options.steps):
        batch = [examples[i] for i in order.take(step * size, size)]
        start_s = time.perf_counter()
        result = trainer.step([batch], config.rate_factor(step, options.steps))
        times.append(time.perf_counter() - start_s)
    figures = {
        "trainable_parameters": network.num_parameters,
        "loss": result.loss,
        "median_step_s": statistics.median(times),
        "memory_above_start_bytes": memory.read()[1],
    }
    print(json.dumps({"options": {k: str(v) for k, v in vars(options).items()}, **figures}))


if __name__ == "__main__":
    main()
