"""A small base that has learnt something, and text of its kind."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from adapters.disp.masked import MaskedDecoder
from models.checkpoints import Checkpoint
from models.spec import DecoderSpec
from models.weights import Weight
from tests.models.kernels.random_decoders import VOCAB, make_decoder_parts

LENGTH = 32


def make_text(count: int = 4000) -> Tensor:
    """Return (count,) tokens, most of which follow from the one before."""
    generator = torch.Generator().manual_seed(0)
    is_random = (torch.rand(count, generator=generator) < 0.1).tolist()
    random = torch.randint(0, VOCAB, (count,), generator=generator).tolist()
    tokens = [3]
    for i in range(1, count):
        tokens.append(random[i] if is_random[i] else (7 * tokens[-1] + 3) % 97)
    return torch.tensor(tokens)


def make_random(kind: str, *, has_biases: bool = True) -> tuple[DecoderSpec, dict[str, Weight]]:
    """Return a random decoder, with or without the biases that it need not have."""
    spec, weights = make_decoder_parts(kind)
    if not has_biases:
        weights = {n: w for n, w in weights.items() if "norm" in n or not n.endswith("bias")}
    return spec, weights


@cache
def fitted_checkpoint(kind: str = "llama") -> Checkpoint:
    """Return a decoder of three layers after a few steps on `make_text`."""
    spec, weights = make_random(kind, has_biases=False)
    trained = {name: dense.clone().requires_grad_() for name, dense in weights.items()}  # type: ignore[union-attr]
    optimizer = torch.optim.AdamW(list(trained.values()), lr=5e-3, weight_decay=0.0)
    generator, text = torch.Generator().manual_seed(1), make_text()
    for _ in range(60):
        starts = torch.randint(0, len(text) - LENGTH, (8,), generator=generator)
        loss = MaskedDecoder(spec, trained).loss(text[starts[:, None] + torch.arange(LENGTH)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Checkpoint(
        spec=spec, weights={name: dense.detach() for name, dense in trained.items()},
        folder=Path(), weights_folder=Path(), name="tiny", quantization="none",
    )  # fmt: skip
