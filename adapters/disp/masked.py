"""The frozen dense base with masks on its channels: what a search computes and differentiates.

The norms' statistics run over all channels, then the mask takes some: the order of DISP-LLM's
published code, and the only one in which masking equals slicing with the norms' weights kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from adapters.qst.loss import FrozenHead, head_loss
from models.kernels.reference.operations import apply_activation, apply_rotary, rotary_angles
from models.program import Activate, check_weights, rotation
from models.pruning import widths_of
from models.spec import DecoderSpec, LayerSpec
from models.weights import Weight, dense

Masks = Sequence[Sequence[Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Linear:
    """Frozen matrices that share their input, one below the other."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """A layer's frozen weights; norms are (weight, bias or None) in float32."""

    spec: LayerSpec
    attn_norm: tuple[Tensor, Tensor | None]
    mlp_norm: tuple[Tensor, Tensor | None]
    head_norms: tuple[Tensor, Tensor] | None
    qkv: _Linear
    o: _Linear
    up: _Linear
    down: _Linear


class MaskedDecoder:
    """A decoder whose layers' channels can be switched off; gradients reach the masks alone.

    Args:
        spec: not pruned.
        weights: by canonical name; copied.
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
        check_weights(spec, weights)
        self.spec = spec
        self.device = torch.device(device)
        self._recomputes = gradient_checkpointing
        self._activate = Activate(kind=spec.activation, is_gated=spec.gated_mlp)
        loader = _Loader(weights, self.device, dtype)
        self._embed = loader.vector("embed.weight")
        self._positions = loader.optional("positions.weight")
        self._layers = [
            loader.layer(spec, layer, f"layers.{i}") for i, layer in enumerate(spec.layers)
        ]
        self._final_norm = loader.norm("final_norm") if spec.final_norm else None
        self._head = self._embed if spec.tied_head else loader.vector("head.weight")
        self._head_bias = loader.optional("head.bias")
        self._frozen_head = FrozenHead(self, self._head, self.device)
        inv_freq, self._rotary_scale = rotation(spec)
        self._inv_freq = inv_freq.to(self.device)

    def states(self, token_ids: Tensor, masks: "Masks | _Probes | None" = None) -> Tensor:
        """Compute sequences of equal length.

        Args:
            token_ids: (B, S) int64.
            masks: for each layer those of `models.pruning.MODULES`, (width,) or (B * n, width)
                float32: n for each sequence, in turn for equal stretches of it; None: no masks.

        Returns:
            (B, S, D) float32, normed: what the LM head reads.
        """
        positions = torch.arange(token_ids.shape[1], device=self.device)
        x = self._embed[token_ids]
        if self._positions is not None:
            x = x + self._positions[positions + (self.spec.learned_positions_offset or 0)]
        angles = rotary_angles(self._inv_freq, self._rotary_scale, positions)
        for i, layer in enumerate(self._layers):
            kept = (None,) * 5 if masks is None else masks[i]
            if self._recomputes and torch.is_grad_enabled():
                x = checkpoint(
                    self._run_layer, layer, x, angles, *kept, use_reentrant=False,
                    preserve_rng_state=False,
                )  # fmt: skip
            else:
                x = self._run_layer(layer, x, angles, *kept)
        return x if self._final_norm is None else self._apply_norm(x, self._final_norm)

    def logits(self, states: Tensor) -> Tensor:
        """Return the (T, V) float32 logits of (T, D) normed states."""
        return F.linear(states, self._head, self._head_bias)

    def loss(self, windows: Tensor, masks: Masks | None = None) -> Tensor:
        """Return the mean cross entropy of next tokens, in nats; its gradient reaches the masks.

        Args:
            windows: (B, S + 1) int64 token ids.
            masks: see `states`.
        """
        return self._total_loss(windows, masks) / windows[:, 1:].numel()

    def squared_gradients(self, windows: Tensor) -> list[list[Tensor]]:
        """Tell how much the loss depends on each channel at each token.

        Args:
            windows: (B, S + 1) int64 token ids.

        Returns:
            For each layer, in the order of `models.pruning.MODULES`, (width,) float32: the sum over
            the tokens of (dL / dm)^2, L the sum of the windows' losses, m what the channel is
            multiplied by at that token alone.
        """
        start = torch.zeros((), device=self.device, requires_grad=True)
        probes = [
            [_Probe(torch.zeros(width, device=self.device), start) for width in layer]
            for layer in widths_of(self.spec)
        ]
        torch.autograd.grad(self._total_loss(windows, probes), start)
        return [[probe.total for probe in layer] for layer in probes]

    def _total_loss(self, windows: Tensor, masks: "Masks | _Probes | None") -> Tensor:
        windows = windows.to(self.device)
        states = self.states(windows[:, :-1], masks).flatten(0, 1)
        return head_loss(states, windows[:, 1:].flatten(), self._frozen_head)

    def _run_layer(
        self,
        layer: _Layer,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        *masks: "Tensor | _Probe | None",
    ) -> Tensor:
        attn_in, attn_out, mlp_in, mlp_mid, mlp_out = masks
        normed = self._apply_norm(x, layer.attn_norm)
        attended = self._attend(layer, layer.qkv(_masked(normed, attn_in)), angles)
        after = x + _masked(layer.o(attended).float(), attn_out)
        if self.spec.residual == "sequential":
            x = after
        if not self.spec.shared_norm:
            normed = self._apply_norm(x, layer.mlp_norm)
        middle = apply_activation(layer.up(_masked(normed, mlp_in)), self._activate)
        out = layer.down(_masked(middle, mlp_mid)).float()
        return after + _masked(out, mlp_out)

    def _attend(self, layer: _Layer, qkv: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Return the (B, S, H * E) attention of (B, S, (H + 2 K) * E) queries, keys and values."""
        spec = layer.spec
        count, kv_count = spec.num_attention_heads, spec.num_key_value_heads
        heads = qkv.unflatten(-1, (-1, spec.head_dim))
        q, k, v = heads.split([count, kv_count, kv_count], dim=2)
        if layer.head_norms is not None:
            q, k = (
                F.rms_norm(x.float(), (spec.head_dim,), weight, self.spec.norm_eps)
                for x, weight in zip((q, k), layer.head_norms, strict=True)
            )
        if self.spec.rotary is not None:
            q, k = apply_rotary(q, *angles), apply_rotary(k, *angles)
        q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=count != kv_count)
        return out.transpose(1, 2).flatten(2)

    def _apply_norm(self, x: Tensor, norm: tuple[Tensor, Tensor | None]) -> Tensor:
        shape, eps = (self.spec.hidden_size,), self.spec.norm_eps
        if self.spec.norm == "rms":
            return F.rms_norm(x, shape, norm[0], eps)
        return F.layer_norm(x, shape, *norm, eps)


