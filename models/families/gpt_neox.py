"""GPT-NeoX and Pythia: queries, keys and values of each head lie together in one matrix."""

from collections.abc import Mapping

from models.families.config_reader import ConfigReader
from models.families.description import ModelDescription, TensorSource
from models.families.errors import CheckpointError
from models.families.layout import activation_of, sources_of
from models.families.rotary import build_rotary
from models.spec import DecoderSpec, LayerSpec

_DEFAULTS = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "use_parallel_residual": True,
    "attention_bias": True,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
}


def describe_gpt_neox(values: Mapping[str, object]) -> ModelDescription:
    """Describe a `GPTNeoXForCausalLM`."""
    older = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
    renamed = {older[k]: v for k, v in values.items() if k in older and v is not None}
    config = ConfigReader(values=renamed | dict(values), defaults=_DEFAULTS)
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    if hidden_size % num_heads:
        raise CheckpointError(
            f"config.json: hidden_size {hidden_size} is no multiple of "
            f"num_attention_heads {num_heads}"
        )
    head_dim = hidden_size // num_heads
    layer = LayerSpec(
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=head_dim,
        intermediate_size=config.integer("intermediate_size"),
    )
    is_parallel = config.flag("use_parallel_residual")
    spec = DecoderSpec(
        family="gpt_neox",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        max_position_embeddings=config.integer("max_position_embeddings"),
        layers=(layer,) * config.integer("num_hidden_layers"),
        norm="layer",
        norm_eps=config.number("layer_norm_eps"),
        activation=activation_of(config, "hidden_act"),
        gated_mlp=False,
        rotary=build_rotary(config, head_dim),
        residual="parallel" if is_parallel else "sequential",
        tied_head=config.flag("tie_word_embeddings"),
    )
    layer_tensors: dict[str, str | TensorSource] = {
        "attn_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "o": "attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    }
    for part, linear in enumerate("qkv"):
        starts = [(3 * head + part) * head_dim for head in range(num_heads)]
        rows = tuple(row for start in starts for row in range(start, start + head_dim))
        layer_tensors[linear] = TensorSource(name="attention.query_key_value", rows=rows)
    top = {
        "embed": TensorSource(name="gpt_neox.embed_in"),
        "final_norm": TensorSource(name="gpt_neox.final_layer_norm"),
        "head": TensorSource(name="embed_out"),
    }
    attention_bias = config.flag("attention_bias")

    def has_bias(linear: str) -> bool:
        return linear in ("up", "down") or (linear in "qkvo" and attention_bias)

    return ModelDescription(
        spec=spec,
        sources=sources_of(spec, top, "gpt_neox.layers", layer_tensors, has_bias=has_bias),
        head_module="embed_out",
        ignored=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    )
