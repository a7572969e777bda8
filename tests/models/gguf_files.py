"""GGUF files of tiny models, in any type of tensor, written as llama.cpp's converter does."""

import json
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from models.checkpoints import Checkpoint
from models.checkpoints.assembly import assemble_weights
from models.checkpoints.origins import open_gguf
from models.weights import BLOCK_FORMATS, QuantizedBlocks

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["1 2", "12 3", "a b"]
TOKENS = [*SPECIALS, *sorted(ByteLevel.alphabet()), "12", "123", "ab"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers.": "blk.",
}
Metadata = dict[str, object]


def metadata(**changes: object) -> Metadata:
    return {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": TOKENS,
        "token_type": [3] * 3 + [1] * (len(TOKENS) - 3),
        "merges": MERGES,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 2,
        "unknown_token_id": 0,
    } | changes


def interleave(tensor: Tensor, num_heads: int) -> Tensor:
    """Reorder rows as llama.cpp's converter does."""
    halves = tensor.view(num_heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def write_gguf(
    path: Path, folder: Path, *, kinds: Sequence[str] = ("F32",),
    rope_factors: Tensor | None = None, tensors_per_part: int = 0, **changes: object,
) -> Path:  # fmt: skip
    """Write a Hugging Face folder as GGUF; its matrices take the types `kinds` in turn."""
    config = json.loads((folder / "config.json").read_text())
    arch = config["model_type"]
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=tensors_per_part)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(
        config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    )
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_chat_template(TEMPLATE)
    fields = metadata(**changes)
    writer.add_tokenizer_model(str(fields["model"]))
    writer.add_tokenizer_pre(str(fields["pre"]))
    writer.add_token_list(fields["tokens"])
    writer.add_token_types(fields["token_type"])
    writer.add_token_merges(fields["merges"])
    writer.add_bos_token_id(fields["bos_token_id"])
    writer.add_eos_token_id(fields["eos_token_id"])
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.numpy())
    turns = cycle(kinds)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in load_file(folder / "model.safetensors").items():
        linear = name.split(".")[-2]
        stored = (
            interleave(tensor, heads[linear]) if arch == "llama" and linear in heads else tensor
        )
        new_name = name
        for old, new in NAMES.items():
            new_name = new_name.replace(old, new)
        kind = next(turns) if tensor.ndim == 2 else "F32"
        writer.add_tensor(new_name, stored_as(stored, kind), raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored_as(tensor: Tensor, kind: str) -> np.ndarray:
    """Return the bytes of a tensor in a type; where nothing here rounds to it, of random codes."""
    if kind == "F32":
        return tensor.numpy()
    if kind == "F16":
        return tensor.half().numpy()
    if kind in ("Q4_K", "Q5_K", "Q6_K", "IQ4_NL"):
        return random_blocks(*tensor.shape, kind).data.numpy()
    return gguf.quants.quantize(tensor.numpy(), GGMLQuantizationType[kind])


def random_blocks(out_features: int, in_features: int, kind: str) -> QuantizedBlocks:
    """Return a seeded matrix of random codes, whose values are of a usual size."""
    values, size = BLOCK_FORMATS[kind]
    generator = torch.Generator().manual_seed(out_features + in_features)
    shape = (out_features, in_features // values * size)
    data = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    blocks = QuantizedBlocks(data=data, kind=kind)
    largest = {"Q4_K": 1e3, "Q5_K": 2e3, "Q6_K": 4e3, "Q8_0": 128.0, "IQ4_NL": 128.0}.get(
        kind, 16.0
    )
    scales = torch.rand(blocks.scales.shape, generator=generator) * 0.2 / largest
    return with_scales(blocks, scales.half())


def with_scales(blocks: QuantizedBlocks, scales: Tensor) -> QuantizedBlocks:
    """Return blocks with other scales, (out_features, N) float16."""
    values, size = BLOCK_FORMATS[blocks.kind]
    count = scales.shape[1] * values // blocks.shape[1]
    first = 208 if blocks.kind == "Q6_K" else 0
    data = blocks.data.clone().view(len(blocks.data), -1, size)
    fields = scales.view(torch.uint8).view(len(data), -1, 2 * count)
    data[:, :, first : first + 2 * count] = fields
    return QuantizedBlocks(data=data.view(len(data), -1), kind=blocks.kind)


def load_kept(source: Path) -> Checkpoint:
    """Load a file with its own codes, without the process that converts its tokenizer."""
    opened = open_gguf(source)
    return Checkpoint(
        spec=opened.description.spec,
        weights=assemble_weights(opened.description, opened.reader, opened.path),
        folder=source.parent,
        weights_folder=source.parent,
        name=source.stem,
        quantization="gguf",
    )
