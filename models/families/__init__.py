"""Read a Hugging Face config as a `DecoderSpec` and name the tensors that hold its weights."""

from collections.abc import Callable, Mapping

from models.families.description import ModelDescription, TensorSource
from models.families.errors import CheckpointError, UnsupportedArchitectureError
from models.families.gpt_neox import describe_gpt_neox
from models.families.llama import describe_llama, describe_mistral, describe_qwen2, describe_qwen3
from models.families.opt import describe_opt
from models.families.phi import describe_phi
from models.spec import SpecError

__all__ = [
    "FAMILIES",
    "CheckpointError",
    "ModelDescription",
    "TensorSource",
    "UnsupportedArchitectureError",
    "describe_model",
]

FAMILIES: Mapping[str, Callable[[Mapping[str, object]], ModelDescription]] = {
    "LlamaForCausalLM": describe_llama,
    "MistralForCausalLM": describe_mistral,
    "Qwen2ForCausalLM": describe_qwen2,
    "Qwen3ForCausalLM": describe_qwen3,
    "OPTForCausalLM": describe_opt,
    "PhiForCausalLM": describe_phi,
    "GPTNeoXForCausalLM": describe_gpt_neox,
}
_BY_MODEL_TYPE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "opt": "OPTForCausalLM",
    "phi": "PhiForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
}


def describe_model(config: Mapping[str, object]) -> ModelDescription:
    """Describe the model of a parsed config.json.

    Code that a checkpoint brings along (`auto_map`) is never run: an architecture listed in
    `FAMILIES` is built by this package, any other is refused.

    Args:
        config: the parsed config.json.

    Raises:
        UnsupportedArchitectureError: the architecture is not in `FAMILIES`.
        CheckpointError: a field is missing, contradictory or asks for what is not supported.
    """
    architecture = _architecture(config)
    if architecture not in FAMILIES:
        remote = ""
        if "auto_map" in config:
            remote = " (its auto_map asks to run code from the checkpoint, which is never done)"
        raise UnsupportedArchitectureError(
            f"config.json: architecture {architecture!r} is not supported{remote}; "
            f"supported: {', '.join(FAMILIES)}"
        )
    try:
        return FAMILIES[architecture](config)
    except SpecError as error:
        raise CheckpointError(f"config.json: {error}") from error


def _architecture(config: Mapping[str, object]) -> str:
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures:
        return str(architectures[0])
    model_type = config.get("model_type")
    if model_type is None:
        raise CheckpointError("config.json: neither architectures nor model_type is given")
    return _BY_MODEL_TYPE.get(str(model_type), str(model_type))
