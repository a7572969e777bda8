"""Sizes and speeds of pruned variants."""

from argparse import Namespace
from pathlib import Path

from adapters.disp.variant import save_disp
from benchmarks.disp_baselines import random_selections
from benchmarks.variant_speed import EIGHT_BITS, measure
from models.checkpoints import load_checkpoint

WIDTHS = [[16, 8, 32, 48, 16], [32, 16, 8, 24, 1]]


def test_sizes_are_of_the_base_and_its_variants(tiny_llama_folder: Path, tmp_path: Path) -> None:
    folder, variant = str(tiny_llama_folder), tmp_path / "small"
    dense = load_checkpoint(folder, quantization="none")
    base = load_checkpoint(folder, cache_dir=tmp_path / "cache")
    save_disp(
        variant, random_selections(dense.spec, WIDTHS, seed=0), dense.spec, base_id=base.name,
        base_fingerprint=base.fingerprint, base_quantization=base.quantization,
        dense_fingerprint=dense.fingerprint, align=1, residual="independent",
    )  # fmt: skip
    options = Namespace(
        model=folder, cache_dir=tmp_path / "cache", variant=[f"small={variant}"], rounds=0,
        eight_bits=True,
    )  # fmt: skip
    models = measure(options)["models"]
    assert set(models) == {"base", "small", EIGHT_BITS}
    assert models["base"]["layer_bytes"] < models[EIGHT_BITS]["own_bytes"]
    assert models["small"]["own_bytes"] < models["base"]["layer_bytes"]
    assert models["base"]["layer_bytes"] < models["base"]["weight_bytes"]
    assert models["small"]["folder_bytes"] > 0
