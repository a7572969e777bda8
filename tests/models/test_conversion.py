import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

from models.checkpoints import (
    CheckpointError,
    conversion,
    load_checkpoint,
    quantize_checkpoint,
    tokenizer_files,
)
from models.weights import Quantized4Bit, Weight, dense
from tests.models.tiny_models import make_model

FAMILIES = ["llama", "smollm", "qwen2", "qwen3", "opt", "phi", "neox-parallel", "neox-unbiased"]
FORMATS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]


def reference_folder(name: str, folder: Path, kind: str, double_quant: bool) -> Path:
    """Quantise the same model with transformers and bitsandbytes."""
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double_quant
    )
    source = folder / "source"
    make_model(name).save_pretrained(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=settings, dtype="auto"
    )
    model.save_pretrained(folder / "reference")
    return folder / "reference"


@pytest.mark.parametrize(
    ("name", "kind", "double_quant"),
    [(name, "nf4", True) for name in FAMILIES] + [("llama", *rest) for rest in FORMATS],
    ids=lambda value: {True: "double", False: "single"}.get(value, value),
)
def test_tensors_equal_those_that_transformers_writes(
    name: str, kind: str, double_quant: bool, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="transformers needs it to quantise")
    output = tmp_path / "ours"
    quantize_checkpoint(tiny_folder(name), output, double_quant=double_quant, quant_type=kind)
    reference = reference_folder(name, tmp_path, kind, double_quant)
    ours, theirs = load_file(output / "model.safetensors"), load_file(reference / MODEL)
    assert set(ours) == set(theirs)
    assert not [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert load_checkpoint(reference).fingerprint == load_checkpoint(output).fingerprint


MODEL = "model.safetensors"


@pytest.mark.parametrize("name", FAMILIES)
def test_output_loads_in_transformers(
    name: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="transformers needs it to load 4-bit models")
    quantize_checkpoint(tiny_folder(name), tmp_path / "out", double_quant=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    kinds = [type(module).__name__ for module in model.modules()]
    assert kinds.count("Linear") == 1
    assert "Linear4bit" in kinds
    # In eval mode bitsandbytes repacks on processors with AVX512_BF16, and fails at widths that are
    # no multiple of its block, as these are.
    model.train()
    with torch.no_grad():
        assert model(torch.arange(3, 12)[None]).logits.isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("kind", "double_quant"), FORMATS, ids=str)
def test_loaded_weights_are_near_the_dense_ones(
    name: str, kind: str, double_quant: bool, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    source = load_checkpoint(tiny_folder(name), quantization="none")
    quantize_checkpoint(
        tiny_folder(name), tmp_path / "out", quant_type=kind, double_quant=double_quant
    )
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.quantization == kind
    assert set(loaded.weights) == set(source.weights)
    for key, weight in loaded.weights.items():
        exact = dense(source.weights[key])
        if isinstance(weight, Quantized4Bit):
            assert (dense(weight) - exact).norm() / exact.norm() < 0.15, key
        else:
            assert torch.equal(dense(weight), exact), key


def test_fused_queries_stay_quantised(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    quantize_checkpoint(tiny_folder("neox-parallel"), tmp_path / "out")
    weights = load_checkpoint(tmp_path / "out").weights
    assert all(isinstance(weights[f"layers.0.{part}.weight"], Quantized4Bit) for part in "qkv")


def test_large_model_is_written_in_shards(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_checkpoint(tiny_folder("llama"), tmp_path / "one")
    monkeypatch.setattr(conversion, "_SHARD_BYTES", 40_000)
    quantize_checkpoint(tiny_folder("llama"), tmp_path / "many")
    names = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(names) > 1
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    one, many = (load_checkpoint(tmp_path / name).fingerprint for name in ("one", "many"))
    assert one == many


def test_output_is_readable_by_others(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    quantize_checkpoint(tiny_folder("llama"), tmp_path / "out")
    assert os.stat(tmp_path / "out" / MODEL).st_mode & 0o777 == 0o644


def test_tokenizer_and_settings_are_carried_over(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    make_model("llama").save_pretrained(source)
    config = json.loads((source / "config.json").read_text()) | {"auto_map": {"AutoModel": "x.Y"}}
    (source / "config.json").write_text(json.dumps(config))
    Tokenizer(models.BPE()).save(str(source / "tokenizer.json"))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "modeling_x.py").write_text("raise SystemExit")
    quantize_checkpoint(source, tmp_path / "out", double_quant=True)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        "config.json",
        "generation_config.json",
        "chat_template.jinja",
        "tokenizer.json",
        MODEL,
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in config
    assert config["quantization_config"]["bnb_4bit_use_double_quant"] is True


def test_odd_widths_are_noted(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    lines: list[str] = []
    quantize_checkpoint(tiny_folder("smollm"), tmp_path / "out", report=lines.append)
    assert any("input widths [96] are no multiples of 64" in line for line in lines)


def test_folder_in_use_is_refused(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        quantize_checkpoint(tiny_folder("llama"), tmp_path)


def test_unwritable_output_is_refused(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"out: cannot be written"):
        quantize_checkpoint(tiny_folder("llama"), tmp_path / "file" / "out")


def test_quantised_source_is_refused(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    quantize_checkpoint(tiny_folder("llama"), tmp_path / "once")
    with pytest.raises(CheckpointError, match="is quantised to 4 bits already"):
        quantize_checkpoint(tmp_path / "once", tmp_path / "twice")


def with_gpt2_tokenizer(source: Path) -> Path:
    make_model("opt").save_pretrained(source)
    vocabulary = ["<s>", "<pad>", "</s>", "a", "b", "ab"]
    ids = json.dumps({token: i for i, token in enumerate(vocabulary)})
    (source / "vocab.json").write_text(ids)
    (source / "merges.txt").write_text("#version: 0.2\na b\n")
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    return source


def with_sentencepiece_tokenizer(source: Path) -> Path:
    import sentencepiece

    make_model("llama").save_pretrained(source)
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ab b ab"] * 20), model_writer=content, model_type="bpe",
        vocab_size=264, byte_fallback=True, hard_vocab_limit=False, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    (source / "tokenizer.model").write_bytes(content.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    return source


@pytest.mark.parametrize(
    ("write", "mode"),
    [
        (with_gpt2_tokenizer, "none"),
        (with_gpt2_tokenizer, "quantized"),
        (with_sentencepiece_tokenizer, "nf4"),
    ],
    ids=["gpt2-none", "gpt2-quantized", "sentencepiece-nf4"],
)
def test_older_tokenizer_files_become_tokenizer_json(
    tmp_path: Path, write: Callable[[Path], Path], mode: str
) -> None:
    source = write(tmp_path / "source")
    if mode == "quantized":
        quantize_checkpoint(source, tmp_path / "out")
        (tmp_path / "out" / "tokenizer.json").unlink()
        source = tmp_path / "out"
    checkpoint = load_checkpoint(
        source, quantization="none" if mode == "none" else "nf4", cache_dir=tmp_path / "cache"
    )
    assert (
        "ab"
        in Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json")).encode("ab").tokens[-1]
    )
    assert (checkpoint.folder / "config.json").is_file()


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_sentencepiece_is_asked_for_before_anything_is_converted(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    quantization: str,
) -> None:  # fmt: skip
    source = shutil.copytree(tiny_folder("llama"), tmp_path / "source")
    (source / "tokenizer.model").write_bytes(b"")
    monkeypatch.setattr(tokenizer_files, "find_spec", lambda name: None)
    lines: list[str] = []
    with pytest.raises(CheckpointError, match="pip install sentencepiece protobuf"):
        load_checkpoint(source, quantization=quantization, cache_dir=tmp_path / "cache",
                        report=lines.append)  # fmt: skip
    with pytest.raises(CheckpointError, match="pip install sentencepiece protobuf"):
        quantize_checkpoint(source, tmp_path / "out", report=lines.append)
    assert lines == []
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_missing_tokenizer_is_named_before_anything_is_converted(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer; one of tokenizer\.json, vocab\.json"):
        load_checkpoint(tiny_folder("llama"), needs_tokenizer=True, cache_dir=tmp_path / "cache")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.model", b"no model"), ("tokenizer.json", b"{}")],
)
def test_tokenizer_that_cannot_be_read_leaves_no_cache(
    tiny_folder: Callable[..., Path], tmp_path: Path, name: str, content: bytes
) -> None:
    source = shutil.copytree(tiny_folder("llama"), tmp_path / "source")
    (source / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"source: (its tokenizer cannot|tokenizer.json is)"):
        load_checkpoint(source, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "checkpoints").iterdir())


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
def test_searched_output_computes_in_transformers_as_here(
    double_quant: bool, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="transformers needs it to load 4-bit models")
    quantize_checkpoint(
        tiny_folder("llama"), tmp_path / "out", double_quant=double_quant, search=True
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weights = load_checkpoint(tmp_path / "out").weights
    for part, module in (("q", model.model.layers[0].self_attn.q_proj),
                         ("down", model.model.layers[1].mlp.down_proj)):  # fmt: skip
        ours = dense(weights[f"layers.{'01'[part == 'down']}.{part}.weight"])
        state = module.weight.quant_state
        theirs = dequantize_4bit(module.weight, state)
        assert torch.equal(theirs, ours.to(theirs.dtype))


@pytest.mark.parametrize("name", ["llama", "neox-parallel"])
def test_importance_finds_its_linears(
    name: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Also of queries, keys and values that are one matrix in the checkpoint."""
    source = load_checkpoint(tiny_folder(name), quantization="none").weights
    importance = {}
    for key, weight in source.items():
        if key.startswith("layers.") and weight.ndim == 2:
            importance[key.removesuffix(".weight")] = torch.arange(weight.shape[1]) ** 4.0
    quantize_checkpoint(tiny_folder(name), tmp_path / "alike", search=True)
    quantize_checkpoint(tiny_folder(name), tmp_path / "weighed", search=True, importance=importance)
    alike, weighed = (load_checkpoint(tmp_path / n).weights for n in ("alike", "weighed"))

    def lost(key: str, weights: Mapping[str, Weight]) -> float:
        error = (dense(weights[f"{key}.weight"]) - dense(source[f"{key}.weight"])).square()
        return float((error * importance[key]).sum())

    assert importance
    for key in importance:
        assert lost(key, weighed) < lost(key, alike), key
