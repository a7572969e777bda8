"""Phi-1, Phi-1.5 and Phi-2: attention and MLP side by side under one norm."""

from collections.abc import Mapping

from models.families.config_reader import ConfigReader
from models.families.description import ModelDescription, TensorSource
from models.families.errors import CheckpointError
from models.families.layout import activation_of, sources_of
from models.families.rotary import build_rotary
from models.spec import DecoderSpec, LayerSpec

_DEFAULTS = {
    "vocab_size": 51200,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "hidden_act": "gelu_new",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.dense",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}


def describe_phi(values: Mapping[str, object]) -> ModelDescription:
    """Describe a `PhiForCausalLM`.

    Raises:
        CheckpointError: a field is wrong, or `qk_layernorm` is set.
    """
    config = ConfigReader(values=values, defaults=_DEFAULTS)
    if config.flag("qk_layernorm"):
        raise CheckpointError("config.json: qk_layernorm true is not supported")
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    if hidden_size % num_heads:
        raise CheckpointError(
            f"config.json: hidden_size {hidden_size} is no multiple of "
            f"num_attention_heads {num_heads}"
        )
    has_kv_heads = config.get("num_key_value_heads") is not None
    layer = LayerSpec(
        num_attention_heads=num_heads,
        num_key_value_heads=config.integer("num_key_value_heads") if has_kv_heads else num_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=config.integer("intermediate_size"),
    )
    spec = DecoderSpec(
        family="phi",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        max_position_embeddings=config.integer("max_position_embeddings"),
        layers=(layer,) * config.integer("num_hidden_layers"),
        norm="layer",
        norm_eps=config.number("layer_norm_eps"),
        activation=activation_of(config, "hidden_act"),
        gated_mlp=False,
        rotary=build_rotary(config, layer.head_dim),
        residual="parallel",
        shared_norm=True,
        tied_head=config.flag("tie_word_embeddings"),
    )
    top = {
        "embed": TensorSource(name="model.embed_tokens"),
        "final_norm": TensorSource(name="model.final_layernorm"),
        "head": TensorSource(name="lm_head"),
    }
    return ModelDescription(
        spec=spec,
        sources=sources_of(spec, top, "model.layers", _LAYER_TENSORS, has_bias=lambda _: True),
        head_module="lm_head",
        ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    )
