"""Cross entropy through the frozen LM head, without logits of the whole batch."""

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from models.checkpoints import Checkpoint
from models.weights import LowRank, Matrix, QuantizedBlocks, dense, select_rows

_CHUNK_VALUES = 1 << 24  # logits held at a time: 64 MB
_SOFTMAX_ROWS = 16  # rows whose logits stay in the processor's cache
_VOCABULARY_ROWS = 4096  # of the head made float32 at a time


class LogitsSource(Protocol):
    """What computes logits; a decoder does."""

    def logits(self, states: Tensor) -> Tensor: ...


class FrozenHead:
    """An LM head that gradients pass through.

    Logits come from the decoder's own kernels, gradients from the weights that these were made of.

    Args:
        decoder: computes logits.
        weight: (V, D) the head's matrix, on the CPU; it may be mapped from a file.
        device: where the decoder computes.
    """

    def __init__(self, decoder: LogitsSource, weight: Matrix, device: torch.device) -> None:
        self.decoder = decoder
        self.num_rows = max(1, _CHUNK_VALUES // weight.shape[0])
        if device.type != "cpu":
            weight = dense(weight).to(device, torch.bfloat16)
        elif isinstance(weight, QuantizedBlocks):
            weight = _unpack(weight)
        self._weight = weight

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Turn the (L, V) gradient of logits into the (L, D) gradient of states."""
        weight = self._weight
        if isinstance(weight, Tensor) and weight.device.type != "cpu":
            return (gradient.to(weight.dtype) @ weight).float()
        out = gradient.new_zeros(len(gradient), weight.shape[1])
        for start in range(0, weight.shape[0], _VOCABULARY_ROWS):
            stop = min(start + _VOCABULARY_ROWS, weight.shape[0])
            out.addmm_(gradient[:, start:stop], _float_rows(weight, start, stop))
        return out


def head_weight(checkpoint: Checkpoint) -> Matrix:
    """Return the (V, D) matrix of a checkpoint's LM head."""
    name = "embed.weight" if checkpoint.spec.tied_head else "head.weight"
    weight = checkpoint.weights[name]
    assert not isinstance(weight, LowRank)
    return weight


def head_loss(states: Tensor, targets: Tensor, head: FrozenHead) -> Tensor:
    """Return the sum of the cross entropies of next tokens.

    Args:
        states: (L, D) float32, normed and blended: what the head reads.
        targets: (L,) int64 token ids.
        head: of the base.

    Returns:
        () float32, in nats; its gradient reaches `states` alone.
    """
    if torch.is_grad_enabled() and states.requires_grad:
        loss: Tensor = _HeadLoss.apply(states, targets, head)
        return loss
    return _sum_cross_entropy(states, targets, head, None)


def perplexity(loss: float) -> float:
    """Return exp(loss), infinite where it is too large."""
    return math.exp(loss) if loss < 700 else math.inf


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, head: FrozenHead) -> Tensor:
        gradient = torch.empty_like(states)
        loss = _sum_cross_entropy(states, targets, head, gradient)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * factor, None, None


def _sum_cross_entropy(
    states: Tensor, targets: Tensor, head: FrozenHead, gradient: Tensor | None
) -> Tensor:
    """Sum the cross entropies; `gradient`, if given, receives that with respect to `states`."""
    losses = []
    for rows in torch.arange(len(states)).split(head.num_rows):
        chunk = slice(int(rows[0]), int(rows[-1]) + 1)
        logits = head.decoder.logits(states[chunk].detach())
        block = len(logits) if logits.is_cuda else _SOFTMAX_ROWS
        pairs = zip(logits.split(block), targets[chunk].split(block), strict=True)
        losses += [_to_gradient(part, wanted) for part, wanted in pairs]
        if gradient is not None:
            gradient[chunk] = head.pull_back(logits)
    return torch.cat(losses).double().sum().float() if losses else states.new_zeros(())


def _to_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Return (L,) cross entropies of (L, V) logits, which become their gradient."""
    wanted = targets[:, None]
    highest = logits.amax(1, keepdim=True)
    picked = logits.gather(1, wanted) - highest
    torch.softmax(logits, 1, out=logits)
    # The likeliest token's probability is 1 / sum(exp(logits - highest)): never 0.
    losses = -picked - logits.amax(1, keepdim=True).log()
    logits.scatter_add_(1, wanted, logits.new_full((1, 1), -1.0).expand_as(wanted))
    return losses.flatten()


def _unpack(weight: QuantizedBlocks) -> Tensor:
    """Make a matrix float16, which is read once a chunk of rows: unpacking takes longer."""
    matrix = torch.empty(weight.shape, dtype=torch.float16)
    for rows in torch.arange(len(matrix)).split(_VOCABULARY_ROWS):
        matrix[rows] = dense(select_rows(weight, rows)).half()
    return matrix


def _float_rows(weight: Matrix, start: int, stop: int) -> Tensor:
    if isinstance(weight, Tensor):
        return weight[start:stop].float()
    return dense(select_rows(weight, range(start, stop)))
