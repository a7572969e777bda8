"""Pruned variants of checkpoints: original weights sliced, quantised, kept and mapped."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoints import (
    Checkpoint,
    CheckpointError,
    Lineage,
    Originals,
    load_checkpoint,
    prune,
    quantize_checkpoint,
)
from models.checkpoints.origins import open_gguf
from models.decoder import Decoder
from models.pruning import Selections, kept_parts, prune_spec, slice_weight
from models.q4_1 import quantize_q4_1
from models.quantization import quantize_4bit
from models.spec import SpecError, canonical_weights
from models.weights import Quantized4Bit, QuantizedBlocks, dense
from tests.models.gguf_files import TOKENS, load_kept, write_gguf
from tests.models.kernels.random_decoders import pack_batch
from tests.models.random_selections import random_selections, whole_selections

FAMILIES = ["llama", "llama-biased", "smollm", "qwen2", "qwen3", "opt", "phi", "neox-parallel"]
WIDTHS = (32, 48, 33, 80, 17)
ALIGNED = (64, 32, 64, 96, 32)
DIGEST = "cd" * 32


def load_quickly(source: Path) -> Checkpoint:
    """Load a folder in 4 bits, without the process that converts it."""
    checkpoint = load_checkpoint(source, quantization="none")
    weights = {
        name: quantize_4bit(dense(weight)) if is_linear(name) else weight
        for name, weight in checkpoint.weights.items()
    }
    return dataclasses.replace(checkpoint, quantization="nf4", weights=weights)


def is_linear(name: str) -> bool:
    return name.endswith(".weight") and name.startswith("layers.") and "norm" not in name


class Bench:
    """A base, a cache, and what is reported about variants."""

    def __init__(self, source: Path, cache: Path, base: Checkpoint | None = None) -> None:
        self.source, self.cache = source, cache
        self.base = base or load_quickly(source)
        self.lines: list[str] = []

    def load(
        self, selections: Selections, *, digest: str = DIGEST, dequantize: bool = False
    ) -> Checkpoint:
        originals = Originals(self.source, self.base, cache_dir=self.cache, dequantize=dequantize)
        step = prune(self.base.spec, selections, digest=digest)
        base = Lineage(checkpoint=self.base, originals=originals)
        return base.derive(step, report=self.lines.append).checkpoint

    @property
    def folder(self) -> Path:
        """Where the one variant lies."""
        (folder,) = (self.cache / "checkpoints").glob("*-variant-*")
        return folder


@pytest.fixture
def bench(tiny_folder: Callable[..., Path], tmp_path: Path) -> Bench:
    return Bench(tiny_folder("llama"), tmp_path / "cache")


def assert_same(loaded: Checkpoint, expected: dict[str, torch.Tensor], base: Checkpoint) -> None:
    """Hold a variant against sliced dense weights."""
    assert list(loaded.weights) == list(base.weights)
    shapes = {name: shape for name, shape, _ in canonical_weights(loaded.spec)}
    for name, weight in loaded.weights.items():
        assert tuple(weight.shape) == shapes[name], name
        if weight is base.weights[name]:
            continue
        if isinstance(weight, Quantized4Bit):
            rounded = quantize_4bit(expected[name])
            assert torch.equal(weight.packed, rounded.packed), name
            assert torch.equal(weight.absmax, rounded.absmax), name
            assert torch.equal(weight.dequantize(), rounded.dequantize()), name
        else:
            assert torch.equal(dense(weight), dense(expected[name])), name


def slices_of(dense_base: Checkpoint, selections: Selections) -> dict[str, torch.Tensor]:
    return {
        name: slice_weight(name, dense(weight), dense_base.spec, selections)
        for name, weight in dense_base.weights.items()
    }


@pytest.mark.parametrize("widths", [WIDTHS, ALIGNED, (1, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_original_weights_are_sliced_then_quantised(
    name: str, widths: tuple[int, ...], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    bench = Bench(tiny_folder(name), tmp_path)
    selections = random_selections(bench.base.spec, widths)
    loaded = bench.load(selections)
    original = load_checkpoint(bench.source, quantization="none")
    assert_same(loaded, slices_of(original, selections), bench.base)
    assert loaded.spec == prune_spec(bench.base.spec, selections)
    kinds = {n: type(w) for n, w in loaded.weights.items() if w is not bench.base.weights[n]}
    assert {kinds[n] for n in kinds if n.endswith(".weight")} == {Quantized4Bit}
    assert {kinds[n] for n in kinds if n.endswith(".bias")} <= {torch.Tensor}
    assert bench.lines == [
        f"deriving a variant of {bench.base.name} (once; later starts use {tmp_path})"
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_keeps_all_channels_is_the_bases_own(
    name: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    bench = Bench(tiny_folder(name), tmp_path)
    selections = random_selections(bench.base.spec, (bench.base.spec.hidden_size, 32, 32, 64, 32))
    loaded = bench.load(selections)
    for key, weight in bench.base.weights.items():
        is_whole = not any(kept_parts(key, bench.base.spec, selections))
        assert (loaded.weights[key] is weight) == is_whole
        assert is_whole or key.startswith("layers.")
    assert loaded.weights["layers.0.q.weight"] is bench.base.weights["layers.0.q.weight"]


def test_variant_that_removes_nothing_is_its_base(bench: Bench) -> None:
    loaded = bench.load(whole_selections(bench.base.spec))
    assert loaded.spec == bench.base.spec
    assert all(loaded.weights[name] is weight for name, weight in bench.base.weights.items())
    assert loaded.chain == (DIGEST,)
    assert bench.lines == []


def test_converted_folder_is_sliced_from_its_source(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_folder("neox-parallel")
    bench = Bench(source, tmp_path, load_checkpoint(source, cache_dir=tmp_path))
    selections = random_selections(bench.base.spec)
    loaded = bench.load(selections)
    original = load_checkpoint(source, quantization="none")
    assert_same(loaded, slices_of(original, selections), bench.base)
    assert loaded.fingerprint == bench.base.fingerprint


def test_variant_has_its_bases_fingerprint_and_a_chain(bench: Bench) -> None:
    base, loaded = bench.base, bench.load(random_selections(bench.base.spec))
    assert (base.chain, loaded.chain) == ((), (DIGEST,))
    for name in ("fingerprint", "name", "folder", "quantization"):
        assert getattr(loaded, name) == getattr(base, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dense_base_has_dense_variants_in_its_dtype(
    dtype: torch.dtype, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_folder("llama"), tmp_path / "tiny")
    tensors = {n: t.to(dtype) for n, t in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors")
    bench = Bench(source, tmp_path / "cache", load_checkpoint(source, quantization="none"))
    selections = random_selections(bench.base.spec)
    loaded = bench.load(selections)
    assert_same(loaded, slices_of(bench.base, selections), bench.base)
    assert {w.dtype for w in loaded.weights.values() if isinstance(w, torch.Tensor)} == {dtype}
    assert all(isinstance(weight, torch.Tensor) for weight in loaded.weights.values())


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_gguf_file_is_sliced_without_a_warning(
    quantization: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_folder("smollm", vocab_size=len(TOKENS))
    source = write_gguf(tmp_path / "Tiny.Q8_0.gguf", folder, kinds=("Q8_0",))
    cache = tmp_path / "cache"
    bench = Bench(
        source, cache, load_checkpoint(source, quantization=quantization, cache_dir=cache)
    )
    selections = random_selections(bench.base.spec)
    loaded = bench.load(selections)
    if quantization == "none":
        expected = slices_of(bench.base, selections)
    else:
        opened = open_gguf(source)
        expected = {
            name: slice_weight(name, opened.reader.read(where.name), bench.base.spec, selections)
            for name, where in opened.description.sources.items()
        }
    assert_same(loaded, expected, bench.base)
    assert not [line for line in bench.lines if "warning" in line]


KEPT = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": len(TOKENS),
}  # fmt: skip


@pytest.fixture
def kept_bench(tiny_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Bench]:
    """Return a function that makes a base of a GGUF file's own codes, in types that take turns."""

    def make(*kinds: str) -> Bench:
        folder = tiny_folder("smollm", **KEPT)
        source = write_gguf(tmp_path / "Tiny.gguf", folder, kinds=kinds)
        return Bench(source, tmp_path / "cache", load_kept(source))

    return make


