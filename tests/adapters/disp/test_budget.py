"""Shares of linears and of the model; the pull of the penalty."""

import math

import pytest
import torch

from adapters.disp.budget import (
    BudgetError,
    check_shares,
    linears_share,
    linears_total,
    ratio_penalty,
    reachable_share,
    total_share,
)
from models.spec import DecoderSpec, LayerSpec
from tests.models.kernels.random_decoders import make_decoder_parts

TINY, _ = make_decoder_parts("llama")


def llama_2_7b() -> DecoderSpec:
    layer = LayerSpec(
        num_attention_heads=32, num_key_value_heads=32, head_dim=128, intermediate_size=11008
    )
    return DecoderSpec(
        family="llama", vocab_size=32000, hidden_size=4096, max_position_embeddings=4096,
        layers=(layer,) * 32, norm="rms", norm_eps=1e-5, activation="silu", gated_mlp=True,
    )  # fmt: skip


def test_shares_of_llama_2_7b_are_the_papers() -> None:
    spec = llama_2_7b()
    assert linears_total(spec) == 6_476_005_376
    assert 1 - linears_share(spec, 0.5) == pytest.approx(0.4797, abs=5e-4)
    for rho, kept in ((0.1, 0.896), (0.2, 0.792), (0.3, 0.688), (0.4, 0.584)):
        assert 1 - linears_share(spec, rho) == pytest.approx(kept, abs=6e-4)


@pytest.mark.parametrize("share", [0.1, 0.37, 0.8])
def test_shares_are_turned_there_and_back(share: float) -> None:
    assert total_share(TINY, linears_share(TINY, share)) == pytest.approx(share)


def test_share_that_embeddings_make_unreachable_is_refused_with_the_maximum() -> None:
    limit = total_share(TINY, 1.0)
    assert limit < 0.95
    with pytest.raises(
        BudgetError, match=r"remove_total must be above 0 and at most 0\.\d+ .*, got 0.95: 13248 of"
    ):
        linears_share(TINY, 0.95)
    with pytest.raises(BudgetError, match="remove_total must be above 0"):
        linears_share(TINY, 0.0)


def test_share_beyond_the_least_widths_is_refused_with_the_maximum() -> None:
    # 32 of 64 and of 160 channels: attention keeps half, the MLP 1/2 * 1/5.
    assert reachable_share(TINY, 32) == pytest.approx(1 - (6144 + 3072) / 43008)
    check_shares(TINY, [0.2, 0.78], 32)
    with pytest.raises(
        BudgetError, match=r"remove must be at most 0.7857 for this model, got 0.79, 0.9: .* = 32"
    ):
        check_shares(TINY, [0.5, 0.79, 0.9], 32)
    check_shares(TINY, [0.99], 1)


@pytest.mark.parametrize(("kept", "sign"), [(0.9, 1), (0.701, 1), (0.699, -1), (0.2, -1)])
def test_penalty_pushes_towards_the_target(kept: float, sign: int) -> None:
    share = torch.tensor(kept, requires_grad=True)
    penalty = ratio_penalty(share, 0.7, 6.0)
    penalty.backward()
    assert share.grad is not None
    assert penalty.item() > 0
    assert math.copysign(1, share.grad.item()) == sign


def test_penalty_is_the_papers_and_fades_at_the_target() -> None:
    assert ratio_penalty(torch.tensor(0.7), 0.7, 6.0).item() == pytest.approx(0, abs=1e-9)
    high, low = (ratio_penalty(torch.tensor(0.4 * x), 0.4, 6.0).item() for x in (1.7, 1 / 1.7))
    assert high == pytest.approx(6 * math.log(1.7), rel=1e-5)
    assert high == pytest.approx(low, rel=1e-5)  # symmetric in the logarithm
    near = torch.tensor(0.4 * 1.003, requires_grad=True)
    ratio_penalty(near, 0.4, 6.0).backward()
    assert near.grad is not None
    assert near.grad.item() == pytest.approx(6 / (0.4 * 1.003) * math.log(1.003) / 0.03, rel=1e-3)


def test_penalty_of_nothing_kept_is_finite() -> None:
    assert ratio_penalty(torch.tensor(0.0), 0.5, 6.0).item() == pytest.approx(6 * math.log(5e5))
