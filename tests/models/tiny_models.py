"""Tiny random models of every family, made by transformers."""

import torch
import transformers

TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = TINY | {"intermediate_size": 128, "num_key_value_heads": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "llama-biased": ("LlamaConfig", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("LlamaConfig", GROUPED | {"head_dim": 24, "hidden_act": "gelu"}),
    "llama3-rope": ("LlamaConfig", GROUPED | {"rope_parameters": LLAMA3_ROPE}),
    "linear-rope": (
        "LlamaConfig",
        GROUPED
        | {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "yarn-rope": ("LlamaConfig", GROUPED | {"rope_parameters": YARN_ROPE}),
    "smollm": (
        "LlamaConfig",
        GROUPED
        | {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "hidden_size": 96,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
    ),
    "mistral": ("MistralConfig", GROUPED | {"sliding_window": None}),
    "mistral-window": ("MistralConfig", GROUPED | {"sliding_window": 32}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 32, "tie_word_embeddings": True}),
    "opt": ("OPTConfig", TINY | {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "opt-plain": (
        "OPTConfig",
        TINY
        | {
            "ffn_dim": 128,
            "word_embed_proj_dim": 64,
            "enable_bias": False,
            "activation_function": "gelu",
        },
    ),
    "phi": ("PhiConfig", TINY | {"intermediate_size": 128}),
    "phi-quarter": (
        "PhiConfig",
        TINY
        | {
            "intermediate_size": 128,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500.0,
                "partial_rotary_factor": 0.25,
            },
        },
    ),
    "neox-parallel": ("GPTNeoXConfig", TINY | {"intermediate_size": 128}),
    "neox-sequential": (
        "GPTNeoXConfig",
        TINY | {"intermediate_size": 128, "use_parallel_residual": False},
    ),
    "neox-unbiased": (
        "GPTNeoXConfig",
        TINY | {"intermediate_size": 128, "attention_bias": False, "tie_word_embeddings": True},
    ),
}


def make_model(name: str, **changes: object) -> transformers.PreTrainedModel:
    """Build a model of `CONFIGS` with random norms and biases too, seeded."""
    config_class, values = CONFIGS[name]
    config = getattr(transformers, config_class)(**(values | changes))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:
                centre = 1.0 if "norm" in key and key.endswith("weight") else 0.0
                parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.08 * torch.randn_like(parameter))
    return model.eval()
