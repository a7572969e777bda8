import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from models.families import FAMILIES, CheckpointError, UnsupportedArchitectureError, describe_model
from models.families.config_reader import ConfigReader
from models.families.rotary import build_rotary
from models.spec import canonical_weights
from tests.models.tiny_models import CONFIGS, LLAMA3_ROPE, YARN_ROPE

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def without(config: dict[str, object], *names: str) -> dict[str, object]:
    return {name: value for name, value in config.items() if name not in names}


@pytest.mark.parametrize("name", CONFIGS)
def test_sources_name_every_tensor_that_transformers_saves(
    name: str, tiny_folder: Callable[..., Path]
) -> None:
    folder = tiny_folder(name)
    description = describe_model(json.loads((folder / "config.json").read_text()))
    saved = load_file(folder / "model.safetensors")
    assert {source.name for source in description.sources.values()} == set(saved)


@pytest.mark.parametrize("name", CONFIGS)
def test_sources_hold_every_required_weight(name: str, tiny_folder: Callable[..., Path]) -> None:
    config = json.loads((tiny_folder(name) / "config.json").read_text())
    description = describe_model(config)
    required = {key for key, _, is_required in canonical_weights(description.spec) if is_required}
    assert required <= set(description.sources)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_defaults_are_those_of_transformers(architecture: str) -> None:
    config_class = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    model_type = next(k for k, v in config_class.items() if v == architecture)
    full = json.loads(transformers.AutoConfig.for_model(model_type).to_json_string(use_diff=False))
    bare = describe_model({"architectures": [architecture]})
    assert bare == describe_model(full | {"architectures": [architecture]})


def test_model_type_stands_in_for_missing_architectures() -> None:
    config = without(LLAMA, "architectures") | {"model_type": "llama"}
    assert describe_model(config) == describe_model(LLAMA)


def test_neither_architecture_nor_model_type_is_refused() -> None:
    with pytest.raises(CheckpointError, match="neither architectures nor model_type"):
        describe_model(without(LLAMA, "architectures"))


def test_unsupported_architecture_names_the_supported_ones() -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"'GPT2LMHeadModel'.*LlamaForCausalLM"):
        describe_model({"architectures": ["GPT2LMHeadModel"]})


def test_auto_map_of_an_unsupported_architecture_is_refused() -> None:
    config = {"architectures": ["MyModel"], "auto_map": {"AutoModelForCausalLM": "m.MyModel"}}
    with pytest.raises(UnsupportedArchitectureError, match="run code from the checkpoint"):
        describe_model(config)


def test_auto_map_of_a_supported_architecture_is_ignored() -> None:
    assert describe_model(LLAMA | {"auto_map": {"AutoConfig": "x.Y"}}) == describe_model(LLAMA)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "64"}, r"hidden_size must be an integer >= 1, got '64'"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers must be an integer >= 1, got 0"),
        ({"vocab_size": True}, r"vocab_size must be an integer >= 1, got True"),
        ({"rms_norm_eps": 0}, r"rms_norm_eps must be a positive number, got 0"),
        ({"attention_bias": 1}, r"attention_bias must be true or false, got 1"),
        ({"hidden_act": "mish"}, r"hidden_act 'mish' is not supported; supported: gelu"),
        ({"num_attention_heads": 7}, r"hidden_size 64 is no multiple of num_attention_heads 7"),
        ({"num_key_value_heads": 3}, r"num_attention_heads 4 is no multiple of"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, r"rope_type 'dynamic'.*llama3, yarn"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_parameters.factor must be a positive number"),
        ({"rope_parameters": {"full_attention": {}}}, r"one flat object for all layers"),
        ({"rope_scaling": "linear"}, r"rope_scaling must be one flat object"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_llama_field_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        describe_model(LLAMA | changes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"do_layer_norm_before": False}, "OPT-350m: norm after each block"),
        ({"word_embed_proj_dim": 512}, "projected embeddings"),
        ({"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine false"),
        ({"num_attention_heads": 7}, "no multiple of num_attention_heads 7"),
    ],
    ids=["post-norm", "projection", "no-affine", "heads"],
)
def test_opt_variant_is_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        describe_model({"architectures": ["OPTForCausalLM"]} | config)


def test_phi_with_query_norms_is_refused() -> None:
    with pytest.raises(CheckpointError, match="qk_layernorm true is not supported"):
        describe_model({"architectures": ["PhiForCausalLM"], "qk_layernorm": True})


def test_mistral_window_limits_the_context_and_says_so() -> None:
    config = {"architectures": ["MistralForCausalLM"], "max_position_embeddings": 32768}
    description = describe_model(config)
    assert description.spec.max_position_embeddings == 4096
    assert "limited to 4096 tokens" in description.notes[0]


def test_mistral_without_window_keeps_the_context() -> None:
    config = {"architectures": ["MistralForCausalLM"], "sliding_window": None}
    assert describe_model(config).spec.max_position_embeddings == 131072


@pytest.mark.parametrize(
    ("changes", "max_length"),
    [
        ({}, 32768),
        ({"use_sliding_window": True}, 4096),
        ({"use_sliding_window": True, "max_window_layers": 32}, 32768),
        ({"use_sliding_window": True, "layer_types": ["full_attention"] * 32}, 32768),
    ],
    ids=["off", "on", "no-layer", "layer-types"],
)
def test_qwen_window_counts_only_where_a_layer_uses_it(
    changes: dict[str, object], max_length: int
) -> None:
    description = describe_model({"architectures": ["Qwen2ForCausalLM"]} | changes)
    assert description.spec.max_position_embeddings == max_length


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        LLAMA3_ROPE,
        YARN_ROPE,
        YARN_ROPE | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.25},
        YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False},
    ],
    ids=["default", "linear", "llama3", "yarn", "yarn-betas", "yarn-mscale"],
)
def test_rotary_equals_transformers(rope: dict[str, object]) -> None:
    values = LLAMA | {"max_position_embeddings": 64, "head_dim": 64, "rope_parameters": rope}
    config = transformers.LlamaConfig(**without(values, "architectures"))
    if rope["rope_type"] == "default":
        expected = config.rope_parameters["rope_theta"] ** -(torch.arange(0, 64, 2).float() / 64)
        scale = 1.0
    else:
        expected, scale = ROPE_INIT_FUNCTIONS[str(rope["rope_type"])](config)
    ours = build_rotary(ConfigReader(values=values), 64)
    torch.testing.assert_close(torch.tensor(ours.inv_freq), expected, rtol=1e-6, atol=0)
    assert ours.attention_scale == pytest.approx(scale)


def test_older_rope_fields_mean_the_same_as_newer_ones() -> None:
    scaling = without(LLAMA3_ROPE, "rope_type", "rope_theta")
    old = LLAMA | {"rope_theta": 10000.0, "rope_scaling": scaling | {"type": "llama3"}}
    assert describe_model(old) == describe_model(LLAMA | {"rope_parameters": LLAMA3_ROPE})


def test_older_neox_rotary_fields_are_read() -> None:
    config = {
        "architectures": ["GPTNeoXForCausalLM"],
        "hidden_size": 64,
        "num_attention_heads": 4,
        "rotary_pct": 0.5,
        "rotary_emb_base": 400,
    }
    rotary = describe_model(config).spec.rotary
    assert rotary is not None
    assert rotary.dim == 8
    assert rotary.inv_freq[1] == pytest.approx(1 / math.sqrt(math.sqrt(400)))
