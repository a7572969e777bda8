"""See a LLaMA-like GGUF file as a Hugging Face checkpoint: its config, and its tensors by name."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from models.checkpoints.gguf_file import GgufFile
from models.families import CheckpointError, UnsupportedArchitectureError
from models.families.llama import LAYER_TENSORS
from models.families.rotary import llama3_frequencies
from models.weights import QuantizedBlocks

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_TOP_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "attn_norm",
    "ffn_norm": "mlp_norm",
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_output": "o",
    "attn_q_norm": "q_norm",
    "attn_k_norm": "k_norm",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}
_COMPACT_ROWS = 4096  # rows at a time, which bounds the float32 copies
_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA3_FACTORS = (8.0, 32.0)


class GgufModel:
    """A GGUF file under Hugging Face names.

    Attributes:
        file: the open file.
        shapes: shape of each tensor by its Hugging Face name.
    """

    file: GgufFile
    shapes: Mapping[str, tuple[int, ...]]

    def __init__(self, file: GgufFile) -> None:
        """Check the architecture and rename the tensors.

        Raises:
            UnsupportedArchitectureError: the file holds another kind of model.
        """
        self.file = file
        self.architecture = str(file.metadata.get("general.architecture"))
        if self.architecture not in _ARCHITECTURES:
            raise UnsupportedArchitectureError(
                f"{file.path}: GGUF architecture {self.architecture!r} is not supported; "
                f"supported: {', '.join(_ARCHITECTURES)}"
            )
        self._stored = {
            _hugging_face_name(name): name for name in file.tensors if name != _ROPE_FACTORS
        }
        self.shapes = {name: file.tensors[old].shape for name, old in self._stored.items()}

    def _field(self, name: str, default: object = None) -> object:
        return self.file.metadata.get(f"{self.architecture}.{name}", default)

    def _integer(self, name: str, default: int | None = None) -> int:
        value = self._field(name, default)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"{self.file.path}: {self.architecture}.{name} must be a positive integer, "
                f"got {value!r}"
            )
        return value

    @cached_property
    def num_heads(self) -> int:
        """Query heads of each layer."""
        return self._integer("attention.head_count")

    @cached_property
    def num_kv_heads(self) -> int:
        """Key heads of each layer."""
        return self._integer("attention.head_count_kv", self.num_heads)

    @cached_property
    def head_dim(self) -> int:
        """Width of one head."""
        return self._integer(
            "attention.key_length", self._integer("embedding_length") // self.num_heads
        )

    def config(self) -> dict[str, object]:
        """Return the config.json of the model, without dtype and special tokens.

        Raises:
            CheckpointError: a field is missing or asks for what is not supported.
        """
        if self._field("expert_count", 0):
            raise UnsupportedArchitectureError(
                f"{self.file.path}: mixtures of experts are not supported"
            )
        rotated = self._integer("rope.dimension_count", self.head_dim)
        if rotated != self.head_dim:
            raise CheckpointError(
                f"{self.file.path}: {rotated} rotated channels of {self.head_dim} per head are not "
                f"supported for {self.architecture}"
            )
        if "model.embed_tokens.weight" not in self.shapes:
            raise CheckpointError(f"{self.file.path}: missing tensor token_embd.weight")
        config: dict[str, object] = {
            "architectures": [_ARCHITECTURES[self.architecture]],
            "model_type": self.architecture,
            "vocab_size": self.shapes["model.embed_tokens.weight"][0],
            "hidden_size": self._integer("embedding_length"),
            "intermediate_size": self._integer("feed_forward_length"),
            "num_hidden_layers": self._integer("block_count"),
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self._integer("context_length"),
            "rms_norm_eps": _shortest(self._field("attention.layer_norm_rms_epsilon")),
            "hidden_act": "silu",
            "rope_parameters": self._rope_parameters(),
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
        }
        if self.architecture == "llama":
            first = "model.layers.0."
            config["attention_bias"] = f"{first}self_attn.q_proj.bias" in self.shapes
            config["mlp_bias"] = f"{first}mlp.up_proj.bias" in self.shapes
        return config

    def _rope_parameters(self) -> dict[str, object]:
        theta = _shortest(self._field("rope.freq_base", 10000.0))
        base: dict[str, object] = {"rope_type": "default", "rope_theta": theta}
        kind = self._field("rope.scaling.type", "none")
        factor = _shortest(
            self._field("rope.scaling.factor", self._field("rope.scale_linear", 1.0))
        )
        if _ROPE_FACTORS in self.file.tensors:
            return base | self._llama3_scaling(theta)
        if kind == "yarn":
            original = self._integer("rope.scaling.original_context_length")
            return base | {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
            }
        if kind == "linear" or (kind == "none" and factor != 1.0):
            return base | {"rope_type": "linear", "factor": factor}
        if kind != "none":
            raise CheckpointError(f"{self.file.path}: rope scaling {kind!r} is not supported")
        return base

    def _llama3_scaling(self, theta: float) -> dict[str, object]:
        stored = self.file.read(_ROPE_FACTORS).float()
        inv_freq = theta ** -(torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        for factor in _LLAMA3_FACTORS:
            scaled = llama3_frequencies(
                inv_freq,
                factor=factor,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_length=8192,
            )
            if stored.shape == inv_freq.shape and torch.allclose(
                inv_freq / scaled, stored, rtol=1e-3
            ):
                return _LLAMA3_SCALING | {"factor": factor}
        raise CheckpointError(
            f"{self.file.path}: {_ROPE_FACTORS} is not the scaling of Llama 3.1 or 3.2; "
            "no other is supported"
        )

    def foreign_type(self, name: str) -> str | None:
        """Name the type that a tensor is stored in, if it is not read as 16- or 32-bit floats."""
        return self.file.foreign_type(self._stored[name])

    def read(self, name: str) -> Tensor:
        """Return a tensor with exact values, its rows in Hugging Face's order."""
        tensor = self.file.read(self._stored[name])
        heads = self._heads_of(name)
        return tensor if heads is None else _undo_rotary_interleave(tensor, heads)

    def read_stored(self, name: str) -> Tensor | QuantizedBlocks:
        """Return a tensor as it is stored, its rows in Hugging Face's order.

        It is mapped from the file, but for rows that lie in another order there.
        """
        stored, heads = self.file.read_stored(self._stored[name]), self._heads_of(name)
        if heads is None:
            return stored
        if isinstance(stored, Tensor):
            return _undo_rotary_interleave(stored, heads)
        return replace(stored, data=_undo_rotary_interleave(stored.data, heads))

    @property
    def has_blocks(self) -> bool:
        """Whether some tensors are in a block format."""
        return any(map(self.file.is_packed, self._stored.values()))

    def _heads_of(self, name: str) -> int | None:
        """Return the heads of a tensor whose rows are in llama.cpp's order, else None."""
        heads = {"q_proj": self.num_heads, "k_proj": self.num_kv_heads}
        return heads.get(name.split(".")[-2]) if self.architecture == "llama" else None

    def read_compact(self, name: str) -> Tensor:
        """Return a tensor for storing: block formats in 16 bits, whichever kind errs least."""
        stored = self._stored[name]
        if not self.file.is_packed(stored):
            return self.read(name)
        if self.shapes[name][0] <= _COMPACT_ROWS or self._heads_of(name):
            return _narrow([self.read(name)])
        starts = range(0, self.shapes[name][0], _COMPACT_ROWS)
        stops = (min(s + _COMPACT_ROWS, self.shapes[name][0]) for s in starts)
        parts = (self.file.read(stored, range(a, b)) for a, b in zip(starts, stops, strict=True))
        return _narrow(parts)