class _Loader:
    """Reads frozen weights: matrices of the layers in the dtype of products, the rest float32."""

    def __init__(
        self, weights: Mapping[str, Weight], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._weights, self._device, self._dtype = weights, device, dtype

    def vector(self, name: str) -> Tensor:
        return dense(self._weights[name]).to(self._device)

    def optional(self, name: str) -> Tensor | None:
        return self.vector(name) if name in self._weights else None

    def norm(self, name: str) -> tuple[Tensor, Tensor | None]:
        return self.vector(f"{name}.weight"), self.optional(f"{name}.bias")

    def linear(self, prefix: str, *names: str) -> _Linear:
        matrices = [dense(self._weights[f"{prefix}.{name}.weight"]) for name in names]
        biases = [self._weights.get(f"{prefix}.{name}.bias") for name in names]
        bias = None
        if any(part is not None for part in biases):
            bias = torch.cat(
                [
                    torch.zeros(len(matrix)) if part is None else dense(part)
                    for matrix, part in zip(matrices, biases, strict=True)
                ]
            ).to(self._device, self._dtype)
        weight = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
        return _Linear(weight=weight.to(self._device, self._dtype), bias=bias)

    def layer(self, spec: DecoderSpec, layer: LayerSpec, prefix: str) -> _Layer:
        mlp_norm = "attn_norm" if spec.shared_norm else "mlp_norm"
        norms = [self.vector(f"{prefix}.{n}_norm.weight") for n in "qk" if spec.qk_norm]
        return _Layer(
            spec=layer,
            attn_norm=self.norm(f"{prefix}.attn_norm"),
            mlp_norm=self.norm(f"{prefix}.{mlp_norm}"),
            head_norms=(norms[0], norms[1]) if norms else None,
            qkv=self.linear(prefix, "q", "k", "v"),
            o=self.linear(prefix, "o"),
            up=self.linear(prefix, *(["gate", "up"] if spec.gated_mlp else ["up"])),
            down=self.linear(prefix, "down"),
        )


@dataclass(frozen=True, slots=True)
class _Probe:
    """In place of a mask: lets all pass and adds up squared gradients.

    Attributes:
        total: (width,) float32, what they are added to.
        start: () where gradients are asked for; nothing else of the base has any.
    """

    total: Tensor
    start: Tensor


_Probes = Sequence[Sequence[_Probe]]


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


def _masked(x: Tensor, mask: Tensor | _Probe | None) -> Tensor:
    if mask is None:
        return x
    if isinstance(mask, _Probe):
        out: Tensor = _AddSquares.apply(x, mask.total, mask.start)
        return out
    mask = mask.to(x.dtype).reshape(-1, 1, x.shape[-1])
    return (x.reshape(len(mask), -1, x.shape[-1]) * mask).view(x.shape)
