"""Compression of Vision Transformers of transformers: ViT, DeiT and Swin."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from adapters.mixed_rank.compress_config import CompressConfig
from adapters.mixed_rank.modules import LowRankLinear
from adapters.mixed_rank.ranks import BudgetError
from adapters.mixed_rank.vision import VisionResult, compress_vision, find_blocks, find_groups
from adapters.mixed_rank.vision_folder import VisionError, load_vision, open_vision
from adapters.training_state import TrainingError, TrainingInterrupted

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


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each kind."""
    root = tmp_path_factory.mktemp("models")
    for kind in MODELS:
        make(kind).save_pretrained(root / kind)
    return root


def compress(
    model: Path, output: Path, config: CompressConfig | None = None, **options
) -> VisionResult:
    return compress_vision(
        open_vision(model), options.pop("pixels", images(32)), output, data="images",
        config=config or CONFIG, **options,
    )  # fmt: skip


def images(count: int, seed: int = 0) -> Tensor:
    """Smooth ones, so that what linears read goes together."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, size=32, mode="bilinear")


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


def count(module: nn.Module) -> int:
    """Parameters, and codes that stand for some."""
    codes = sum(b.numel() for n, b in module.named_buffers() if n.endswith("codes"))
    return codes + sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("kind", MODELS)
def test_each_stage_is_nearer_to_the_model_as_it_was(
    kind: str, folders: Path, tmp_path: Path
) -> None:
    whole = load_vision(folders / kind)
    expected = features(whole, images(8, seed=1))
    config = replace(CONFIG, metric="outputs")
    plain = replace(config, plan="uniform", calibration="none", compensate=False)
    stages = {
        "plain": plain, "aware": replace(plain, calibration="exact"),
        "mixed": replace(plain, calibration="exact", plan="mixed"), "compensated": config,
    }  # fmt: skip
    errors = {}
    for name, config in stages.items():
        result = compress(folders / kind, tmp_path / name, config)
        module = load_vision(tmp_path / name)
        assert result.remove_linears >= 0.3
        assert result.remove_total == pytest.approx(1 - count(module) / count(whole))
        found = features(module, images(8, seed=1))
        errors[name] = float((found - expected).square().sum() / expected.square().sum())
    assert errors["compensated"] < errors["mixed"] < errors["plain"]
    assert errors["aware"] < errors["plain"]


def test_what_the_loss_tells_apart_is_kept(folders: Path, tmp_path: Path) -> None:
    pixels, found = images(24, seed=1), {}
    expected = load_vision(folders / "vit")(pixels).logits.log_softmax(-1)
    for metric in ("outputs", "loss"):
        config = replace(CONFIG, metric=metric, compensate=False)
        compress(folders / "vit", tmp_path / metric, config)
        logits = load_vision(tmp_path / metric)(pixels).logits.log_softmax(-1)
        found[metric] = float(nn.functional.kl_div(logits, expected, log_target=True))
    assert 0 < found["loss"] < found["outputs"]


def test_fits_only_to_what_the_model_as_it_was_reads_unless_it_compensates(
    folders: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, metric="outputs", compensate=False)
    compress(folders / "vit", tmp_path / "first", config)
    report = json.loads((tmp_path / "first" / "report.json").read_text())
    for facts in report["groups"].values():
        if facts["rank"] is not None:  # as planned, which was before anything was compressed
            assert facts["error_fitted"] == pytest.approx(facts["error"], rel=1e-3)


def test_gradient_brings_a_block_nearer(folders: Path, tmp_path: Path) -> None:
    compress(folders / "vit", tmp_path / "out", replace(CONFIG, steps=120), pixels=images(96))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = [f for f in report["groups"].values() if "layer_error_trained" in f]
    assert found
    assert all(f["layer_error_trained"] <= f["layer_error_fitted"] for f in found)
    assert any(f["layer_error_trained"] < 0.99 * f["layer_error_fitted"] for f in found)


@pytest.mark.parametrize("kind", MODELS)
def test_eight_bits_cost_little_and_take_a_quarter(
    kind: str, folders: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, rank_step=32, remove=0.2, steps=0)
    compress(folders / kind, tmp_path / "exact", config)
    result = compress(folders / kind, tmp_path / "rounded", replace(config, form="int8"))
    pixels = images(8, seed=1)
    expected = features(load_vision(folders / kind), pixels)
    modules = [load_vision(tmp_path / name) for name in ("exact", "rounded")]
    errors = [float((features(m, pixels) - expected).square().sum()) for m in modules]
    assert errors[1] <= 1.05 * errors[0]
    factored = [m for m in modules[1].modules() if isinstance(m, LowRankLinear)]
    assert factored
    assert all(m.left.codes.dtype == m.right.codes.dtype == torch.int8 for m in factored)
    assert result.folder == tmp_path / "rounded"


def test_folder_is_as_small_as_it_says(folders: Path, tmp_path: Path) -> None:
    make("vit").half().save_pretrained(tmp_path / "half")
    result = compress(tmp_path / "half", tmp_path / "out", replace(CONFIG, remove=0.5))
    before, after = (
        sum(t.numel() * t.element_size() for t in safetensors.torch.load_file(path).values())
        for path in (tmp_path / "half/model.safetensors", tmp_path / "out/mixed_rank.safetensors")
    )
    assert after / before == pytest.approx(1 - result.remove_total, abs=0.001)
    for name in ("ranks.png", "errors.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_transformers_alone_refuses_a_compressed_folder(folders: Path, tmp_path: Path) -> None:
    compress(folders / "vit", tmp_path / "out")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    with pytest.raises(VisionError, match="is compressed already"):
        compress(tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_resumed_run_computes_the_same_bits(
    kind: str, stop_after: int, folders: Path, tmp_path: Path
) -> None:
    compress(folders / kind, tmp_path / "whole", replace(CONFIG, checkpoint_every=1))
    asked = iter([False] * (stop_after - 1) + [True])
    options = {"config": replace(CONFIG, checkpoint_every=1)}
    with pytest.raises(TrainingInterrupted):
        compress(folders / kind, tmp_path / "parts", should_stop=lambda: next(asked), **options)
    compress(folders / kind, tmp_path / "parts", resume=True, **options)
    whole, parts = (
        safetensors.torch.load_file(tmp_path / name / "mixed_rank.safetensors")
        for name in ("whole", "parts")
    )
    assert set(whole) == set(parts)
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    assert not (tmp_path / "parts" / "checkpoints").exists()


def test_shared_factor_is_computed_once(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(folders / "vit", tmp_path / "out", replace(CONFIG, steps=0, remove=0.6))
    model = load_vision(tmp_path / "out")
    products = []
    multiply = nn.functional.linear
    monkeypatch.setattr(
        "adapters.mixed_rank.modules.F.linear",
        lambda x, weight, bias=None: products.append(weight.shape) or multiply(x, weight, bias),
    )
    features(model, images(1))
    factored = {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    assert [n for n in factored if n.endswith("q_proj")]
    rights = {id(m.right) for m in factored.values()}
    assert len(rights) < len(factored)
    assert len(products) == len(factored) + len(rights) + 1  # the classifier


def test_inputs_that_are_no_numbers_are_named(folders: Path, tmp_path: Path) -> None:
    pixels = images(32)
    pixels[13, 0, 0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"layers\.0\..*: an input is not a finite number"):
        compress(folders / "vit", tmp_path / "out", pixels=pixels)


def test_more_than_can_be_removed_is_refused(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(
        BudgetError, match=r"must be at most 0\.\d+ with ranks in steps of 8, got 0\.95"
    ):
        compress(folders / "vit", tmp_path / "out", replace(CONFIG, remove=0.95))


def test_four_bits_are_refused_for_modules(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="form must be float16 or int8"):
        compress(folders / "vit", tmp_path / "out", replace(CONFIG, form="int4", rank_step=32))
    assert not (tmp_path / "out").exists()


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VisionError, match=r"config\.json: cannot be read"):
        open_vision(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(VisionError, match="model_type must be one of vit, deit, swin, got 'llama'"):
        open_vision(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(VisionError, match="cannot be loaded"):
        open_vision(tmp_path)


def test_weights_that_lack_a_tensor_are_refused(folders: Path, tmp_path: Path) -> None:
    model = make("vit")
    model.save_pretrained(tmp_path)
    tensors = model.state_dict()
    name = "vit.layers.1.mlp.fc1.weight"
    del tensors[name]
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(VisionError, match=rf"the weights lack {name}"):
        open_vision(tmp_path)


@pytest.fixture(scope="module")
def compressed(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed model in 8 bits."""
    output = tmp_path_factory.mktemp("compressed")
    compress(
        folders / "vit", output, replace(CONFIG, form="int8", rank_step=32, steps=0, remove=0.2)
    )
    return output