def kept_blocks(base: Checkpoint, values: int) -> Selections:
    """Select whole blocks of `values` channels wherever linears read, and any that they write."""
    (any_channels, *_) = random_selections(base.spec, (256, 48, 256, 512, 33))
    blocks = tuple(range(256 - values, 256))
    layer = dataclasses.replace(any_channels, attn_in=blocks, mlp_in=blocks, mlp_mid=blocks)
    return (layer, layer)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL"])
def test_whole_blocks_and_rows_keep_their_codes(
    kind: str, kept_bench: Callable[..., Bench]
) -> None:
    bench = kept_bench(kind)
    values = 256 if kind.endswith("K") else 64
    selections = kept_blocks(bench.base, values)
    for loaded in (bench.load(selections), bench.load(selections)):
        expected = slices_of(bench.base, selections)
        for name, weight in loaded.weights.items():
            assert torch.equal(dense(weight), expected[name]), name
            if is_linear(name):
                assert isinstance(weight, QuantizedBlocks)
                assert weight.kind == kind
    assert bench.lines[1:] == []


def test_other_slices_of_kept_codes_are_rounded_once_with_least_error(
    kept_bench: Callable[..., Bench],
) -> None:
    bench = kept_bench("Q4_1")
    selections = random_selections(bench.base.spec, (192, 96, 224, 256, 96))
    loaded = bench.load(selections)
    for name, exact in slices_of(bench.base, selections).items():
        weight = loaded.weights[name]
        if not is_linear(name) or name.endswith("o.weight"):
            assert torch.equal(dense(weight), exact.float()), name
            continue
        assert isinstance(weight, QuantizedBlocks)
        assert torch.equal(weight.data, quantize_q4_1(exact).data)
        error = (dense(weight) - exact).norm()
        assert error < 0.7 * (dense(quantize_4bit(exact)) - exact).norm(), name


