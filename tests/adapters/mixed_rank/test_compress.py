"""Compression of a small decoder that has learnt something, to the end and beyond a stop."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters.format import AdapterError, read_adapter
from adapters.methods import host_of
from adapters.mixed_rank.compress import CompressResult, compress
from adapters.mixed_rank.compress_config import CompressConfig
from adapters.mixed_rank.loss import mean_loss
from adapters.mixed_rank.ranks import BudgetError
from adapters.mixed_rank.variant import derive_mixed_rank, describe_mixed_rank
from adapters.training_state import TrainingError, TrainingInterrupted
from models.checkpoints import Checkpoint
from models.decoder import Decoder
from models.program import build_program
from models.weights import LowRank, count_linear_parameters, dense
from tests.adapters.fitted_base import LENGTH, fitted_checkpoint, make_text
from tests.models.kernels.random_decoders import KINDS, make_decoder_parts

CONFIG = CompressConfig(
    remove=0.3, form="float16", rank_step=8, sequences=24, length=LENGTH, eval_sequences=8,
    steps=16, checkpoint_every=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    return fitted_checkpoint()


def run(
    base: Checkpoint, output: Path, config: CompressConfig = CONFIG, **options
) -> CompressResult:
    return compress(base, make_text(), output, host=host_of(base), config=config, **options)


def loss_of(base: Checkpoint, folder: Path) -> float:
    """The loss of what a host makes of the folder."""
    brought = derive_mixed_rank(read_adapter(folder), host_of(base)).brought
    weights = {**base.weights, **brought}
    program = build_program(base.spec, weights, dense(base.weights["head.weight"]))
    text = make_text()[-8 * (LENGTH + 1) :].view(8, -1)
    return mean_loss(program, text)


def test_variant_is_as_small_and_as_good_as_it_says(base: Checkpoint, tmp_path: Path) -> None:
    result = run(base, tmp_path)
    stored = read_adapter(tmp_path)
    brought = derive_mixed_rank(stored, host_of(base)).brought
    assert brought
    assert all(isinstance(weight, LowRank) for weight in brought.values())
    rights = {id(w.right): w.right.shape for w in brought.values()}
    by_layer = [{id(brought[n].right) for n in brought if n.startswith(f"layers.{i}.") and
                 n.split(".")[2] in ("gate", "up")} for i in range(3)]  # fmt: skip
    assert max(map(len, by_layer)) == 1  # what shares an input shares a factor
    whole = count_linear_parameters(base.weights)
    lefts = sum(w.left.numel() for w in brought.values())
    kept = sum(
        w.numel()
        for n, w in base.weights.items()
        if n.startswith("layers.") and w.dim() == 2 and n not in brought
    )
    parameters = kept + lefts + sum(r * c for r, c in rights.values())
    assert count_linear_parameters({**base.weights, **brought}) == parameters
    assert result.remove_linears == pytest.approx(1 - parameters / whole)
    assert 0.3 <= result.remove_linears < 0.36
    assert result.loss == pytest.approx(loss_of(base, tmp_path), rel=1e-5)
    assert result.dense_loss < result.loss < 1.3 * result.dense_loss
    rows = dict(describe_mixed_rank(stored))
    assert rows["removed of linears"] == f"{result.remove_linears:.1%}"
    assert not (tmp_path / "checkpoints").exists()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["loss"] == result.loss
    ranks = {name: facts["rank"] for name, facts in report["groups"].items()}
    assert ranks == dict(stored.config.fields["ranks"])
    assert all("error_stored" in report["groups"][name] for name, rank in ranks.items() if rank)
    for name in ("ranks.png", "errors.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("remove", [0.2, 0.4])
def test_each_stage_loses_less_than_the_one_before(
    base: Checkpoint, tmp_path: Path, remove: float
) -> None:
    config = replace(CONFIG, remove=remove)
    plain = replace(config, plan="uniform", calibration="none", metric="outputs", compensate=False)
    stages = {
        "plain": plain,
        "aware": replace(plain, calibration="exact"),
        "mixed": replace(plain, calibration="exact", plan="mixed"),
        "weighed": replace(config, compensate=False),
        "compensated": config,
    }
    losses = {name: run(base, tmp_path / name, c).loss for name, c in stages.items()}
    assert losses["compensated"] < losses["weighed"] < losses["mixed"] < losses["plain"]
    assert losses["aware"] < losses["plain"]


def test_more_removed_loses_more(base: Checkpoint, tmp_path: Path) -> None:
    losses = [
        run(base, tmp_path / str(share), replace(CONFIG, remove=share)).loss
        for share in (0.1, 0.3, 0.5)
    ]
    assert losses == sorted(losses)


def test_resumed_run_computes_the_same_bits(base: Checkpoint, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(base, whole)
    for stop_after in (2, 1, 1):  # in the first pass, between the two, in the second
        asked = iter([False] * (stop_after - 1) + [True])
        with pytest.raises(TrainingInterrupted):
            run(base, parts, resume=parts.exists(), should_stop=lambda asked=asked: next(asked))
    run(base, parts, resume=True)
    first, second = read_adapter(whole), read_adapter(parts)
    assert first.config == second.config
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_rounded_factors_cost_little(base: Checkpoint, tmp_path: Path, form: str) -> None:
    config = replace(CONFIG, rank_step=32, steps=0)
    exact = run(base, tmp_path / "exact", config)
    rounded = run(base, tmp_path / form, replace(config, form=form))
    assert rounded.remove_linears == exact.remove_linears
    assert rounded.loss <= exact.loss * 1.05
    decoder = Decoder(
        base.spec,
        {**base.weights, **derive_mixed_rank(read_adapter(tmp_path / form), host_of(base)).brought},
    )
    assert decoder.num_bytes < Decoder(base.spec, base.weights).num_bytes


def test_more_than_can_be_removed_is_refused_with_the_most(
    base: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(
        BudgetError, match=r"must be at most 0\.\d+ with ranks in steps of 8, got 0\.99: \d+ of"
    ):
        run(base, tmp_path, replace(CONFIG, remove=0.99))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_pruned", [False, True])
def test_every_family_is_compressed_and_keeps_its_biases(
    kind: str, is_pruned: bool, tmp_path: Path
) -> None:
    spec, weights = make_decoder_parts(kind, is_pruned=is_pruned)
    base = Checkpoint(
        spec=spec, weights=weights, folder=Path(), weights_folder=Path(), name="random",
        quantization="none",
    )  # fmt: skip
    config = replace(CONFIG, remove=0.15, steps=2, sequences=6, eval_sequences=2)
    result = run(base, tmp_path, config)
    assert result.remove_linears >= 0.15
    stored = read_adapter(tmp_path)
    assert not [name for name in stored.tensors if "bias" in name]
    derived = {**weights, **derive_mixed_rank(stored, host_of(base)).brought}
    whole = {name: dense(weight) for name, weight in derived.items()}
    programs = [
        build_program(spec, each, dense(weights.get("head.weight", weights["embed.weight"])))
        for each in (derived, whole)
    ]
    text = make_text()[-2 * (LENGTH + 1) :].view(2, -1)
    losses = [mean_loss(program, text) for program in programs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert result.loss == pytest.approx(losses[0], rel=1e-4)


def test_text_that_is_too_short_is_refused(base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="at least length \\+ 1 = 33 tokens, got 20"):
        compress(base, make_text()[:20], tmp_path, host=host_of(base), config=CONFIG)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_no_numbers_are_named_by_layer(base: Checkpoint, tmp_path: Path) -> None:
    weights = {**base.weights, "layers.1.attn_norm.weight": torch.full((64,), float("nan"))}
    with pytest.raises(TrainingError, match=r"layers\.1: what it makes is not a finite number"):
        run(replace(base, weights=weights), tmp_path)


def test_another_host_is_refused(base: Checkpoint, tmp_path: Path) -> None:
    run(base, tmp_path, replace(CONFIG, steps=0))
    stored, host = read_adapter(tmp_path), host_of(base)
    with pytest.raises(AdapterError, match="this base is tiny"):
        derive_mixed_rank(stored, replace(host, fingerprint="0" * 64))
    with pytest.raises(AdapterError, match="made for the base itself"):
        derive_mixed_rank(stored, replace(host, chain=("a" * 64,)))


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="compensate must be off with calibration 'none'"):
        CompressConfig(calibration="none")
