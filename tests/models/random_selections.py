"""Selections for tests."""

import torch

from models.pruning import LayerSelection, Selections, widths_of
from models.spec import DecoderSpec

WIDTHS = (32, 48, 33, 80, 17)


def random_selections(
    spec: DecoderSpec, widths: tuple[int, ...] = WIDTHS, seed: int = 0
) -> Selections:
    """Keep `widths` random channels in every layer, in the order of `MODULES`."""
    generator = torch.Generator().manual_seed(seed)

    def kept(count: int, width: int) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(width, generator=generator)[:count].tolist()))

    selections = []
    for full in widths_of(spec):
        a, b, c, d, e = (kept(n, width) for n, width in zip(widths, full, strict=True))
        selections.append(LayerSelection(attn_in=a, attn_out=b, mlp_in=c, mlp_mid=d, mlp_out=e))
    return tuple(selections)


def whole_selections(spec: DecoderSpec) -> Selections:
    """Keep everything."""
    return tuple(
        LayerSelection(
            attn_in=tuple(range(a)), attn_out=tuple(range(b)), mlp_in=tuple(range(c)),
            mlp_mid=tuple(range(d)), mlp_out=tuple(range(e)),
        )
        for a, b, c, d, e in widths_of(spec)
    )  # fmt: skip
