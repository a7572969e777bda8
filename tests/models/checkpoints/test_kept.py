"""GGUF files whose weights are computed from their own codes: loaded, and refused."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import pytest
import torch

from models.checkpoints import (
    Checkpoint,
    CheckpointError,
    fingerprint_weights,
    load_checkpoint,
)
from models.checkpoints.checkpoint import default_quantization
from models.checkpoints.gguf_file import GgufFile
from models.checkpoints.gguf_model import GgufModel
from models.checkpoints.origins import open_gguf
from models.decoder import Decoder
from models.spec import DecoderSpec
from models.weights import BLOCK_FORMATS, QuantizedBlocks, Weight, dense, select_rows
from tests.models.gguf_files import TOKENS, load_kept, random_blocks, with_scales, write_gguf
from tests.models.kernels.random_decoders import pack_batch

MIXED = ("Q4_K", "Q6_K", "F16", "Q8_0", "Q5_K", "IQ4_NL", "BF16", "Q4_0", "Q4_1", "F32", "Q5_0")
WIDE = {
    "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": len(TOKENS),
}  # fmt: skip


@pytest.fixture
def write(tiny_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a tiny file with matrices of some types."""

    def write(*kinds: str, name: str = "smollm") -> Path:
        folder = tiny_folder(name, **WIDE)
        return write_gguf(tmp_path / "Tiny.gguf", folder, kinds=kinds)

    return write


def keep(source: Path, cache: Path) -> Checkpoint:
    return load_checkpoint(source, quantization="keep", cache_dir=cache)


def logits(spec: DecoderSpec, weights: Mapping[str, Weight], **options: object) -> torch.Tensor:
    decoder = Decoder(spec, weights, num_threads=1, **options)  # type: ignore[arg-type]
    cache = decoder.make_cache(num_blocks=2, dtype=torch.float32)
    return decoder.forward(pack_batch([[5, 9, 3, 70, 9]], [[1]], [(0, 5)]), cache)


@pytest.mark.parametrize("name", ["llama", "smollm", "qwen2"])
@pytest.mark.parametrize("kinds", [*((kind,) for kind in BLOCK_FORMATS), MIXED], ids=str)
def test_kept_weights_are_those_of_the_file(
    kinds: tuple[str, ...], name: str, write: Callable[..., Path]
) -> None:
    source = write(*kinds, name=name)
    opened, stored = open_gguf(source), set()
    for key, weight in load_kept(source).weights.items():
        exact = opened.reader.read(opened.description.sources[key].name)
        assert torch.equal(dense(weight), exact.float()), key
        is_block = isinstance(weight, QuantizedBlocks)
        stored.add(weight.kind if is_block else str(weight.dtype))
    floats = {"F16": "torch.float16", "BF16": "torch.bfloat16", "F32": "torch.float32"}
    assert stored == {floats.get(kind, kind) for kind in kinds} | {"torch.float32"}


