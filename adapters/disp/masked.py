"""The frozen dense base with masks on its channels: what a search computes and differentiates.

The decoder is the reference walk of `models.kernels.reference.operations`; masks are a hook of it.
The norms' statistics run over all channels, then the mask takes some: the order of DISP-LLM's
published code, and the only one in which masking equals slicing with the norms' weights kept.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from adapters.frozen_head import FrozenHead, head_loss
from adapters.packed_attention import PackedAttention
from models.kernels.reference.operations import (
    Attend,
    Hook,
    apply_embed,
    apply_head,
    apply_prologue,
    rotary_angles,
    run_ops,
)
from models.program import LinearOp, Op, Piece, Program, build_program, check_weights
from models.pruning import MODULES, widths_of
from models.spec import DecoderSpec
from models.weights import Matrix, Weight, dense

Masks = Sequence[Sequence[Tensor]]
Value = TypeVar("Value")
# Which of `MODULES` the input of a linear is, and which the output; those side by side are one.
_READ = {"q": "attn_in", "gate": "mlp_in", "up": "mlp_in", "down": "mlp_mid"}
_WRITTEN = {"o": "attn_out", "down": "mlp_out"}


class MaskedDecoder:
    """A decoder whose layers' channels can be switched off; gradients reach the masks alone.

    Args:
        spec: not pruned.
        weights: by canonical name.
        device: where to compute.
        dtype: of the layers' matrix products; the residual stream, norms and logits are float32.
        gradient_checkpointing: compute layers again for the gradient.

    Raises:
        SpecError: weights are missing, misshapen or unknown.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        weights: Mapping[str, Weight],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.spec = spec
        self.device = torch.device(device)
        self._recomputes = gradient_checkpointing
        self._program = _freeze(spec, weights, self.device, dtype)
        self._layers = self._program.layers
        (head,) = self._program.head.pieces
        self._frozen_head = FrozenHead(self, head.weight, self.device)

    def states(self, token_ids: Tensor, hook: Hook | None = None) -> Tensor:
        """Compute sequences of equal length.

        Args:
            token_ids: (B, S) int64.
            hook: such as `mask_channels` makes.

        Returns:
            (B, S, D) float32, normed: what the LM head reads.
        """
        program, (batch, length) = self._program, token_ids.shape
        positions = torch.arange(length, device=self.device).repeat(batch)
        angles = rotary_angles(program.inv_freq, program.rotary_scale, positions)
        attend = PackedAttention(torch.arange(batch + 1) * length, self.device)
        x = apply_embed(program.embed, token_ids.flatten(), positions)
        for ops in self._layers:
            if self._recomputes and torch.is_grad_enabled():
                x = checkpoint(
                    self._run_layer, ops, x, angles, attend, hook, use_reentrant=False,
                    preserve_rng_state=False,
                )  # fmt: skip
            else:
                x = self._run_layer(ops, x, angles, attend, hook)
        return apply_prologue(program.head, x).unflatten(0, (batch, length))

    def logits(self, states: Tensor) -> Tensor:
        """Return the (T, V) float32 logits of (T, D) normed states."""
        return apply_head(self._program, states)

    def loss(self, windows: Tensor, masks: Masks | None = None) -> Tensor:
        """Return the mean cross entropy of next tokens, in nats; its gradient reaches the masks.

        Args:
            windows: (B, S + 1) int64 token ids.
            masks: see `mask_channels`; None: no masks.
        """
        hook = None if masks is None else mask_channels(masks)
        return self._total_loss(windows, hook) / windows[:, 1:].numel()

    def squared_gradients(self, windows: Tensor) -> list[list[Tensor]]:
        """Tell how much the loss depends on each channel at each token.

        Args:
            windows: (B, S + 1) int64 token ids.

        Returns:
            For each layer, in the order of `models.pruning.MODULES`, (width,) float32: the sum over
            the tokens of (dL / dm)^2, L the sum of the windows' losses, m what the channel is
            multiplied by at that token alone.
        """
        # Nothing else of the base asks for a gradient.
        start = torch.zeros((), device=self.device, requires_grad=True)
        totals = [
            [torch.zeros(width, device=self.device) for width in layer]
            for layer in widths_of(self.spec)
        ]

        def watch(x: Tensor, total: Tensor) -> Tensor:
            out: Tensor = _AddSquares.apply(x, total, start)
            return out

        torch.autograd.grad(self._total_loss(windows, _ChannelHook(totals, watch)), start)
        return totals

    def _total_loss(self, windows: Tensor, hook: Hook | None) -> Tensor:
        windows = windows.to(self.device)
        states = self.states(windows[:, :-1], hook).flatten(0, 1)
        return head_loss(states, windows[:, 1:].flatten(), self._frozen_head)

    def _run_layer(
        self,
        ops: tuple[Op, ...],
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        attend: Attend,
        hook: Hook | None,
    ) -> Tensor:
        buffers = {"x": x}
        run_ops(
            ops, buffers, self._program.widths, angles, attend=attend, linear=_multiply, hook=hook
        )
        return buffers["x"]


