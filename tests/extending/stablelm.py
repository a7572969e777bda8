"""A model family in one file: StableLM, layer norms around a gated MLP and a part-rotated head."""

from collections.abc import Mapping

from models.families.config_reader import ConfigReader
from models.families.description import ModelDescription, TensorSource
from models.families.layout import activation_of, sources_of
from models.families.rotary import build_rotary
from models.spec import DecoderSpec, LayerSpec

_DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "layer_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "use_qkv_bias": False,
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def describe_stablelm(values: Mapping[str, object]) -> ModelDescription:
    """Describe a `StableLmForCausalLM`."""
    config = ConfigReader(values=values, defaults=_DEFAULTS)
    num_heads = config.integer("num_attention_heads")
    layer = LayerSpec(
        num_attention_heads=num_heads,
        num_key_value_heads=config.integer("num_key_value_heads"),
        head_dim=config.integer("hidden_size") // num_heads,
        intermediate_size=config.integer("intermediate_size"),
    )
    spec = DecoderSpec(
        family="stablelm",
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        max_position_embeddings=config.integer("max_position_embeddings"),
        layers=(layer,) * config.integer("num_hidden_layers"),
        norm="layer",
        norm_eps=config.number("layer_norm_eps"),
        activation=activation_of(config, "hidden_act"),
        gated_mlp=True,
        rotary=build_rotary(config, layer.head_dim),
        tied_head=config.flag("tie_word_embeddings"),
    )
    top = {
        "embed": TensorSource(name="model.embed_tokens"),
        "final_norm": TensorSource(name="model.norm"),
        "head": TensorSource(name="lm_head"),
    }
    has_bias = config.flag("use_qkv_bias")
    return ModelDescription(
        spec=spec,
        sources=sources_of(
            spec, top, "model.layers", _LAYER_TENSORS,
            has_bias=lambda linear: has_bias and linear in "qkv",
        ),
        head_module="lm_head",
        ignored=(),
    )  # fmt: skip
