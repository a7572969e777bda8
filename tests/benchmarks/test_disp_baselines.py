"""Baselines of pruning: as wide as what they are compared with, and chosen as they say."""

from pathlib import Path

import pytest
import torch

from adapters.disp.variant import load_disp, save_disp
from benchmarks.disp_baselines import (
    channel_norms,
    magnitude_selections,
    random_selections,
    save_baseline,
    select,
)
from models.checkpoints import Checkpoint, load_checkpoint
from models.pruning import MODULES

WIDTHS = ((16, 8, 32, 48, 16), (32, 16, 8, 24, 1))


@pytest.fixture(scope="module")
def base(tiny_llama_folder: Path) -> Checkpoint:
    return load_checkpoint(str(tiny_llama_folder), quantization="none")


def test_norms_are_of_all_weights_that_a_channel_owns(base: Checkpoint) -> None:
    w = {name.split(".")[2]: base.weights[f"layers.1.{name.split('.')[2]}.weight"].float()
         for name in base.weights if name.startswith("layers.1.") and "norm" not in name}  # type: ignore[union-attr]  # fmt: skip
    expected = {
        "attn_in": torch.cat([w["q"], w["k"], w["v"]]).norm(dim=0),
        "attn_out": w["o"].norm(dim=1),
        "mlp_in": torch.cat([w["gate"], w["up"]]).norm(dim=0),
        "mlp_mid": torch.cat([w["gate"], w["up"], w["down"].T], dim=1).norm(dim=1),
        "mlp_out": w["down"].norm(dim=1),
    }
    for module in MODULES:
        torch.testing.assert_close(channel_norms(base.weights, 1, module), expected[module])


def test_select_takes_the_highest_and_of_equal_ones_the_first() -> None:
    assert select(torch.tensor([1.0, 3.0, 2.0, 3.0]), 2) == (1, 3)
    assert select(torch.ones(4), 2) == (0, 1)


def test_magnitude_keeps_the_largest_channels(base: Checkpoint) -> None:
    found = magnitude_selections(base.weights, WIDTHS)
    assert tuple(layer.widths for layer in found) == WIDTHS
    norms = channel_norms(base.weights, 0, "mlp_mid")
    dropped = [i for i in range(64) if i not in found[0].mlp_mid]
    assert norms[list(found[0].mlp_mid)].min() >= norms[dropped].max()


def test_random_depends_on_the_seed_alone(base: Checkpoint) -> None:
    found = random_selections(base.spec, WIDTHS, seed=1)
    assert tuple(layer.widths for layer in found) == WIDTHS
    assert found == random_selections(base.spec, WIDTHS, seed=1)
    assert found != random_selections(base.spec, WIDTHS, seed=2)
    assert found[0].attn_in != found[0].mlp_out  # as wide, drawn apart


@pytest.mark.parametrize("kind", ["magnitude", "random"])
def test_baseline_is_a_variant_of_the_same_base_and_size(
    kind: str, base: Checkpoint, tmp_path: Path
) -> None:
    save_disp(
        tmp_path / "searched", random_selections(base.spec, WIDTHS, seed=9), base.spec,
        base_id=base.name, base_fingerprint="0" * 64, base_quantization="nf4",
        dense_fingerprint=base.fingerprint, align=1, residual="independent",
    )  # fmt: skip
    facts = {"fingerprint": base.fingerprint, "quantization": "none", "model_id": base.name}
    like = load_disp(tmp_path / "searched", base.spec, **facts)
    save_baseline(tmp_path / kind, kind, like, base.spec, base.weights, seed=0)
    found = load_disp(tmp_path / kind, base.spec, **facts)
    assert found.disp.widths == like.disp.widths
    assert found.disp.remove_linears == like.disp.remove_linears
    assert found.selections != like.selections
    assert found.config.base_fingerprint == like.config.base_fingerprint
    assert found.config.training["like"] == like.digest
