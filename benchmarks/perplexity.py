"""Perplexity of a model, of a pruned variant of it, and of either with a side network.

    python -m benchmarks.perplexity --text wiki.test.raw --windows 16
    python -m benchmarks.perplexity --text wiki.test.raw --variant ./small --adapter ./healed

The text is cut into windows of `--length` tokens; each is read by itself, from position 0 and
without a token before it, and all its tokens but the first are predicted; with `--second-half`,
those of its second half but the first, as llama-perplexity does. Prints one JSON object.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from serve.environment import let_threads_sleep

let_threads_sleep(os.environ)  # before torch is imported

import torch  # noqa: E402

from adapters.format import read_adapter  # noqa: E402
from adapters.frozen_head import FrozenHead, head_loss, head_weight, perplexity  # noqa: E402
from adapters.qst.adapter import load_qst  # noqa: E402
from adapters.qst.examples import Example, pack_examples  # noqa: E402
from adapters.qst.network import QstNetwork  # noqa: E402
from adapters.qst.trainer import Trainer  # noqa: E402
from adapters.qst.training_config import TrainingConfig  # noqa: E402
from benchmarks.report import say  # noqa: E402
from benchmarks.windows import cut_windows, digest_windows  # noqa: E402
from models.checkpoints import Checkpoint  # noqa: E402
from models.decoder import Decoder  # noqa: E402
from serve.backends.native_builder import CACHE_DTYPES  # noqa: E402
from serve.base_model import load_base, load_variant  # noqa: E402
from serve.model_options import MODEL_OPTIONS, ModelOptions  # noqa: E402
from text.text_file import read_text  # noqa: E402
from text.tokenizer import Tokenizer  # noqa: E402

DEFAULT_LENGTH = 2048
BLOCK_SIZE = 16


@torch.no_grad()
def mean_loss(
    decoder: Decoder,
    head: FrozenHead,
    windows: Sequence[Sequence[int]],
    kv: torch.dtype | None = None,
    *,
    first_target: int = 1,
) -> float:
    """Return the mean cross entropy of all predicted tokens, in nats.

    Args:
        decoder: the model.
        head: its head.
        windows: token ids, each window by itself.
        kv: of the KV cache through which tokens see each other; None: the decoder's own.
        first_target: the first token of a window that is predicted, at least 1.
    """
    total, count = 0.0, 0
    for window in windows:
        batch = pack_examples([_example(window, first_target)])
        num_blocks = -(-len(window) // BLOCK_SIZE)
        cache = decoder.make_cache(num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=kv)
        table = torch.arange(num_blocks, dtype=torch.int32)[None]
        taps = torch.empty(len(decoder.spec.layers) + 1, len(window), decoder.spec.hidden_size)
        decoder.forward(replace(batch.packed, block_tables=table), cache, taps=taps)
        normed = decoder.apply_final_norm(taps[-1][batch.rows])
        total += float(head_loss(normed, batch.targets, head))
        count += len(batch.targets)
    return total / count


def losses_with_adapter(
    decoder: Decoder, head: FrozenHead, windows: Sequence[Sequence[int]], network: QstNetwork
) -> tuple[float, float]:
    """Return the mean loss with a side network, and that of the base alone."""
    config = TrainingConfig(batch_size=1, compute_dtype="float32")
    found = Trainer(decoder, network, head, config).evaluate(
        [_example(window) for window in windows], with_base=True
    )
    assert found.base_loss is not None
    return found.loss, found.base_loss


def _example(window: Sequence[int], first_target: int = 1) -> Example:
    targets = b"\1" * (len(window) - first_target)
    return Example(token_ids=window, is_target=targets.rjust(len(window), b"\0"))


def load_network(folder: Path, checkpoint: Checkpoint) -> QstNetwork:
    """Read a side network that was trained on a checkpoint.

    Raises:
        AdapterError: it cannot be read or does not fit.
    """
    adapter = load_qst(
        folder, checkpoint.spec, fingerprint=checkpoint.fingerprint, model_id=checkpoint.name,
        chain=checkpoint.chain,
    )  # fmt: skip
    network = QstNetwork(checkpoint.spec, adapter.qst)
    network.load_state_dict({n: t.float() for n, t in read_adapter(folder).tensors.items()})
    return network


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the base."""
    parser.add_argument("--model", default=None, help="folder, hub id or .gguf [the demo model]")
    parser.add_argument("--cache-dir", type=Path, default=None)


def model_options(options: argparse.Namespace, quantization: str = "auto") -> ModelOptions:
    """Return what the command line says of the base."""
    cache_dir = None if options.cache_dir is None else str(options.cache_dir)
    return ModelOptions(model=options.model, quantization=quantization, cache_dir=cache_dir)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Compute what the command line asks for."""
    about = model_options(options, options.quantization)
    checkpoint = load_base(about, report=say)
    if options.variant is not None:
        checkpoint = load_variant(about, checkpoint, [options.variant], report=say)
    tokenizer = Tokenizer.from_folder(checkpoint.folder)
    token_ids = tokenizer.encode(read_text(options.text), add_special_tokens=False)
    windows = cut_windows(token_ids, options.length, options.windows)
    decoder = Decoder(checkpoint.spec, checkpoint.weights, head=options.head)
    head = FrozenHead(decoder, head_weight(checkpoint), torch.device("cpu"))
    figures: dict[str, Any] = {
        "quantization": checkpoint.quantization, "windows": len(windows),
        "length": options.length, "tokens_sha256": digest_windows(windows),
    }  # fmt: skip
    if options.adapter is None:
        first_target = options.length // 2 + 1 if options.second_half else 1
        kv = CACHE_DTYPES[options.kv]
        loss = mean_loss(decoder, head, windows, kv, first_target=first_target)
    else:
        network = load_network(options.adapter, checkpoint)
        loss, base_loss = losses_with_adapter(decoder, head, windows, network)
        figures |= {"loss_without_adapter": base_loss}
    return figures | {"loss": loss, "perplexity": perplexity(loss)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text")
    parser.add_argument("--variant", type=Path, help="folder of a pruned variant")
    parser.add_argument("--adapter", type=Path, help="folder of a side network trained on it")
    parser.add_argument(
        "--quantization", choices=MODEL_OPTIONS["quantization"].choices, default="auto"
    )
    parser.add_argument("--head", choices=MODEL_OPTIONS["head"].choices, default="int8")
    parser.add_argument("--length", type=int, default=DEFAULT_LENGTH, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=None, help="the first N [default: all]")
    parser.add_argument("--kv", choices=tuple(CACHE_DTYPES), default="auto", help="KV cache")
    parser.add_argument(
        "--second-half", action="store_true", help="predict the second half of each window only"
    )
    options = parser.parse_args()
    if options.second_half and options.adapter is not None:
        parser.error("--second-half: is not for --adapter")
    if options.adapter is not None and options.kv != "auto":
        parser.error("--kv: states with an adapter are computed without a KV cache; leave it out")
    print(json.dumps(measure(options)))


if __name__ == "__main__":
    main()
