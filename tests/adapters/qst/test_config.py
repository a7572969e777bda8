"""Sizes of side networks, and what a config may not say."""

import dataclasses
import json
import math

import pytest
import torch

from adapters.format import AdapterError
from adapters.qst.config import QstConfig, from_fields, side_rotary
from adapters.qst.network import QstNetwork
from models.families.rotary import llama3_frequencies
from models.spec import DecoderSpec, LayerSpec, RotarySpec
from tests.adapters.side_decoders import make_base
from tests.models.kernels.random_decoders import KINDS, make_decoder_parts


def plain_rotary(dim: int, theta: float = 10000.0) -> RotarySpec:
    return RotarySpec(dim=dim, inv_freq=tuple(theta ** (-i / dim) for i in range(0, dim, 2)))


def llama(hidden: int, middle: int, layers: int, heads: int, kv_heads: int) -> DecoderSpec:
    layer = LayerSpec(
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=128,
        intermediate_size=middle,
    )  # fmt: skip
    return DecoderSpec(
        family="llama", vocab_size=32000, hidden_size=hidden, max_position_embeddings=4096,
        layers=(layer,) * layers, norm="rms", norm_eps=1e-5, activation="silu", gated_mlp=True,
        rotary=plain_rotary(128),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("downsample", "millions", "share"),
    [("adapter", 28.6, 7.8), ("linear", 59.9, 56.0), ("maxpool", 26.4, 0.0), ("avgpool", 26.4, 0)],
)
def test_parameters_of_llama_2_7b_are_the_papers(
    downsample: str, millions: float, share: float
) -> None:
    config = QstConfig(downsample=downsample, tie_embedding_downsample=True)  # type: ignore[arg-type]
    network = QstNetwork(llama(4096, 11008, 32, 32, 32), config, device="meta")
    downs = sum(p.numel() for n, p in network.named_parameters() if n.startswith("downsamples."))
    assert network.num_parameters / 1e6 == pytest.approx(millions, abs=0.1)
    assert 100 * downs / network.num_parameters == pytest.approx(share, abs=0.05)


def test_embedding_has_a_downsample_of_its_own() -> None:
    base = llama(4096, 11008, 32, 32, 32)
    tied, own = (
        QstNetwork(base, QstConfig(tie_embedding_downsample=tie), device="meta").num_parameters
        for tie in (True, False)
    )
    assert own - tied == 70_144
    assert own == pytest.approx(28.6e6, abs=0.1e6)


def test_parameters_of_llama_2_70b_are_the_papers() -> None:
    network = QstNetwork(llama(8192, 28672, 80, 64, 8), QstConfig(), device="meta")
    assert network.num_parameters == pytest.approx(283e6, rel=0.01)


@pytest.mark.parametrize("kind", ["paper", *KINDS])
def test_side_layers_are_of_the_bases_kind(kind: str) -> None:
    base, _ = make_base(kind)
    spec = QstConfig(reduction=4).side_spec(base)
    for name in ("norm", "norm_eps", "activation", "gated_mlp", "residual", "shared_norm",
                 "qk_norm"):  # fmt: skip
        assert getattr(spec, name) == getattr(base, name)
    assert spec.hidden_size == 16
    assert spec.learned_positions_offset is None
    for side, layer in zip(spec.layers, base.layers, strict=True):
        assert side.num_attention_heads == layer.num_attention_heads
        assert side.num_key_value_heads == layer.num_key_value_heads
        assert side.head_dim == layer.head_dim // 4
        assert side.intermediate_size == layer.intermediate_size // 4
    names = {
        name.split(".", 2)[-1] for name in QstNetwork(base, QstConfig(reduction=4)).state_dict()
    }
    assert ("q.bias" in names) == (base.norm == "layer")
    assert ("q_norm.weight" in names) == base.qk_norm
    assert ("mlp_norm.weight" in names) == (not base.shared_norm)


def test_pruned_layers_get_side_layers_of_full_width_and_their_own_middle() -> None:
    base, _ = make_decoder_parts("llama", is_pruned=True)
    spec = QstConfig(reduction=16, side_heads=2, side_kv_heads=2, side_head_dim=2).side_spec(base)
    assert [layer.intermediate_size for layer in spec.layers] == [10, 11, 12]
    assert all(layer.attn_in is None and layer.mlp_out is None for layer in spec.layers)


@pytest.mark.parametrize("kind", ["paper", *KINDS])
def test_resolved_config_survives_json(kind: str) -> None:
    base, _ = make_base(kind)
    config = QstConfig(
        reduction=4, side_intermediate=(8,) * len(base.layers), gate_shape="vector",
        task="sequence_classification", num_labels=2, labels=("no", "yes"),
    ).resolved(base)  # fmt: skip
    assert None not in config.to_fields().values()
    assert from_fields(json.loads(json.dumps(config.to_fields()))) == config
    assert config.resolved(base) == config