def changed(compressed: Path, folder: Path, change) -> Path:
    """A copy of it with other content in its `mixed_rank.json` and its weights."""
    content = json.loads((compressed / "mixed_rank.json").read_text())
    tensors = safetensors.torch.load_file(compressed / "mixed_rank.safetensors")
    change(content, tensors)
    (folder / "mixed_rank.json").write_text(json.dumps(content))
    (folder / "config.json").write_text((compressed / "config.json").read_text())
    safetensors.torch.save_file(tensors, folder / "mixed_rank.safetensors")
    return folder


FAULTS = {
    "format_version must be 1, got 2": lambda c, _: c.update(format_version=2),
    "form must be one of float16, int8, got 'int4'": lambda c, _: c.update(form="int4"),
    "factored must be a list": lambda c, _: c["factored"][0].update(rank="32"),
    "remove_total must be a number": lambda c, _: c.update(remove_total=1.5),
    "are no linears of this model that share an input": (
        lambda c, _: c["factored"][0].update(linears=["vit.layernorm"])
    ),
    r"must be from 1 to below \d+, got 0": lambda c, _: c["factored"][0].update(rank=0),
    r"must be from 1 to below \d+, got 960": lambda c, _: c["factored"][0].update(rank=960),
    "must be a multiple of 32 with int8 factors, got 7": (
        lambda c, _: c["factored"][0].update(rank=7)
    ),
    "classifier.bias: missing": lambda _, t: t.pop("classifier.bias"),
    "extra: not a tensor of this model": lambda _, t: t.update(extra=torch.zeros(1)),
    r"classifier\.bias: must have shape \(5,\), got torch.float32 of \(2,\)": (
        lambda _, t: t.update({"classifier.bias": torch.zeros(2)})
    ),
    r"left\.codes: must have shape": lambda _, t: t.update(
        {n: v.float() for n, v in t.items() if n.endswith("left.codes")}
    ),
    "classifier.bias: has values that are no finite numbers": (
        lambda _, t: t.update({"classifier.bias": torch.full((5,), float("inf"))})
    ),
}


@pytest.mark.parametrize("message", FAULTS)
def test_damaged_folders_are_refused_by_what_is_wrong(
    message: str, compressed: Path, tmp_path: Path
) -> None:
    load_vision(changed(compressed, tmp_path, lambda *_: None))
    with pytest.raises(VisionError, match=message):
        load_vision(changed(compressed, tmp_path, FAULTS[message]))


def test_truncated_weights_are_refused(compressed: Path, tmp_path: Path) -> None:
    changed(compressed, tmp_path, lambda *_: None)
    path = tmp_path / "mixed_rank.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(VisionError, match="cannot be loaded"):
        load_vision(tmp_path)
