"""Perplexity on windows: against a direct computation, with and without variant and adapter."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from adapters.disp.variant import save_disp
from adapters.format import AdapterError, digest
from adapters.frozen_head import FrozenHead, head_weight
from adapters.qst.adapter import save_qst
from adapters.qst.config import QstConfig
from adapters.qst.examples import Example, pack_examples
from adapters.qst.network import QstNetwork
from benchmarks.disp_baselines import random_selections
from benchmarks.perplexity import load_network, losses_with_adapter, mean_loss, model_options
from benchmarks.windows import cut_windows, digest_windows
from models.checkpoints import Checkpoint, load_checkpoint
from models.decoder import Decoder
from serve.base_model import load_variant

WIDTHS = ((16, 16, 32, 48, 16), (32, 16, 16, 32, 32))
WINDOWS = [[7 * i % 256 for i in range(start, start + 12)] for start in (0, 100, 250)]


@pytest.fixture(scope="module")
def base(tiny_llama_folder: Path) -> Checkpoint:
    return load_checkpoint(str(tiny_llama_folder), quantization="none")


@pytest.fixture
def variant(base: Checkpoint, tmp_path: Path) -> Path:
    save_disp(
        tmp_path / "variant", random_selections(base.spec, WIDTHS, seed=3), base.spec,
        base_id=base.name, base_fingerprint=base.fingerprint, base_quantization="none",
        dense_fingerprint=base.fingerprint, align=16, residual="independent",
    )  # fmt: skip
    return tmp_path / "variant"


def load(folder: Path, base: Checkpoint, variant: Path, tmp_path: Path) -> Checkpoint:
    options = Namespace(model=str(folder), cache_dir=tmp_path / "cache")
    about = model_options(options, "none")
    return load_variant(about, base, [variant], report=lambda _: None)


def runnable(checkpoint: Checkpoint) -> tuple[Decoder, FrozenHead]:
    decoder = Decoder(checkpoint.spec, checkpoint.weights, kernels="reference", head="dense")
    return decoder, FrozenHead(decoder, head_weight(checkpoint), torch.device("cpu"))


def direct_loss(decoder: Decoder, first_target: int = 1) -> float:
    losses = []
    for window in WINDOWS:
        batch = pack_examples([Example(token_ids=window, is_target=b"\1" * len(window))])
        *_, last = decoder.hidden_states(batch.packed)
        logits = decoder.logits(decoder.apply_final_norm(last))
        targets = torch.tensor(window[first_target:])
        losses.append(F.cross_entropy(logits[first_target - 1 : -1], targets, reduction="none"))
    return float(torch.cat(losses).mean())


def test_windows_are_whole_and_in_order() -> None:
    assert cut_windows(range(10), 3) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert cut_windows(range(10), 5, 1) == [[0, 1, 2, 3, 4]]
    with pytest.raises(ValueError, match="the text has 10 tokens, a window 11"):
        cut_windows(range(10), 11)
    with pytest.raises(ValueError, match="windows at least 1, got 5, 0"):
        cut_windows(range(10), 5, 0)


def test_digest_tells_windows_apart() -> None:
    assert digest_windows([[1, 2], [3, 4]]) == digest_windows([[1, 2], [3, 4]])
    assert digest_windows([[1, 2], [3, 4]]) != digest_windows([[1, 2], [3, 5]])


@pytest.mark.parametrize("first_target", [1, 7])
def test_loss_is_the_mean_over_predicted_tokens(base: Checkpoint, first_target: int) -> None:
    decoder, head = runnable(base)
    expected = pytest.approx(direct_loss(decoder, first_target), rel=1e-5)
    assert mean_loss(decoder, head, WINDOWS, first_target=first_target) == expected


def test_variant_has_a_loss_of_its_own(
    base: Checkpoint, variant: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    pruned = load(tiny_llama_folder, base, variant, tmp_path)
    assert pruned.fingerprint == base.fingerprint
    decoder, head = runnable(pruned)
    loss = mean_loss(decoder, head, WINDOWS)
    assert loss == pytest.approx(direct_loss(decoder), rel=1e-5)
    assert abs(loss - mean_loss(*runnable(base), WINDOWS)) > 1e-2


def test_adapter_is_read_on_the_variant_that_it_was_trained_on(
    base: Checkpoint, variant: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    pruned = load(tiny_llama_folder, base, variant, tmp_path)
    network = QstNetwork(pruned.spec, QstConfig(reduction=4, rank=4), seed=1)
    with torch.no_grad():
        network.get_parameter("alpha").fill_(0.5)
    save_qst(
        tmp_path / "healed", network, base_id=base.name, base_fingerprint=base.fingerprint,
        base_quantization="none", chain=(digest(variant),),
    )  # fmt: skip
    decoder, head = runnable(pruned)
    read = load_network(tmp_path / "healed", pruned)
    healed, plain = losses_with_adapter(decoder, head, WINDOWS, read)
    assert plain == pytest.approx(mean_loss(decoder, head, WINDOWS), rel=1e-5)
    assert healed == losses_with_adapter(decoder, head, WINDOWS, network)[0]
    assert abs(healed - plain) > 1e-3
    with pytest.raises(AdapterError, match="made for the base with"):
        load_network(tmp_path / "healed", base)
