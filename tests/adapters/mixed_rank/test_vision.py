"""Compression of Vision Transformers of transformers, as modules: ViT, DeiT and Swin."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch import Tensor, nn

from adapters.mixed_rank.compress_config import CompressConfig
from adapters.mixed_rank.modules import LowRankLinear, as_blocks
from adapters.mixed_rank.moments import MomentsError
from adapters.mixed_rank.ranks import BudgetError
from adapters.mixed_rank.vision import compress_modules, find_blocks, find_groups
from models.weights import dense

SMALL = {"image_size": 32, "num_channels": 3, "hidden_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "intermediate_size": 128, "patch_size": 8}  # fmt: skip
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [1, 2], "num_heads": [2, 4],
        "window_size": 4, "mlp_ratio": 2.0}  # fmt: skip
MODELS = {
    "vit": (transformers.ViTConfig, transformers.ViTForImageClassification, SMALL),
    "deit": (transformers.DeiTConfig, transformers.DeiTForImageClassification, SMALL),
    "swin": (transformers.SwinConfig, transformers.SwinForImageClassification, SWIN),
}
CONFIG = CompressConfig(remove=0.3, form="float16", rank_step=8, steps=8)


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config, model, sizes = MODELS[kind]
    return model(config(num_labels=5, **sizes)).eval()


def images(count: int, seed: int = 0) -> Tensor:
    """Smooth ones, so that what linears read goes together."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, size=32, mode="bilinear")


def batches() -> list[Tensor]:
    return list(images(32).split(4))


def features(model: nn.Module, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return model(pixels, output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("kind", MODELS)
def test_linears_of_blocks_are_found_with_those_that_read_the_same(kind: str) -> None:
    model = make(kind)
    groups = find_groups(model, images(1))
    assert len(find_blocks(model)) == (3 if kind == "swin" else 2)
    sizes = [len(group.names) for group in groups]
    assert sizes == [3, 1, 1, 1] * len(find_blocks(model))
    names = [name for group in groups for name in group.names]
    assert not [name for name in names if "classifier" in name or "downsample" in name]


@pytest.mark.parametrize("kind", MODELS)
def test_each_stage_is_nearer_to_the_model_as_it_was(kind: str) -> None:
    expected = features(make(kind), images(8, seed=1))
    plain = replace(CONFIG, plan="uniform", calibration="none", compensate=False)
    stages = {
        "plain": plain, "aware": replace(plain, calibration="exact"),
        "mixed": replace(plain, calibration="exact", plan="mixed"), "compensated": CONFIG,
    }  # fmt: skip
    errors = {}
    for name, config in stages.items():
        model = make(kind)
        before = sum(p.numel() for p in model.parameters())
        facts = compress_modules(model, batches(), config)
        whole = sum(f["outputs"] * f["inputs"] for f in facts.values())
        kept = sum(
            f["outputs"] * f["inputs"] if f["rank"] is None
            else f["rank"] * (f["outputs"] + f["inputs"]) for f in facts.values()
        )  # fmt: skip
        assert before - sum(p.numel() for p in model.parameters()) == whole - kept
        assert kept <= 0.7 * whole
        found = features(model, images(8, seed=1))
        errors[name] = float((found - expected).square().sum() / expected.square().sum())
    assert errors["compensated"] < errors["mixed"] < errors["plain"]
    assert errors["aware"] < errors["plain"]


def test_gradient_brings_a_block_nearer() -> None:
    model = make("vit")
    facts = compress_modules(model, batches(), replace(CONFIG, steps=120))
    found = [f for f in facts.values() if "layer_error_trained" in f]
    assert found
    assert all(f["layer_error_trained"] <= f["layer_error_fitted"] for f in found)
    assert any(f["layer_error_trained"] < 0.99 * f["layer_error_fitted"] for f in found)


def test_eight_bits_cost_little_and_are_what_other_parts_read() -> None:
    config = replace(CONFIG, rank_step=32, remove=0.2, steps=0)
    exact, rounded = make("vit"), make("vit")
    compress_modules(exact, batches(), config)
    compress_modules(rounded, batches(), replace(config, form="int8"))
    pixels = images(8, seed=1)
    expected = features(make("vit"), pixels)
    errors = [float((features(m, pixels) - expected).square().sum()) for m in (exact, rounded)]
    assert errors[1] <= 1.05 * errors[0]
    factored = [m for m in rounded.modules() if isinstance(m, LowRankLinear)]
    assert factored
    for module in factored:
        assert torch.equal(dense(as_blocks(module.left)), module.left.matrix())


def test_shared_factor_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("vit")
    compress_modules(model, batches(), replace(CONFIG, steps=0, remove=0.6))
    products = []
    multiply = nn.functional.linear
    monkeypatch.setattr(
        "adapters.mixed_rank.modules.F.linear",
        lambda x, weight, bias=None: products.append(weight.shape) or multiply(x, weight, bias),
    )
    features(model, images(1))
    factored = {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    queries = [n for n in factored if n.endswith("q_proj")]
    assert queries
    rights = {id(m.right) for m in factored.values()}
    assert len(products) == len(factored) + len(rights) + 1  # the classifier


def test_inputs_that_are_no_numbers_are_named() -> None:
    model = make("vit")
    pixels = batches()
    pixels[3][1, 0, 0, 0] = float("nan")
    with pytest.raises(MomentsError, match=r"layers\.0\..*: an input is not a finite number"):
        compress_modules(model, pixels, CONFIG)


def test_more_than_can_be_removed_is_refused() -> None:
    with pytest.raises(BudgetError, match="the least that can be kept"):
        compress_modules(make("vit"), batches(), replace(CONFIG, remove=0.95))