def test_only_tokenizer_and_config_are_converted(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    source = write("Q4_1")
    loaded = keep(source, tmp_path / "cache")
    assert (loaded.quantization, loaded.weights_folder) == ("gguf", source.parent.resolve())
    assert loaded.fingerprint == fingerprint_weights(loaded.weights, "gguf")
    names = {path.name for path in loaded.folder.iterdir()}
    assert {"config.json", "tokenizer.json", "proa_summary.json"} <= names
    assert not [name for name in names if name.endswith(".safetensors")]


def test_second_start_converts_nothing_and_loads_no_slow_library(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    source, cache = write(*MIXED), tmp_path / "cache"
    first = keep(source, cache)
    code = (
        "import sys; from pathlib import Path; from models.checkpoints import load_checkpoint\n"
        f"c = load_checkpoint({str(source)!r}, quantization='keep', "
        f"cache_dir=Path({str(cache)!r}), report=print)\n"
        "slow = {'transformers', 'bitsandbytes', 'gguf', 'huggingface_hub', 'tokenizers'}\n"
        "print(c.known_fingerprint, c.folder, *(slow & set(sys.modules)))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert output == [first.fingerprint, str(first.folder)]


def test_weights_are_mapped_from_the_file(write: Callable[..., Path]) -> None:
    source = write("Q4_1")
    down = load_kept(source).weights["layers.1.down.weight"]
    assert isinstance(down, QuantizedBlocks)
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if line.endswith(str(source.resolve()))]
    assert any(int(a, 16) <= down.data.data_ptr() < int(b, 16) for a, b in ranges)
    before = source.read_bytes()
    down.data.zero_()  # the mapping is private
    assert source.read_bytes() == before


@pytest.mark.parametrize("head", ["int8", "nf4", "dense"])
@pytest.mark.parametrize("name", ["llama", "smollm"])
def test_decoder_computes_from_the_codes(name: str, head: str, write: Callable[..., Path]) -> None:
    loaded = load_kept(write(*(kind for kind in MIXED if kind in BLOCK_FORMATS), name=name))
    spec, weights = loaded.spec, loaded.weights
    unpacked: dict[str, Weight] = {key: dense(weight) for key, weight in weights.items()}
    expected = logits(spec, unpacked, kernels="reference", head="dense")
    assert torch.equal(logits(spec, weights, kernels="reference", head=head), expected)


def test_native_kernels_compute_a_kept_file_as_the_reference_does(
    write: Callable[..., Path],
) -> None:
    loaded = load_kept(write(*MIXED))
    spec, weights = loaded.spec, loaded.weights
    expected = logits(spec, weights, kernels="reference")
    assert expected.std() > 0.1
    deviation = (logits(spec, weights) - expected).abs().max() / expected.std()
    assert deviation < 0.05


def test_tied_head_is_the_table_and_counted_once(write: Callable[..., Path]) -> None:
    loaded = load_kept(write("Q8_0"))
    spec, weights = loaded.spec, loaded.weights
    decoder = Decoder(spec, weights, kernels="reference")
    stored = 0
    for weight in weights.values():
        assert isinstance(weight, QuantizedBlocks | torch.Tensor)
        stored += weight.data.nbytes
    assert decoder.num_bytes == stored


def test_file_without_block_formats_is_never_converted(
    write: Callable[..., Path], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    source, cache = write("F32"), tmp_path / "cache"
    kept, dense_one = (
        load_checkpoint(source, quantization=asked, cache_dir=cache) for asked in ("keep", "none")
    )
    assert kept.quantization == dense_one.quantization == "none"
    assert kept.folder == dense_one.folder
    folder = load_checkpoint(tiny_folder("smollm", **WIDE), quantization="none")
    assert kept.fingerprint == dense_one.fingerprint == folder.fingerprint


def test_keep_leaves_a_dense_folder_dense(tiny_folder: Callable[..., Path]) -> None:
    loaded = load_checkpoint(tiny_folder("llama"), quantization="keep")
    assert loaded.quantization == "none"
    assert loaded.folder == tiny_folder("llama")


@pytest.mark.parametrize(
    ("stored", "expected"), [("gguf", "keep"), ("nf4", "keep"), ("fp4", "keep"), ("none", "nf4")]
)
def test_auto_keeps_what_is_quantised_and_rounds_dense_weights(stored: str, expected: str) -> None:
    assert default_quantization(stored) == expected


@pytest.mark.parametrize("kind", BLOCK_FORMATS)
def test_selected_rows_are_those_of_the_dense_matrix(kind: str) -> None:
    blocks, rows = random_blocks(9, 512, kind), torch.tensor([7, 0, 7])
    selected = select_rows(blocks, rows)
    assert isinstance(selected, QuantizedBlocks)
    assert torch.equal(dense(selected), dense(blocks)[rows])


@pytest.mark.parametrize("kind", BLOCK_FORMATS)
def test_scales_are_what_blocks_are_multiplied_by(kind: str) -> None:
    blocks = random_blocks(4, 512, kind)
    doubled = with_scales(blocks, blocks.scales * 2)
    assert torch.equal(doubled.scales, blocks.scales * 2)
    assert torch.equal(dense(doubled), dense(blocks) * 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("kind", BLOCK_FORMATS)
def test_scales_that_are_no_numbers_are_named(
    kind: str, value: float, write: Callable[..., Path], tmp_path: Path
) -> None:
    source = write(kind)
    name = "blk.1.ffn_up.weight"
    tensor = GgufFile(source).tensors[name]
    reader = GgufModel(GgufFile(source))
    blocks = reader.read_stored("model.layers.1.mlp.up_proj.weight")
    assert isinstance(blocks, QuantizedBlocks)
    scales = blocks.scales.clone()
    scales[-1, -1] = value
    content = bytearray(source.read_bytes())
    content[tensor.offset : tensor.end] = with_scales(blocks, scales).data.numpy().tobytes()
    source.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: NaN or inf"
    ):
        keep(source, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "checkpoints").glob("Tiny*"))


def test_unsupported_type_is_named_with_its_tensor(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    source = tmp_path / "Tiny.gguf"
    write_gguf(source, tiny_folder("smollm", **WIDE), kinds=("TQ1_0", "Q8_0"))
    message = (
        r"Tiny\.gguf: .*\.weight and \d+ more are stored as TQ1_0, which cannot be kept; what can "
        r"be is Q4_0, .*IQ4_NL, F16, BF16 and F32\. Quantization nf4 converts the file"
    )
    with pytest.raises(CheckpointError, match=message):
        keep(source, tmp_path / "cache")
    assert load_checkpoint(source, quantization="nf4", cache_dir=tmp_path).quantization == "nf4"


class Table:
    """A small GGUF file whose table of tensors can be written wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path
        writer = gguf.GGUFWriter(path, "llama")
        for name in ("first", "second"):
            writer.add_tensor(f"{name}.weight", torch.zeros(16, 8).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        self.content = bytearray(path.read_bytes())

    def change(self, name: str, after: int, value: bytes) -> None:
        """Overwrite bytes that follow a tensor's name in the table."""
        start = self.content.index(name.encode()) + len(name) + after
        self.content[start : start + len(value)] = value
        self.path.write_bytes(self.content)


def offset_bytes(value: int) -> tuple[int, bytes]:
    """Say where an entry of a matrix has its offset, and with which bytes."""
    return 4 + 2 * 8 + 4, value.to_bytes(8, "little")


@pytest.mark.parametrize(
    ("name", "after", "value", "message"),
    [
        ("second.weight", *offset_bytes(480), "first.weight and second.weight overlap: bytes"),
        ("second.weight", *offset_bytes(0), "first.weight and second.weight overlap"),
        ("second.weight", *offset_bytes(520), "second.weight lies at 520, which is no multiple"),
        ("second.weight", *offset_bytes(1 << 60), "truncated: 1 of 2 tensors lie past its end"),
        ("second.weight", 4, bytes(8), r"second\.weight has the shape \(16, 0\), which holds"),
        ("second.weight", 20, b"\x02", "second.weight has rows of 8 values, its type .* of 32"),
        ("second.weight", 20, b"\x63", "second.weight has the unknown type 99"),
    ],
    ids=["overlap", "same-place", "misaligned", "far", "empty", "odd-width", "unknown-type"],
)
def test_wrong_table_is_refused(
    name: str, after: int, value: bytes, message: str, tmp_path: Path
) -> None:
    table = Table(tmp_path / "x.gguf")
    table.change(name, after, value)
    with pytest.raises(CheckpointError, match=message):
        GgufFile(table.path)


def test_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    table = Table(tmp_path / "x.gguf")
    length = len("first.weight").to_bytes(8, "little")
    start = table.content.index(b"second.weight")
    table.content[start - 8 : start + 13] = length + b"first.weight"
    table.path.write_bytes(table.content + b"\0")
    with pytest.raises(CheckpointError, match=r"first\.weight is there twice"):
        GgufFile(table.path)


def test_alignment_that_is_none_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_uint32("general.alignment", 12)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(
        CheckpointError, match=r"general\.alignment must be a multiple of 8, got 12"
    ):
        GgufFile(tmp_path / "x.gguf")


def test_file_that_changed_is_hashed_again(write: Callable[..., Path], tmp_path: Path) -> None:
    source = write("Q4_1")
    first = keep(source, tmp_path / "cache")
    tensor = GgufFile(source).tensors["blk.0.ffn_up.weight"]
    content = bytearray(source.read_bytes())
    content[tensor.offset + 7] ^= 1
    source.write_bytes(content)
    second = keep(source, tmp_path / "cache")
    assert second.fingerprint != first.fingerprint
    assert second.fingerprint == fingerprint_weights(second.weights, "gguf")
