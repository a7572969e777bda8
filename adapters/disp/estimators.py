"""Binary masks drawn at random, and how gradients get past the drawing.

Source: ReinMax (Liu et al., NeurIPS 2023) at temperature 1 with two classes; the soft masks of
DISP-LLM's published code.
"""

from typing import Any

import torch
from torch import Tensor

from adapters.disp.search_config import Estimator

TEMPERATURE = 0.4


def draw_masks(
    logits: Tensor, count: int, estimator: Estimator, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw masks, each channel kept with probability sigmoid(logit).

    Args:
        logits: (N,) float32 of the channels.
        count: masks to draw.
        estimator: "reinmax" and "ste" draw 0 or 1; "gumbel" values between, with a second drawing
            rounded to 0 or 1 to count.
        generator: on the CPU, so that the masks are the same on every device.

    Returns:
        (count, N) float32 masks to compute with and (count, N) masks to count the kept parameters
        of; one tensor for both but with "gumbel".
    """
    logits = logits.expand(count, -1)
    if estimator == "gumbel":
        soft, other = (_soft_masks(logits, generator) for _ in range(2))
        return soft, other + (other.round() - other).detach()
    noise = torch.rand(logits.shape, generator=generator).to(logits.device)
    masks: Tensor = (_ReinMax if estimator == "reinmax" else _StraightThrough).apply(logits, noise)
    return masks, masks


class _ReinMax(torch.autograd.Function):
    """D ~ Bernoulli(pi), pi = sigmoid(logit); the gradient is that of D times |D - pi| / 2."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, noise: Tensor) -> Tensor:
        kept = torch.sigmoid(logits)
        masks = (noise < kept).to(logits.dtype)
        ctx.save_for_backward((masks - kept).abs_().mul_(0.5))
        return masks

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * gradient, None


class _StraightThrough(torch.autograd.Function):
    """D ~ Bernoulli(pi), pi = sigmoid(logit); the gradient of D is taken for that of pi."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, noise: Tensor) -> Tensor:
        kept = torch.sigmoid(logits)
        ctx.save_for_backward(kept * (1 - kept))
        return (noise < kept).to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * gradient, None


def _soft_masks(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return sigmoid(logit + Gumbel / 0.4): the noise is added before the temperature."""
    noise = torch.empty(logits.shape).exponential_(generator=generator).log_().neg_()
    return torch.sigmoid(logits + noise.to(logits.device) / TEMPERATURE)
