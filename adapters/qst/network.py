"""The trainable tensors of a side network, and the side network that they make.

What is trained is computed by `run_side` and `blend_side` of `models.kernels.reference.operations`,
over `QstNetwork.program`, or for a fork by `run_fork_layer`: they are differentiable, and serving
holds its kernels against them.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from adapters.qst.config import QstConfig
from models.fork import Delta, ForkNetwork, forked_linears
from models.program import Norm
from models.side import (
    Downsample,
    PoolKind,
    SideNetwork,
    SideProgram,
    build_side_program,
    side_weights,
)
from models.spec import DecoderSpec

DOWNSAMPLE_NORM_EPS = 1e-5
FLOAT32_TENSORS = ("alpha", "gamma")
_POOLS: dict[str, PoolKind] = {"maxpool": "max", "avgpool": "avg"}
_NORMS = ("attn_norm", "mlp_norm", "final_norm", "q_norm", "k_norm", "norm")


class QstNetwork(nn.Module):
    """A side network to train.

    Its parameters are float32 and named as in an adapter's file (`qst_tensors`). At the start:

    - `alpha` is 1 and `gamma` 0: the output is the base's, the mix is half and half. Both must
      stay float32: in bfloat16 a step of 1e-3 from 1 is rounded away and nothing ever trains.
    - Matrices, `up` included, are uniform within +- 1 / sqrt(inputs), biases 0 (the up bias too),
      norm weights 1. That is what PyTorch's `Linear` and the published code do. A model's usual
      normal(0, 0.02) is meant for widths of a thousand and more; at the width of a side network it
      would leave the layers with next to no say. `up` must not be 0: until alpha and it have
      moved, no gradient would reach the rest. Beside a normed stream of size 1 it gives
      values of size 0.6, which 1 - alpha scales down to nothing at first.
    - Of a fork's differences the first factor is uniform within +- 1 / sqrt(inputs) and the second
      0, so the output is the base's.

    Args:
        base: the base decoder.
        config: sizes and switches; what is None follows from the base.
        seed: of the initial values.
        device: where the parameters are; "meta" for shapes only.

    Raises:
        AdapterError: the config does not fit the base.
    """

    def __init__(
        self,
        base: DecoderSpec,
        config: QstConfig,
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        self.base = base
        self.config = config.resolved(base)
        self.spec = None if self.is_fork else self.config.side_spec(base)
        self._layout: SideProgram | None = None
        shapes = dict(qst_tensors(self.config, base))
        is_meta = torch.device(device).type == "meta"
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            tensor = torch.empty(shape, device="meta" if is_meta else "cpu")
            if not is_meta:
                _initialise(name, tensor, generator)
            _register(self, name, nn.Parameter(tensor.to(device)))

    @property
    def is_fork(self) -> bool:
        """Whether it reads the base's keys and values."""
        return self.config.side_attention == "base"

    @property
    def first_state(self) -> int:
        """The first of the base's states that it reads."""
        layers = self.config.side_layers
        return 0 if layers is None else len(self.base.layers) - layers

    @property
    def num_parameters(self) -> int:
        """Trainable numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def side_network(self) -> SideNetwork | ForkNetwork:
        """Return the side network of the parameters as they are; gradients flow through it."""
        return assemble_network(self.config, self.base, dict(self.named_parameters()), self.spec)

    def program(self) -> SideProgram:
        """Return the operations over `side_network()`; good for one pass forward and backward.

        Not of a fork, whose operations are the base's.

        The operations of the layers hold the parameters themselves and are laid out once.
        """
        network, layout = self._narrow(), self._layout
        if layout is None or any(
            layout.network.weights[name] is not weight for name, weight in network.weights.items()
        ):
            with torch.no_grad():
                layout = build_side_program(self._narrow(), self.base)
        device = network.up.device
        if layout.inv_freq.device != device:
            layout = dataclasses.replace(layout, inv_freq=layout.inv_freq.to(device))
        self._layout = layout
        return dataclasses.replace(layout, network=network)

    def _narrow(self) -> SideNetwork:
        network = self.side_network()
        assert isinstance(network, SideNetwork)
        return network

    def classify(self, states: Tensor) -> Tensor:
        """Return (B, num_labels) logits of (B, D) blended states of last tokens."""
        return nn.functional.linear(states, self.get_parameter("classifier.weight"))


def qst_tensors(config: QstConfig, base: DecoderSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name, shape) of every tensor of an adapter.

    Names of a fork: `layers.{i}.{q,o,gate,up,down}.{right,left}` of the forked layers, and
    `classifier.weight`. Of others: `alpha`; `gamma`, one row for each layer;
    `downsamples.{0..N}.{first,second}.weight` and `.norm.{weight,bias}`, 0 being the embedding's,
    absent if tied; `layers.{i}...` and `final_norm` as in `canonical_weights`; `up.{weight,bias}`;
    `classifier.weight`.

    Args:
        config: resolved.
        base: the base decoder.

    Raises:
        AdapterError: the config does not fit the base.
    """
    if config.side_attention == "base":
        assert config.side_layers is not None
        for name, (outputs, inputs) in forked_linears(base, config.side_layers):
            yield f"{name}.right", (config.rank, inputs)
            yield f"{name}.left", (outputs, config.rank)
    else:
        yield from _narrow_tensors(config, base)
    if config.num_labels:
        yield "classifier.weight", (config.num_labels, base.hidden_size)