def _hugging_face_name(name: str) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in _LAYER_NAMES:
        module = LAYER_TENSORS[_LAYER_NAMES[match[2]]]
        return f"model.layers.{match[1]}.{module}.{match[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{_TOP_TENSORS[stem]}.{kind}" if stem in _TOP_TENSORS else name


def _narrow(parts: Iterable[Tensor]) -> Tensor:
    """Join float32 rows as float16, or as bfloat16 if that errs less."""
    halves, brains, half_error, brain_error = [], [], 0.0, 0.0
    for part in parts:
        halves.append(part.half())
        brains.append(part.bfloat16())
        half_error = max(half_error, float((halves[-1] - part).abs().max()))
        brain_error = max(brain_error, float((brains[-1] - part).abs().max()))
    return torch.cat(halves if half_error <= brain_error else brains)


def _undo_rotary_interleave(tensor: Tensor, num_heads: int) -> Tensor:
    """Put rotated pairs half a head apart again; llama.cpp stores them side by side."""
    pairs = tensor.view(num_heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()


def _shortest(value: object) -> float:
    """Return the shortest decimal that rounds to the same float32: 1e-05, not 9.9999997e-06."""
    if not isinstance(value, int | float):
        raise CheckpointError(f"a GGUF number is missing or has another type: {value!r}")
    exact = torch.tensor(float(value), dtype=torch.float32)
    for digits in range(1, 10):
        candidate = float(f"{float(value):.{digits}g}")
        if torch.tensor(candidate, dtype=torch.float32) == exact:
            return candidate
    return float(value)
