"""The loss of a program on windows of text, and its gradients, computed with torch."""

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
    # One stream at a time, of which only the last is wanted.
    for stream in walk_layers(
        program, windows[:, :-1].flatten(), positions.repeat(count), attend=attend
    ):
        last = stream
    weight = dense(program.head.pieces[0].weight)
    total = 0.0
    for rows, targets in zip(last.split(length), windows[:, 1:], strict=True):
        logits = apply_head(
            program, apply_prologue(program.head, rows), linear=lambda x, _: x @ weight.T
        )
        total += float(F.cross_entropy(logits, targets, reduction="sum"))
    return total / (count * length)


LABELS = -1
"""The step of a run whose `step_generator` draws the samples."""
_ROWS = 128  # that go through the head together: a vocabulary is wide


def differentiate_samples(logits: Tensor, generator: torch.Generator) -> None:
    """Differentiate the summed loss of a class drawn for each row of (T, V) logits, as they say."""
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).flatten()
    F.cross_entropy(logits, drawn, reduction="sum").backward()


def sampled_gradients(program: Program, stream: Tensor, generator: torch.Generator) -> Tensor:
    """Return (T, D) gradients, in the last (T, D) residual stream, of the loss of sampled tokens.

    Each row's next token is drawn as the model would: the mean of the gradients' products is then
    the curvature of the loss.
    """
    weight = dense(program.head.pieces[0].weight)
    found = []
    for part in stream.split(_ROWS):
        rows = part.detach().requires_grad_()
        logits = apply_head(
            program, apply_prologue(program.head, rows), linear=lambda x, _: x @ weight.T
        )
        differentiate_samples(logits, generator)
        assert rows.grad is not None
        found.append(rows.grad)
    return torch.cat(found)