def with_rotary(rotary: RotarySpec, head_dim: int) -> DecoderSpec:
    base, _ = make_base("paper")
    layers = tuple(dataclasses.replace(layer, head_dim=head_dim) for layer in base.layers)
    return dataclasses.replace(base, layers=layers, rotary=rotary)


@pytest.mark.parametrize("side_dim", [4, 8, 16, 10, 24, 64])
def test_side_frequencies_have_the_bases_theta(side_dim: int) -> None:
    rotary = side_rotary(with_rotary(plain_rotary(64, 500000.0), 64), side_dim)
    assert rotary is not None
    assert rotary.inv_freq == pytest.approx(plain_rotary(side_dim, 500000.0).inv_freq, rel=1e-9)


def test_side_frequencies_are_scaled_as_the_bases() -> None:
    def scaled(dim: int) -> RotarySpec:
        inv_freq = llama3_frequencies(
            torch.tensor(plain_rotary(dim, 500000.0).inv_freq), factor=8.0, low_freq_factor=1.0,
            high_freq_factor=4.0, original_length=8192,
        )  # fmt: skip
        return RotarySpec(dim=dim, inv_freq=tuple(inv_freq.tolist()), attention_scale=1.25)

    rotary = side_rotary(with_rotary(scaled(128), 128), 8)
    assert rotary is not None
    assert rotary.attention_scale == 1.25
    assert rotary.inv_freq == pytest.approx(scaled(8).inv_freq, rel=1e-5)


@pytest.mark.parametrize(
    ("base_dim", "head_dim", "side_dim", "rotated"),
    [(32, 80, 5, 2), (16, 64, 8, 2), (16, 64, 4, 2)],
)
def test_side_heads_rotate_the_share_that_the_base_rotates(
    base_dim: int, head_dim: int, side_dim: int, rotated: int
) -> None:
    rotary = side_rotary(with_rotary(plain_rotary(base_dim), head_dim), side_dim)
    assert rotary is not None
    assert rotary.dim == rotated


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reduction": 7}, "reduction 7 does not divide the base's hidden_size 64 .* use 2, 4, 8"),
        ({"reduction": 16}, "head_dim 16 .*at least 2 must be left.*or give side_heads"),
        ({"reduction": 3}, r"hidden_size 64 .*; .*head_dim 16 .*; .*intermediate_size 128"),
        ({"rank": 65}, "rank must be at most hidden_size 64, got 65"),
        ({"reduction": 4, "side_heads": 2}, "side_kv_heads must be given with side_heads"),
        ({"reduction": 4, "side_head_dim": (4, 4)}, "side_head_dim: 2 values for 4 layers"),
        (
            {"reduction": 4, "side_heads": 3, "side_kv_heads": 2},
            "layer 0: side_heads 3 must be a multiple of side_kv_heads 2",
        ),
        (
            {"reduction": 4, "rotary_inv_freq": (1.0, 0.5, 0.1)},
            "side_head_dim 4 is below the 6 rotated channels",
        ),
    ],
)
def test_config_that_does_not_fit_the_base_is_refused(
    fields: dict[str, object], message: str
) -> None:
    base, _ = make_base("paper")
    with pytest.raises(AdapterError, match=message):
        QstConfig(**fields).side_spec(base)  # type: ignore[arg-type]


def test_odd_rotated_heads_are_refused() -> None:
    base = with_rotary(plain_rotary(12), 12)
    with pytest.raises(AdapterError, match="reduction 4 of head_dim 12 gives an odd width"):
        QstConfig(reduction=4).resolved(base)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reduction": 0}, "reduction must be an integer of at least 1, got 0"),
        ({"reduction": True}, "reduction must be an integer of at least 1, got True"),
        ({"rank": "16"}, "rank must be an integer of at least 1, got '16'"),
        ({"downsample": "conv"}, "downsample must be one of linear, lora, adapter, .*got 'conv'"),
        ({"gate_shape": ["scalar"]}, "gate_shape must be one of scalar, vector"),
        ({"downsample_norm": 1}, "downsample_norm must be true or false, got 1"),
        ({"side_head_dim": [4, 0]}, "side_head_dim must be positive integers or null"),
        ({"rotary_inv_freq": [1.0, math.inf]}, "rotary_inv_freq must be a list of positive num"),
        ({"rotary_inv_freq": 1.0}, "rotary_inv_freq must be a list of positive numbers or null"),
        ({"rotary_scale": 0}, "rotary_scale must be above 0 or null, got 0"),
        ({"num_labels": 2}, "num_labels must be 0 for causal_lm, got 2"),
        ({"task": "sequence_classification"}, "num_labels must be an integer of at least 1, got 0"),
        (
            {"task": "sequence_classification", "num_labels": 2, "labels": ["a", "a"]},
            "labels must be num_labels different strings, or none",
        ),
        ({"width": 3, "alpha_r": 1}, "unknown qst fields: alpha_r, width; known: activation, "),
        ({"reduction": -1, "rank": 0}, "reduction must .*; rank must "),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        from_fields(fields)
