"""OPT models with the norm before each block."""

from collections.abc import Mapping

from models.families.config_reader import ConfigReader
from models.families.description import ModelDescription, TensorSource
from models.families.errors import CheckpointError
from models.families.layout import activation_of, sources_of
from models.spec import DecoderSpec, LayerSpec

_DEFAULTS = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
    "num_attention_heads": 12,
    "activation_function": "relu",
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
}
_LAYER_TENSORS = {
    "attn_norm": "self_attn_layer_norm",
    "mlp_norm": "final_layer_norm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.out_proj",
    "up": "fc1",
    "down": "fc2",
}
_POSITIONS_OFFSET = 2
_NORM_EPS = 1e-5


def describe_opt(values: Mapping[str, object]) -> ModelDescription:
    """Describe an `OPTForCausalLM`.

    Raises:
        CheckpointError: the norm comes after each block, or embeddings are projected (OPT-350m).
    """
    config = ConfigReader(values=values, defaults=_DEFAULTS)
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    if not config.flag("do_layer_norm_before"):
        raise CheckpointError(
            "config.json: do_layer_norm_before false (OPT-350m: norm after each block) is not "
            "supported; every other OPT size is"
        )
    if config.get("word_embed_proj_dim") not in (None, hidden_size):
        raise CheckpointError(
            f"config.json: word_embed_proj_dim {config.get('word_embed_proj_dim')} differs from "
            f"hidden_size {hidden_size}; projected embeddings (OPT-350m) are not supported"
        )
    if not config.flag("layer_norm_elementwise_affine"):
        raise CheckpointError("config.json: layer_norm_elementwise_affine false is not supported")
    if hidden_size % num_heads:
        raise CheckpointError(
            f"config.json: hidden_size {hidden_size} is no multiple of "
            f"num_attention_heads {num_heads}"
        )
    layer = LayerSpec(
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=config.integer("ffn_dim"),
    )
    spec = DecoderSpec(
        family="opt",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        max_position_embeddings=config.integer("max_position_embeddings"),
        layers=(layer,) * config.integer("num_hidden_layers"),
        norm="layer",
        norm_eps=_NORM_EPS,
        activation=activation_of(config, "activation_function"),
        gated_mlp=False,
        learned_positions_offset=_POSITIONS_OFFSET,
        final_norm=not config.flag("_remove_final_layer_norm"),
        tied_head=config.flag("tie_word_embeddings"),
    )
    top = {
        "embed": TensorSource(name="model.decoder.embed_tokens"),
        "positions": TensorSource(name="model.decoder.embed_positions"),
        "final_norm": TensorSource(name="model.decoder.final_layer_norm"),
        "head": TensorSource(name="lm_head"),
    }
    has_bias = config.flag("enable_bias")
    return ModelDescription(
        spec=spec,
        sources=sources_of(
            spec,
            top,
            "model.decoder.layers",
            _LAYER_TENSORS,
            has_bias=lambda linear: has_bias and linear != "head",
        ),
        head_module="lm_head",
    )
