"""A side network trained on a pruned variant belongs to the base and that variant."""

from pathlib import Path

import pytest
import torch

from adapters.disp.variant import load_disp, save_disp
from adapters.format import AdapterError, read_config
from adapters.qst.adapter import load_qst
from adapters.training_state import TrainingError, TrainingInterrupted
from models.checkpoints import Checkpoint, Lineage, Originals, prune
from models.decoder import Decoder
from tests.adapters.qst.training.small_run import build, run
from tests.models.random_selections import random_selections

Variant = tuple[Checkpoint, Decoder]


@pytest.fixture(scope="module")
def variant(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("disp")
    base, decoder = build(tiny_llama_folder)
    save_disp(
        folder / "variant", random_selections(base.spec, (24, 16, 24, 48, 16)), base.spec,
        base_id=base.name, base_fingerprint=base.fingerprint, base_quantization="none",
        dense_fingerprint=base.fingerprint, align=8, residual="independent",
    )  # fmt: skip
    read = load_disp(
        folder / "variant", base.spec, fingerprint=base.fingerprint, quantization="none",
        model_id=base.name,
    )  # fmt: skip
    originals = Originals(tiny_llama_folder, base, cache_dir=folder)
    step = prune(base.spec, read.selections, digest=read.digest)
    pruned = Lineage(checkpoint=base, originals=originals).derive(step).checkpoint
    return pruned, Decoder(pruned.spec, pruned.weights, base=decoder)


def test_adapter_of_a_variant_names_it_in_its_chain(variant: Variant, tmp_path: Path) -> None:
    checkpoint, decoder = variant
    result = run(variant, tmp_path / "run", steps=40, batch_size=8, eval_every=40)
    assert result.evaluation is not None
    assert result.evaluation.base_loss is not None
    assert result.loss < result.evaluation.base_loss
    assert read_config(tmp_path / "run").chain == checkpoint.chain != ()
    about = {"fingerprint": checkpoint.fingerprint, "model_id": "tiny"}
    load_qst(tmp_path / "run", decoder.spec, **about, chain=checkpoint.chain)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="made for the base with .*; this is the base itself"):
        load_qst(tmp_path / "run", decoder.spec, **about)  # type: ignore[arg-type]


def test_run_on_a_variant_is_not_resumed_on_its_base(
    variant: Variant, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainingInterrupted):
        run(variant, tmp_path / "run", should_stop=lambda: True)
    with pytest.raises(TrainingError, match=r"chain: \['.*'\] then, \[\] now"):
        run(build(tiny_llama_folder), tmp_path / "run", resume=True)
    run(variant, tmp_path / "run", resume=True)
    assert read_config(tmp_path / "run").chain == variant[0].chain