def test_dense_matrices_among_kept_codes_stay_dense(kept_bench: Callable[..., Bench]) -> None:
    bench = kept_bench("Q4_1", "F16")
    selections = random_selections(bench.base.spec, (33, 96, 33, 47, 96))
    loaded = bench.load(selections)
    for name, exact in slices_of(bench.base, selections).items():
        weight, base = loaded.weights[name], bench.base.weights[name]
        if isinstance(base, torch.Tensor):
            assert isinstance(weight, torch.Tensor)
            assert weight.dtype == base.dtype
            assert torch.equal(weight.float(), exact)
        elif not name.endswith("o.weight") and is_linear(name):
            assert isinstance(weight, Quantized4Bit)  # no blocks fit such widths
            assert torch.equal(weight.packed, quantize_4bit(exact).packed)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bit_folder_is_refused_unless_asked_for_and_warned_about(
    kind: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    source = tmp_path / "four-bit"
    quantize_checkpoint(tiny_folder("llama"), source, quant_type=kind)
    bench = Bench(source, tmp_path / "cache", load_checkpoint(source))
    selections = random_selections(bench.base.spec)
    message = r"four-bit: has 4-bit weights only, and a variant is made of .*23\.1 to 28"
    with pytest.raises(CheckpointError, match=message):
        bench.load(selections)
    assert not list((tmp_path / "cache").glob("checkpoints/*"))
    for _ in range(2):
        bench.lines.clear()
        loaded = bench.load(selections, dequantize=True)
        assert "warning: four-bit: 4-bit weights are dequantised" in bench.lines[0]
        assert "from 23.1 to 28.8 on WikiText-2" in bench.lines[0]
    assert_same(loaded, slices_of(bench.base, selections), bench.base)


def test_4_bit_folder_gives_a_variant_that_removes_nothing(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    quantize_checkpoint(tiny_folder("llama"), tmp_path / "four-bit")
    source = tmp_path / "four-bit"
    bench = Bench(source, tmp_path / "cache", load_checkpoint(source))
    loaded = bench.load(whole_selections(bench.base.spec))
    assert all(loaded.weights[name] is weight for name, weight in bench.base.weights.items())


def test_second_load_maps_the_same_bytes_without_slicing(bench: Bench) -> None:
    selections = random_selections(bench.base.spec)
    first = bench.load(selections)
    before = (bench.folder / "model.safetensors").stat()
    bench.lines.clear()
    second = bench.load(selections)
    assert bench.lines == []
    assert (bench.folder / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns
    for name, weight in first.weights.items():
        assert torch.equal(dense(weight), dense(second.weights[name]))
    assert before.st_mode & 0o777 == 0o644


def test_cache_holds_tensors_only(bench: Bench) -> None:
    bench.load(random_selections(bench.base.spec))
    names = {path.name for path in bench.folder.iterdir()}
    assert names == {"model.safetensors", "proa_sums.json"}
    names = load_file(bench.folder / "model.safetensors").keys()
    assert {name.rsplit(".", 1)[1] for name in names} == {"packed", "absmax"}


def test_another_digest_or_source_is_sliced_anew(
    bench: Bench, tiny_folder: Callable[..., Path]
) -> None:
    bench.load(random_selections(bench.base.spec))
    other = random_selections(bench.base.spec, seed=1)
    loaded = bench.load(other, digest="ef" * 32)
    original = load_checkpoint(bench.source, quantization="none")
    assert_same(loaded, slices_of(original, other), bench.base)
    Bench(bench.source, bench.cache, original).load(other, digest="ef" * 32)
    assert len(list(bench.cache.glob("checkpoints/*-variant-*"))) == 3


@pytest.mark.parametrize("length", [0, 100, -1], ids=["empty", "header", "cut"])
def test_damaged_cache_is_named(bench: Bench, length: int) -> None:
    selections = random_selections(bench.base.spec)
    bench.load(selections)
    path = bench.folder / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:length])
    with pytest.raises(CheckpointError, match=f"cache is damaged; remove {bench.folder}, and the"):
        bench.load(selections)


def test_random_bytes_in_the_cache_are_named(bench: Bench) -> None:
    selections = random_selections(bench.base.spec)
    bench.load(selections)
    path = bench.folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["layers.1.o.weight.packed"].random_()
    path.unlink()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="model.safetensors is not what was written"):
        bench.load(selections)


