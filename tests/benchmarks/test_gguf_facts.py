"""Sizes are read from the header of a GGUF file."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from benchmarks.gguf_facts import read_facts

VOCABULARY, WIDTH, LAYERS = 48, 64, 2
Q4_0_BYTES = 18 / 32  # of a number


def write_model(path: Path, *, has_head: bool) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    shapes = {"token_embd": (VOCABULARY, WIDTH)} | (
        {"output": (VOCABULARY, WIDTH)} if has_head else {}
    )
    shapes |= {f"blk.{i}.attn_q": (WIDTH, WIDTH) for i in range(LAYERS)}
    for name, shape in shapes.items():
        codes = quantize(np.ones(shape, dtype=np.float32), GGMLQuantizationType.Q4_0)
        writer.add_tensor(f"{name}.weight", codes, raw_dtype=GGMLQuantizationType.Q4_0)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("has_head", [False, True], ids=["tied", "with a head"])
def test_facts_count_what_a_token_reads(has_head: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, has_head=has_head)
    facts = read_facts(path)
    embedding, layers = VOCABULARY * WIDTH, LAYERS * WIDTH * WIDTH
    assert facts.num_parameters == embedding * (1 + has_head) + layers + WIDTH
    # The head once, whether or not it is the embedding.
    assert facts.weight_bytes_per_token == (embedding + layers) * Q4_0_BYTES + 4 * WIDTH
    assert facts.cache_bytes_per_token == LAYERS * 2 * 2 * 16 * 2
    assert facts.file_bytes == path.stat().st_size