def mask_channels(masks: Masks) -> Hook:
    """Return a hook that multiplies channels with masks.

    Args:
        masks: for each layer those of `models.pruning.MODULES`, (width,) or (B * n, width) float32:
            n for each sequence, in turn for equal stretches of it.
    """
    return _ChannelHook(masks, _apply_mask)


@dataclass(frozen=True, slots=True)
class _ChannelHook(Generic[Value]):
    """Changes what each module of each layer passes by a value of its own.

    Attributes:
        values: for each layer, in the order of `MODULES`.
        change: gives the new (T, width) rows.
    """

    values: Sequence[Sequence[Value]]
    change: Callable[[Tensor, Value], Tensor]

    def before(self, op: LinearOp, x: Tensor) -> Tensor:
        value = self._find(op, _READ)
        return x if value is None else self.change(x, value)

    def after(self, op: LinearOp, out: Tensor) -> Tensor:
        value = self._find(op, _WRITTEN)
        return out if value is None else self.change(out.float(), value)

    def _find(self, op: LinearOp, modules: Mapping[str, str]) -> Value | None:
        _, layer, linear = op.names[0].split(".")
        module = modules.get(linear)
        return None if module is None else self.values[int(layer)][MODULES.index(module)]


def _apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    mask = mask.to(x.dtype).reshape(-1, 1, x.shape[-1])
    return (x.reshape(len(mask), -1, x.shape[-1]) * mask).view(x.shape)


class _AddSquares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, total: Tensor, start: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.total = total
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor]:
        products = gradient.float() * ctx.saved_tensors[0].float()
        ctx.total += products.square_().flatten(0, -2).sum(0)
        return gradient, None, ctx.total.new_zeros(())


def _multiply(x: Tensor, weight: Matrix) -> Tensor:
    assert isinstance(weight, Tensor)
    return F.linear(x.to(weight.dtype), weight)


def _freeze(
    spec: DecoderSpec, weights: Mapping[str, Weight], device: torch.device, dtype: torch.dtype
) -> Program:
    """Lay out a decoder: matrices of the layers in the dtype of products, the rest float32."""
    check_weights(spec, weights)
    placed: dict[str, Weight] = {}
    for name, weight in weights.items():
        is_product = name.startswith("layers.") and len(weight.shape) == 2
        placed[name] = dense(weight).to(device, dtype if is_product else torch.float32)
    head = placed["embed.weight" if spec.tied_head else "head.weight"]
    assert isinstance(head, Tensor)
    program = build_program(spec, placed, head)
    inv_freq = program.inv_freq.to(device)
    return replace(program, ops=tuple(_join(op) for op in program.ops), inv_freq=inv_freq)


def _join(op: Op) -> Op:
    """Put matrices that share their input one below the other: one product is faster than three."""
    if not isinstance(op, LinearOp):
        return op
    matrices = [piece.weight for piece in op.pieces if isinstance(piece.weight, Tensor)]
    weight = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
    bias = None
    if any(piece.bias is not None for piece in op.pieces):
        parts = [
            matrix.new_zeros(len(matrix)) if piece.bias is None else piece.bias
            for matrix, piece in zip(matrices, op.pieces, strict=True)
        ]
        bias = torch.cat([part.to(weight.dtype) for part in parts])
    return replace(op, pieces=(Piece(weight=weight, bias=bias, offset=0),))
