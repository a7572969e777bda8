"""The demo model's decoder against transformers, on real prompts."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from models.checkpoints import Checkpoint, load_checkpoint
from models.decoder import Decoder
from models.weights import Quantized4Bit
from tests.models.kernels.random_decoders import pack_batch

pytestmark = pytest.mark.model

PROMPTS = (
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "In 1969, 3 men flew 384400 km; the caf\u00e9 \u00e0 la carte said \u2018na\u00efve\u2019.",
)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return load_checkpoint(None, quantization="nf4", report=print)


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    """Logits of transformers' own Llama, in float32, with the weights that the codes stand for."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint.folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = {}
    for name, weight in checkpoint.weights.items():
        dense = weight.dequantize() if isinstance(weight, Quantized4Bit) else weight
        assert isinstance(dense, Tensor)
        state[_hugging_face_name(name)] = dense.float()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    with torch.inference_mode():
        return [model(torch.tensor([ids])).logits[0] for ids in _token_ids(checkpoint.folder)]


def _hugging_face_name(name: str) -> str:
    if name == "embed.weight":
        return "model.embed_tokens.weight"
    if name == "final_norm.weight":
        return "model.norm.weight"
    _, layer, module, _ = name.split(".")
    block = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}.get(module)
    if block is None:
        part = "self_attn" if module in "qkvo" else "mlp"
        block = f"{part}.{module}_proj"
    return f"model.layers.{layer}.{block}.weight"


def _token_ids(folder: Path) -> Iterator[list[int]]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for prompt in PROMPTS:
        yield tokenizer.encode(prompt, add_special_tokens=False).ids


def _run(decoder: Decoder, token_ids: list[int], dtype: torch.dtype) -> Tensor:
    """Logits of all tokens: the first half as a prompt, then one token a step."""
    cache = decoder.make_cache(num_blocks=8, dtype=dtype)
    half, table = len(token_ids) // 2, [[*range(8)]]
    spans = [(0, half), *((i, i + 1) for i in range(half, len(token_ids)))]
    return torch.cat([decoder.forward(pack_batch([token_ids], table, [s]), cache) for s in spans])


def test_demo_model_in_float32_equals_transformers(
    checkpoint: Checkpoint, expected: list[Tensor]
) -> None:
    weights = {
        name: weight.dequantize() if isinstance(weight, Quantized4Bit) else weight
        for name, weight in checkpoint.weights.items()
    }
    decoder = Decoder(checkpoint.spec, weights, head="dense")
    for token_ids, logits in zip(_token_ids(checkpoint.folder), expected, strict=True):
        actual = _run(decoder, token_ids, torch.float32)
        torch.testing.assert_close(actual, logits, rtol=0, atol=2e-3)
        assert torch.equal(actual.argmax(-1), logits.argmax(-1))


def test_demo_model_in_4_bits_equals_transformers_with_the_same_values(
    checkpoint: Checkpoint, expected: list[Tensor]
) -> None:
    decoder = Decoder(checkpoint.spec, checkpoint.weights, head="dense")
    for token_ids, logits in zip(_token_ids(checkpoint.folder), expected, strict=True):
        actual = _run(decoder, token_ids, torch.float16)
        error = (actual - logits).std() / logits.std()
        assert error < 5e-3
        surprise = torch.nn.functional.cross_entropy
        targets = torch.tensor(token_ids[1:])
        ours, theirs = surprise(actual[:-1], targets), surprise(logits[:-1], targets)
        assert abs(ours - theirs) < 1e-2
