"""Sizes and speeds of pruned variants."""

import json
from argparse import Namespace
from pathlib import Path

from benchmarks.disp_speed import load_as_wide, measure
from models.checkpoints import load_checkpoint
from models.pruning import widths_of

WIDTHS = [[16, 8, 32, 48, 16], [32, 16, 8, 24, 1]]


def test_others_are_as_wide_as_the_figures_say(tiny_llama_folder: Path, tmp_path: Path) -> None:
    figures = tmp_path / "disp.json"
    items = {"disp-20": {"fields": {"widths": WIDTHS}}}
    figures.write_text(json.dumps({"stages": {"search": {"items": items}}}), encoding="utf-8")
    base = load_checkpoint(str(tiny_llama_folder), quantization="none")
    options = Namespace(model=str(tiny_llama_folder), cache_dir=tmp_path / "cache")
    (pruned,) = load_as_wide(figures, base, options).values()
    assert [list(widths) for widths in widths_of(pruned.spec)] == WIDTHS
    options = Namespace(
        **vars(options), quantization="none", head="dense", variant=[], as_wide_as=figures, rounds=0
    )
    found = measure(options)
    assert found["by_lot"]
    assert found["models"]["disp-20"]["own_bytes"] < found["models"]["base"]["layer_bytes"]
