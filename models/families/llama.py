"""LLaMA-like models: Llama, SmolLM, Mistral, Qwen2, Qwen3."""

from collections.abc import Mapping
from dataclasses import dataclass

from models.families.config_reader import ConfigReader
from models.families.description import ModelDescription, TensorSource
from models.families.errors import CheckpointError
from models.families.layout import activation_of, sources_of
from models.families.rotary import build_rotary
from models.spec import DecoderSpec, LayerSpec

_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
_MISTRAL = _LLAMA | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
_QWEN2 = _LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_QWEN3 = _QWEN2 | {"head_dim": 128}

LAYER_TENSORS: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Variant:
    family: str
    defaults: Mapping[str, object]
    biases: frozenset[str]
    qk_norm: bool = False
    window: int | None = None


def describe_llama(values: Mapping[str, object]) -> ModelDescription:
    """Describe a `LlamaForCausalLM`."""
    config = ConfigReader(values=values, defaults=_LLAMA)
    biases = set("qkvo") if config.flag("attention_bias") else set()
    biases |= {"gate", "up", "down"} if config.flag("mlp_bias") else set()
    return _describe(config, _Variant(family="llama", defaults=_LLAMA, biases=frozenset(biases)))


def describe_mistral(values: Mapping[str, object]) -> ModelDescription:
    """Describe a `MistralForCausalLM`; sequences longer than its attention window are refused."""
    window = values.get("sliding_window", 4096)
    if window is not None:
        window = ConfigReader(values={"sliding_window": window}).integer("sliding_window")
    config = ConfigReader(values=values, defaults=_MISTRAL)
    variant = _Variant(family="mistral", defaults=_MISTRAL, biases=frozenset(), window=window)
    return _describe(config, variant)


def describe_qwen2(values: Mapping[str, object]) -> ModelDescription:
    """Describe a `Qwen2ForCausalLM`."""
    config = ConfigReader(values=values, defaults=_QWEN2)
    variant = _Variant(
        family="qwen2", defaults=_QWEN2, biases=frozenset("qkv"), window=_qwen_window(config)
    )
    return _describe(config, variant)


def describe_qwen3(values: Mapping[str, object]) -> ModelDescription:
    """Describe a `Qwen3ForCausalLM`."""
    config = ConfigReader(values=values, defaults=_QWEN3)
    variant = _Variant(
        family="qwen3",
        defaults=_QWEN3,
        biases=frozenset("qkvo") if config.flag("attention_bias") else frozenset(),
        qk_norm=True,
        window=_qwen_window(config),
    )
    return _describe(config, variant)


def _qwen_window(config: ConfigReader) -> int | None:
    if not config.flag("use_sliding_window"):
        return None
    layer_types = config.get("layer_types")
    if isinstance(layer_types, list):
        is_used = "sliding_attention" in layer_types
    else:
        is_used = config.integer("max_window_layers", minimum=0) < config.integer(
            "num_hidden_layers"
        )
    return config.integer("sliding_window") if is_used else None


def _describe(config: ConfigReader, variant: _Variant) -> ModelDescription:
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    if config.get("head_dim") is None and hidden_size % num_heads:
        raise CheckpointError(
            f"config.json: hidden_size {hidden_size} is no multiple of "
            f"num_attention_heads {num_heads}"
        )
    has_head_dim = config.get("head_dim") is not None
    head_dim = config.integer("head_dim") if has_head_dim else hidden_size // num_heads
    has_kv_heads = config.get("num_key_value_heads") is not None
    layer = LayerSpec(
        num_attention_heads=num_heads,
        num_key_value_heads=config.integer("num_key_value_heads") if has_kv_heads else num_heads,
        head_dim=head_dim,
        intermediate_size=config.integer("intermediate_size"),
    )
    max_length = config.integer("max_position_embeddings")
    notes: tuple[str, ...] = ()
    if variant.window is not None and variant.window < max_length:
        notes = (
            f"the model attends to the last {variant.window} tokens only: sequences are limited "
            f"to {variant.window} tokens (max_position_embeddings is {max_length})",
        )
        max_length = variant.window
    spec = DecoderSpec(
        family=variant.family,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        max_position_embeddings=max_length,
        layers=(layer,) * config.integer("num_hidden_layers"),
        norm="rms",
        norm_eps=config.number("rms_norm_eps"),
        activation=activation_of(config, "hidden_act"),
        gated_mlp=True,
        rotary=build_rotary(config, head_dim),
        qk_norm=variant.qk_norm,
        tied_head=config.flag("tie_word_embeddings"),
    )
    top = {
        "embed": TensorSource(name="model.embed_tokens"),
        "final_norm": TensorSource(name="model.norm"),
        "head": TensorSource(name="lm_head"),
    }
    return ModelDescription(
        spec=spec,
        sources=sources_of(
            spec, top, "model.layers", LAYER_TENSORS, has_bias=lambda n: n in variant.biases
        ),
        head_module="lm_head",
        ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
        notes=notes,
    )
