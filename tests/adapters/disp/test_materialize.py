"""Logits become channels: on target, aligned, the likeliest ones, the same each time."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from adapters.disp.budget import linears_total
from adapters.disp.materialize import TOLERANCE, aligned_widths, choose_channels
from adapters.disp.search_config import Residual
from adapters.disp.structures import Structures
from models.pruning import MODULES, Selections, check_selections, count_linears, widths_of
from models.spec import DecoderSpec
from tests.models.kernels.random_decoders import KINDS, make_decoder_parts

TINY, _ = make_decoder_parts("llama")


def wide() -> DecoderSpec:
    """A decoder of 8 layers of width 576, as the demo model's are."""
    layer = replace(
        TINY.layers[0], num_attention_heads=9, num_key_value_heads=3, head_dim=64,
        intermediate_size=1536,
    )  # fmt: skip
    return replace(TINY, hidden_size=576, layers=(layer,) * 8)


def make_logits(spec: DecoderSpec, residual: str = "independent", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    widths = Structures(spec, residual).widths  # type: ignore[arg-type]
    parts = [
        torch.randn(width, generator=generator) * 3 + torch.randn((), generator=generator)
        for width in widths
    ]
    return torch.cat(parts)


def selections_of(
    logits: Tensor, spec: DecoderSpec, *, keep: float, align: int, residual: Residual
) -> Selections:
    structures = Structures(spec, residual)
    counts = aligned_widths(logits, spec, structures, keep=keep, align=align)
    return choose_channels(logits, structures, counts)


def error(spec: DecoderSpec, selections: Selections, keep: float) -> float:
    kept = count_linears(spec, [s.widths for s in selections])
    return abs(kept / (keep * linears_total(spec)) - 1)


@pytest.mark.parametrize("keep", [0.9, 0.7, 0.5, 0.3])
@pytest.mark.parametrize("align", [1, 32, 64])
def test_target_is_met_in_aligned_widths(keep: float, align: int) -> None:
    spec = wide()
    found = selections_of(make_logits(spec), spec, keep=keep, align=align, residual="independent")
    check_selections(spec, found)
    assert error(spec, found, keep) <= TOLERANCE
    for selection, full in zip(found, widths_of(spec), strict=True):
        for width, limit in zip(selection.widths, full, strict=True):
            assert width >= align
            assert width % align == 0 or width == limit


@pytest.mark.parametrize("keep", [0.8, 0.5])
def test_shared_residual_is_one_set_and_meets_the_target(keep: float) -> None:
    spec = wide()
    found = selections_of(make_logits(spec, "shared"), spec, keep=keep, align=64, residual="shared")
    stream = {s.attn_in for s in found} | {s.attn_out for s in found}
    stream |= {s.mlp_in for s in found} | {s.mlp_out for s in found}
    assert len(stream) == 1
    assert len({s.mlp_mid for s in found}) == 8
    assert error(spec, found, keep) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", ["independent", "shared"])
def test_small_models_of_all_kinds_come_near(kind: str, residual: str) -> None:
    spec, _ = make_decoder_parts(kind)
    logits = make_logits(spec, residual)
    found = selections_of(logits, spec, keep=0.6, align=1, residual=residual)  # type: ignore[arg-type]
    assert error(spec, found, 0.6) <= TOLERANCE


def test_alignment_coarser_than_the_model_comes_as_near_as_it_can() -> None:
    found = selections_of(make_logits(TINY), TINY, keep=0.5, align=32, residual="independent")
    widths = [s.widths for s in found]
    assert all(width in (32, 64, 96, 128, 160) for layer in widths for width in layer)
    # One block of 32 channels of a layer is 2 to 5 % of all.
    assert error(TINY, found, 0.5) < 0.03


def test_structures_narrower_than_the_alignment_stay_whole() -> None:
    found = selections_of(make_logits(TINY), TINY, keep=0.75, align=96, residual="independent")
    assert all(s.widths[:3] == (64, 64, 64) and s.widths[4] == 64 for s in found)
    assert {s.widths[3] for s in found} <= {96, 160}


def test_likeliest_channels_are_kept() -> None:
    spec, structures = wide(), Structures(wide(), "independent")
    logits = make_logits(spec)
    found = selections_of(logits, spec, keep=0.6, align=64, residual="independent")
    for selection, parts in zip(found, structures.split(logits), strict=True):
        for module, part in zip(MODULES, parts, strict=True):
            kept = getattr(selection, module)
            assert kept == tuple(sorted(part.topk(len(kept)).indices.tolist()))


def test_masks_on_target_are_taken_as_they_are() -> None:
    spec, structures = wide(), Structures(wide(), "independent")
    masks = torch.cat([(torch.arange(w) % 3 != 0).float() for w in structures.widths])
    keep = count_linears(spec, [[384, 384, 384, 1024, 384]] * 8) / linears_total(spec)
    logits = (masks * 2 - 1) * torch.linspace(1, 5, len(masks))
    found = selections_of(logits, spec, keep=keep, align=64, residual="independent")
    assert found[0].attn_in == tuple(i for i in range(576) if i % 3)
    assert {s.widths for s in found} == {(384, 384, 384, 1024, 384)}


def test_twice_is_the_same_and_ties_go_to_the_first_channels() -> None:
    spec = wide()
    logits = torch.zeros(len(make_logits(spec)))
    found, again = (
        selections_of(logits, spec, keep=0.5, align=64, residual="independent") for _ in range(2)
    )
    assert found == again
    assert error(spec, found, 0.5) <= TOLERANCE
    assert all(s.attn_in == tuple(range(len(s.attn_in))) for s in found)


def test_nothing_is_left_empty() -> None:
    logits = make_logits(TINY) - 100 * (torch.arange(len(make_logits(TINY))) < 64)
    found = selections_of(logits, TINY, keep=0.1, align=1, residual="independent")
    assert min(min(s.widths) for s in found) >= 1
    assert error(TINY, found, 0.1) <= TOLERANCE
