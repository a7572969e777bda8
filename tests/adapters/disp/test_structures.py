"""Structures are where they belong, and what they keep counts where they serve."""

import pytest
import torch

from adapters.disp.budget import linears_total
from adapters.disp.search_config import Residual
from adapters.disp.structures import Structures
from models.pruning import count_linears, widths_of
from tests.models.kernels.random_decoders import make_decoder_parts

SPEC, _ = make_decoder_parts("llama")  # D = 64, I = 160, three layers


@pytest.mark.parametrize("residual", ["independent", "shared"])
def test_structures_are_divided_by_layer_and_module(residual: str) -> None:
    structures = Structures(SPEC, residual)  # type: ignore[arg-type]
    values = torch.arange(sum(structures.widths))
    layers = structures.split(values)
    assert [tuple(len(part) for part in layer) for layer in layers] == [(64, 64, 64, 160, 64)] * 3
    firsts = [[int(part[0]) for part in layer] for layer in layers]
    if residual == "independent":
        assert firsts == [[416 * i + s for s in (0, 64, 128, 192, 352)] for i in range(3)]
    else:
        assert firsts == [[0, 0, 0, 64 + 160 * i, 0] for i in range(3)]


def test_chosen_masks_keep_positive_logits_and_never_nothing() -> None:
    structures = Structures(SPEC, "shared")
    logits = torch.full((sum(structures.widths),), -1.0)
    logits[64:224] = torch.linspace(-1, 1, 160)
    logits[10] = -0.5
    logits[300] = 0.0
    masks = structures.threshold(logits)
    stream, first, *_ = structures.widths
    assert masks[:stream].nonzero().flatten().tolist() == [10]
    assert torch.equal(masks[stream : stream + first], (logits[64:224] > 0).float())
    assert masks[224:384].nonzero().flatten().tolist() == [300 - 224]
    assert float(structures.count(masks)[0][0]) == 1


@pytest.mark.parametrize("residual", ["independent", "shared"])
def test_costs_are_the_parameters_that_a_channel_takes(residual: Residual) -> None:
    structures = Structures(SPEC, residual)
    full, places = widths_of(SPEC), structures.places
    costs = structures.costs(SPEC).split(list(structures.widths))
    for structure, part in enumerate(costs):
        less = [
            [width - (place == structure) for width, place in zip(*layer, strict=True)]
            for layer in zip(full, places, strict=True)
        ]
        saved = count_linears(SPEC, full) - count_linears(SPEC, less)
        if residual == "independent":  # each is a factor of every product that it is in
            assert float(part[0]) * linears_total(SPEC) == pytest.approx(saved, rel=1e-4)
        assert part.unique().numel() == 1
        assert float(part[0]) * linears_total(SPEC) == pytest.approx(saved, rel=0.02)


def test_values_are_joined_where_modules_share_a_structure() -> None:
    values = [[torch.full((w,), 10.0 * i + j) for j, w in enumerate((64, 64, 64, 160, 64))]
              for i in range(3)]  # fmt: skip
    joined = Structures(SPEC, "independent").join(values)
    assert torch.equal(joined, torch.cat([part for layer in values for part in layer]))
    stream, *middles = Structures(SPEC, "shared").join(values).split([64, 160, 160, 160])
    assert stream.unique().tolist() == [sum(10.0 * i + j for i in range(3) for j in (0, 1, 2, 4))]
    assert [part.unique().tolist() for part in middles] == [[3.0], [13.0], [23.0]]
