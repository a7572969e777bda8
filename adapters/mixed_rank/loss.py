"""The loss of a program on windows of text, computed with torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.packed_attention import PackedAttention
from models.kernels.reference.operations import apply_head, apply_prologue, walk_layers
from models.program import Program
from models.weights import dense


@torch.no_grad()
def mean_loss(program: Program, windows: Tensor) -> float:
    """Return the mean cross entropy, in nats, of (N, length + 1) tokens, each window by itself."""
    positions = torch.arange(windows.shape[1] - 1)
    count, length = windows.shape[0], len(positions)
    attend = PackedAttention(torch.arange(count + 1) * length, torch.device("cpu"))
    *_, stream = walk_layers(
        program, windows[:, :-1].flatten(), positions.repeat(count), attend=attend
    )
    weight = dense(program.head.pieces[0].weight)
    total = 0.0
    for rows, targets in zip(stream.split(length), windows[:, 1:], strict=True):
        logits = apply_head(
            program, apply_prologue(program.head, rows), linear=lambda x, _: x @ weight.T
        )
        total += float(F.cross_entropy(logits, targets, reduction="sum"))
    return total / (count * length)
