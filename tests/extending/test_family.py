"""A family is one file and one line, and then decodes as transformers does."""

from pathlib import Path

import pytest
import torch
import transformers

from models.checkpoints import load_checkpoint
from models.decoder import Decoder
from models.families import FAMILIES, UnsupportedArchitectureError
from tests.extending.stablelm import describe_stablelm
from tests.models.test_parity import TOLERANCE, run
from tests.models.tiny_models import CONFIGS, GROUPED, make_model

ARCHITECTURE = "StableLmForCausalLM"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    config = GROUPED | {"partial_rotary_factor": 0.25, "use_qkv_bias": True}
    monkeypatch.setitem(CONFIGS, "stablelm", ("StableLmConfig", config))
    make_model("stablelm").save_pretrained(tmp_path)
    return tmp_path


def test_family_not_registered_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(UnsupportedArchitectureError, match="'StableLmForCausalLM' is not supp"):
        load_checkpoint(folder, quantization="none")


def test_family_of_one_file_and_one_line_equals_transformers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, ARCHITECTURE, describe_stablelm)
    expected_model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.randint(3, 96, (20,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = expected_model(ids[None]).logits[0]
    checkpoint = load_checkpoint(folder, quantization="none")
    decoder = Decoder(checkpoint.spec, checkpoint.weights, head="dense", num_threads=1)
    cache = decoder.make_cache(num_blocks=2, block_size=16, dtype=torch.float32)
    parts = [run(decoder, cache, ids[:15].tolist(), 0)]
    parts += [run(decoder, cache, [int(ids[i])], i) for i in range(15, 20)]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=TOLERANCE)
