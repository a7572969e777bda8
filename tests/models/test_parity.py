"""Our decoder against transformers, through a saved folder: prefill and cached decode."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from models.batch import PackedBatch
from models.checkpoints import load_checkpoint
from models.decoder import Decoder
from models.kernels.native.executor import is_native_available
from models.kv_cache import KVCache
from tests.models.tiny_models import CONFIGS

TOLERANCE = 1e-4
LENGTH = 28
PREFILL = 21


def run(decoder: Decoder, cache: KVCache, token_ids: list[int], start: int) -> Tensor:
    count = len(token_ids)
    num_blocks = -(-(start + count) // cache.block_size)
    batch = PackedBatch(
        token_ids=torch.tensor(token_ids, dtype=torch.int32),
        positions=torch.arange(start, start + count, dtype=torch.int32),
        query_starts=torch.tensor([0, count], dtype=torch.int32),
        context_lens=torch.tensor([start + count], dtype=torch.int32),
        block_tables=torch.arange(num_blocks, dtype=torch.int32)[None],
        output_rows=torch.arange(count, dtype=torch.int32),
    )
    return decoder.forward(batch, cache)


@pytest.mark.parametrize("kernels", ["reference", "native"])
@pytest.mark.parametrize("name", CONFIGS)
def test_decoder_equals_transformers(
    name: str, kernels: str, tiny_folder: Callable[..., Path]
) -> None:
    if kernels == "native" and not is_native_available("auto"):
        pytest.skip("no native kernels for this processor")
    folder = tiny_folder(name)
    expected_model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    token_ids = torch.randint(3, 96, (LENGTH,), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = expected_model(token_ids[None]).logits[0]
    checkpoint = load_checkpoint(folder, quantization="none")
    decoder = Decoder(checkpoint.spec, checkpoint.weights, kernels=kernels, head="dense")
    cache = decoder.make_cache(num_blocks=8, block_size=16, dtype=torch.float32)
    ids = token_ids.tolist()
    parts = [run(decoder, cache, ids[:PREFILL], 0)]
    parts += [run(decoder, cache, [ids[i]], i) for i in range(PREFILL, LENGTH)]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=TOLERANCE)
