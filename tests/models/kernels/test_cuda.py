"""The CUDA executor against the reference. Only on a machine with a CUDA device."""

import pytest
import torch

from models.decoder import Decoder
from tests.models.kernels.random_decoders import KINDS, make_decoder_parts, pack_batch

pytestmark = pytest.mark.gpu
SEQUENCES = [[(7 * i + 3 * s) % 100 for i in range(n)] for s, n in enumerate((37, 5, 64))]
TABLES = [[3, 1, 5, 7], [0, 9, 9, 9], [2, 4, 6, 8]]


@pytest.mark.parametrize("is_quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_decoder_equals_reference(kind: str, is_quantized: bool) -> None:
    spec, weights = make_decoder_parts(kind, is_quantized=is_quantized)
    results = []
    for kernels, device in (("cuda", "cuda"), ("reference", "cpu")):
        decoder = Decoder(spec, weights, kernels=kernels, device=device, head="dense")  # type: ignore[arg-type]
        cache = decoder.make_cache(num_blocks=12, dtype=torch.float32)
        steps = [[(0, 30), (0, 3), (0, 62)], [(30, 31), (3, 4), (62, 63)],
                 [(31, 32), (4, 5), (63, 64)]]  # fmt: skip
        logits = [decoder.forward(pack_batch(SEQUENCES, TABLES, spans), cache) for spans in steps]
        results.append(torch.cat(logits).cpu())
    error = (results[0] - results[1]).std() / results[1].std()
    assert error < 0.02  # bfloat16 operands


def test_cuda_decode_graph_replays_for_other_batches() -> None:
    spec, weights = make_decoder_parts("llama", is_quantized=True)
    decoder = Decoder(spec, weights, kernels="cuda", device="cuda")
    cache = decoder.make_cache(num_blocks=12, dtype=torch.float32)
    decoder.forward(pack_batch(SEQUENCES, TABLES, [(0, 30), (0, 3), (0, 62)]), cache)
    three = decoder.forward(pack_batch(SEQUENCES, TABLES, [(30, 31), (3, 4), (62, 63)]), cache)
    two = decoder.forward(pack_batch(SEQUENCES[:2], TABLES[:2], [(30, 31), (3, 4)]), cache)
    torch.testing.assert_close(two, three[:2], rtol=0.02, atol=0.02)