def _narrow_tensors(config: QstConfig, base: DecoderSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    spec = config.side_spec(base)
    wide, narrow, rank, num_layers = (
        base.hidden_size,
        spec.hidden_size,
        config.rank,
        len(base.layers),
    )
    is_vector = config.gate_shape == "vector"
    yield "alpha", (wide,) if is_vector else ()
    yield "gamma", (num_layers, narrow) if is_vector else (num_layers,)
    for i in range(int(config.tie_embedding_downsample), num_layers + 1):
        prefix = f"downsamples.{i}"
        if config.downsample == "linear":
            yield f"{prefix}.first.weight", (narrow, wide)
        elif config.downsample in ("lora", "adapter"):
            yield f"{prefix}.first.weight", (rank, wide)
            yield f"{prefix}.second.weight", (narrow, rank)
        if config.downsample == "adapter" and config.downsample_norm:
            yield f"{prefix}.norm.weight", (narrow,)
            yield f"{prefix}.norm.bias", (narrow,)
    for name, shape, is_required in side_weights(spec):
        if is_required or config.has_linear_bias:
            yield name, shape
    yield "up.weight", (wide, narrow)
    yield "up.bias", (wide,)


def assemble_network(
    config: QstConfig,
    base: DecoderSpec,
    tensors: Mapping[str, Tensor],
    spec: DecoderSpec | None = None,
) -> SideNetwork | ForkNetwork:
    """Make a side network of an adapter's tensors; differentiable.

    Args:
        config: resolved.
        base: the base decoder.
        tensors: float32, by the names and with the shapes of `qst_tensors`.
        spec: `config.side_spec(base)`, if it is at hand.
    """
    if config.side_attention == "base":
        assert config.side_layers is not None
        deltas = {
            name: Delta(right=tensors[f"{name}.right"], left=tensors[f"{name}.left"])
            for name, _ in forked_linears(base, config.side_layers)
        }
        return ForkNetwork(num_layers=config.side_layers, deltas=deltas)
    spec = spec or config.side_spec(base)
    num_layers = len(base.layers)
    gamma, alpha = tensors["gamma"], tensors["alpha"]
    gates = gamma if gamma.ndim == 2 else gamma[:, None].expand(num_layers, spec.hidden_size)
    share = {
        "raw": lambda: alpha,
        "sigmoid": lambda: alpha.sigmoid(),
        "sigmoid_swapped": lambda: (-alpha).sigmoid(),
    }[config.final_gate]()
    return SideNetwork(
        spec=spec,
        weights={n: t for n, t in tensors.items() if n.startswith(("layers.", "final_norm."))},
        downsamples=tuple(
            _downsample(config, tensors, max(i, int(config.tie_embedding_downsample)))
            for i in range(num_layers + 1)
        ),
        gates=gates.sigmoid(),
        up=tensors["up.weight"],
        up_bias=tensors["up.bias"],
        base_share=share.expand(base.hidden_size),
    )


def _downsample(config: QstConfig, tensors: Mapping[str, Tensor], i: int) -> Downsample:
    if config.downsample in _POOLS:
        return Downsample(pool=_POOLS[config.downsample])
    prefix = f"downsamples.{i}"
    norm = None
    if f"{prefix}.norm.weight" in tensors:
        norm = Norm(
            weight=tensors[f"{prefix}.norm.weight"], bias=tensors[f"{prefix}.norm.bias"],
            eps=DOWNSAMPLE_NORM_EPS,
        )  # fmt: skip
    return Downsample(
        first=tensors[f"{prefix}.first.weight"], second=tensors.get(f"{prefix}.second.weight"),
        activation=config.activation if config.downsample == "adapter" else None, norm=norm,
    )  # fmt: skip


def _initialise(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    parts = name.split(".")
    if parts[-1] == "left":
        tensor.fill_(0.0)
    elif tensor.ndim == 2 and name != "gamma":
        bound = tensor.shape[1] ** -0.5
        tensor.uniform_(-bound, bound, generator=generator)
    else:
        is_one = name == "alpha" or (parts[-1] == "weight" and parts[-2] in _NORMS)
        tensor.fill_(float(is_one))


def _register(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    *path, last = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(last, parameter)