def test_empty_cache_folder_is_named(bench: Bench) -> None:
    selections = random_selections(bench.base.spec)
    bench.load(selections)
    (bench.folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors is not what was written"):
        bench.load(selections)


def test_cache_that_cannot_be_written_is_named(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    bench.cache = tmp_path / "file"
    with pytest.raises(CheckpointError, match=r"file: the cache cannot be used \("):
        bench.load(random_selections(bench.base.spec))


def test_another_model_is_not_the_bases_source(
    bench: Bench, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    bench.source = tiny_folder("qwen2")
    with pytest.raises(CheckpointError, match="tiny-qwen2: is not what the base tiny-llama was lo"):
        bench.load(random_selections(bench.base.spec))
    damaged = shutil.copytree(tiny_folder("llama"), tmp_path / "damaged")
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    bench.source = damaged
    with pytest.raises(CheckpointError, match=r"missing model\.layers\.2\.self_attn\.q_proj"):
        bench.load(random_selections(bench.base.spec))
    assert not list(bench.cache.glob("checkpoints/*-variant-*"))


def test_missing_source_is_named(bench: Bench, tmp_path: Path) -> None:
    bench.source = tmp_path / "nothing"
    with pytest.raises(CheckpointError, match="no such folder or file"):
        bench.load(random_selections(bench.base.spec))


def test_selections_that_do_not_fit_are_refused(bench: Bench) -> None:
    first, second = random_selections(bench.base.spec)
    wrong = (dataclasses.replace(first, mlp_mid=(7, 128)), second)
    with pytest.raises(SpecError, match="layer 0, mlp_mid: indices must be 0 to 127, got 128"):
        bench.load(wrong)


@pytest.mark.parametrize("widths", [WIDTHS, ALIGNED, (1, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_native_kernels_compute_loaded_variants_as_the_reference_does(
    name: str, widths: tuple[int, ...], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    bench = Bench(tiny_folder(name), tmp_path)
    loaded = bench.load(random_selections(bench.base.spec, widths))
    tokens = [(11 * i + 5) % 96 for i in range(40)]
    results = []
    for kernels in ("auto", "reference"):
        base = Decoder(
            bench.base.spec, bench.base.weights, kernels=kernels, head="dense", num_threads=1
        )  # type: ignore[arg-type]
        decoder = Decoder(loaded.spec, loaded.weights, base=base)
        cache = base.make_cache(num_blocks=4, dtype=torch.float32)
        spans = [(0, 20), *((i, i + 1) for i in range(20, 40))]
        logits = [decoder.forward(pack_batch([tokens], [[3, 1, 0]], [s]), cache) for s in spans]
        results.append(torch.cat(logits))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=2e-2)
    assert results[1].std() > 0.1
