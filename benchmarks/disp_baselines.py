"""Pruned variants to compare a search with: as wide in every layer, but chosen otherwise.

    python -m benchmarks.disp_baselines --like ./small --kind magnitude --output ./by-magnitude

A baseline keeps as many channels in each selection of each layer as the variant it is `--like`: it
has the same size, and even what the search found out about where to prune. Which channels,
`magnitude` decides by the norm of the weights that a channel owns, `random` by lot.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from adapters.disp.variant import DispVariant, load_disp, save_disp
from benchmarks.perplexity import add_model_arguments
from benchmarks.report import say
from models.checkpoints import load_checkpoint
from models.pruning import MODULES, LayerSelection, Selections, widths_of
from models.spec import DecoderSpec
from models.weights import Weight, dense

KINDS = ("magnitude", "random")
# Selection: linears whose rows (0) or columns (1) its channels own.
_OWNED: dict[str, tuple[tuple[str, int], ...]] = {
    "attn_in": (("q", 1), ("k", 1), ("v", 1)),
    "attn_out": (("o", 0),),
    "mlp_in": (("gate", 1), ("up", 1)),
    "mlp_mid": (("gate", 0), ("up", 0), ("down", 1)),
    "mlp_out": (("down", 0),),
}


def channel_norms(weights: Mapping[str, Weight], layer: int, module: str) -> Tensor:
    """Return the L2 norm of all weights that each channel of a selection owns, (width,) float32."""
    squares = [
        dense(weight).square().sum(1 - dim)
        for name, dim in _OWNED[module]
        if (weight := weights.get(f"layers.{layer}.{name}.weight")) is not None
    ]
    return torch.stack(squares).sum(0).sqrt()


def select(scores: Tensor, count: int) -> tuple[int, ...]:
    """Return the `count` channels of the highest scores, in order; of equal ones the first."""
    kept = scores.argsort(descending=True, stable=True)[:count]
    return tuple(kept.sort().values.tolist())


def _selections(
    widths: Sequence[Sequence[int]], scores: Callable[[int, int], Tensor]
) -> Selections:
    return tuple(
        LayerSelection(**{m: select(scores(i, j), layer[j]) for j, m in enumerate(MODULES)})
        for i, layer in enumerate(widths)
    )


def magnitude_selections(
    weights: Mapping[str, Weight], widths: Sequence[Sequence[int]]
) -> Selections:
    """Keep the channels whose weights are largest.

    Args:
        weights: by canonical name, not pruned.
        widths: channels to keep of each of `MODULES`, for each layer.
    """
    return _selections(widths, lambda i, j: channel_norms(weights, i, MODULES[j]))


def random_selections(
    spec: DecoderSpec, widths: Sequence[Sequence[int]], *, seed: int
) -> Selections:
    """Keep channels by lot; each seed gives another draw."""
    generator = torch.Generator().manual_seed(seed)
    full = widths_of(spec)
    return _selections(widths, lambda i, j: torch.rand(full[i][j], generator=generator))


def save_baseline(
    output: Path, kind: str, like: DispVariant, spec: DecoderSpec, weights: Mapping[str, Weight],
    *, seed: int,
) -> None:  # fmt: skip
    """Write a baseline that is as wide as a variant.

    Raises:
        AdapterError: it cannot be written.
    """
    widths = like.disp.widths
    if kind == "magnitude":
        selections = magnitude_selections(weights, widths)
    else:
        selections = random_selections(spec, widths, seed=seed)
    config = like.config
    save_disp(
        output, selections, spec, base_id=config.base_id, base_fingerprint=config.base_fingerprint,
        base_quantization=config.base_quantization, dense_fingerprint=like.disp.dense_fingerprint,
        align=like.disp.align, residual="independent",
        description=f"{kind}, as wide as {like.digest[:12]}",
        training={"method": kind, "like": like.digest}
        | ({"seed": seed} if kind == "random" else {}),
    )  # fmt: skip


def main() -> None:
    """Choose as the command line says and write the variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--like", type=Path, required=True, help="folder of a variant")
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    base = load_checkpoint(
        options.model, quantization="none", cache_dir=options.cache_dir, report=say
    )
    like = load_disp(
        options.like, base.spec, fingerprint=base.fingerprint, quantization=base.quantization,
        model_id=base.name,
    )  # fmt: skip
    save_baseline(options.output, options.kind, like, base.spec, base.weights, seed=options.seed)
    say(f"{options.output}: {options.kind}")


if __name__ == "__main__":
    main()
