import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoints import (
    Checkpoint,
    CheckpointError,
    UnsupportedArchitectureError,
    cache,
    fingerprint_weights,
    load_checkpoint,
)
from models.checkpoints.cache import cached_folder, sum_file, whole_folder
from models.checkpoints.origins import find_origin
from models.checkpoints.worker import convert_apart
from models.weights import LowRank, Quantized4Bit, dense


@pytest.fixture
def folder(tiny_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny Llama that a test may damage."""
    return shutil.copytree(tiny_folder("llama"), tmp_path / "tiny")


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


WEIGHTS = "model.safetensors"
Q = "model.layers.0.self_attn.q_proj.weight"


def test_dense_folder_loads_as_stored(folder: Path) -> None:
    checkpoint = load_checkpoint(folder, quantization="none")
    stored = load_file(folder / WEIGHTS)
    assert torch.equal(dense(checkpoint.weights["layers.0.q.weight"]), stored[Q])
    assert (checkpoint.name, checkpoint.folder) == ("tiny", folder)
    assert checkpoint.quantization == "none"


def test_stored_dtype_is_kept(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    weights = load_checkpoint(folder, quantization="none").weights
    assert {w.dtype for w in weights.values() if isinstance(w, torch.Tensor)} == {torch.bfloat16}


def test_shards_load_like_one_file(folder: Path) -> None:
    whole = load_checkpoint(folder, quantization="none").fingerprint
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    save_file({n: tensors[n].clone() for n in names[::2]}, folder / "a.safetensors")
    save_file({n: tensors[n].clone() for n in names[1::2]}, folder / "b.safetensors")
    (folder / WEIGHTS).unlink()
    weight_map = {n: "ab"[i % 2] + ".safetensors" for i, n in enumerate(names)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert load_checkpoint(folder, quantization="none").fingerprint == whole


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "x.safetensors"}, "missing weight files: x.safetensors"),
        ({"a": "../tiny/model.safetensors"}, "names files outside the folder"),
        ({}, "weight_map is missing or empty"),
    ],
    ids=["missing", "outside", "empty"],
)
def test_bad_index_is_refused(folder: Path, weight_map: dict[str, str], message: str) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder, quantization="none")


def test_every_mismatch_is_named_in_one_message(folder: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q] = tensors[Q][:-1].clone()
        del tensors["model.norm.weight"]
        tensors["extra.weight"] = torch.zeros(3)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)

    change_tensors(folder, damage)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder, quantization="none")
    message = str(caught.value)
    assert str(folder) in message
    for part in (
        f"{Q} must have the shape (64, 64), got (63, 64)",
        "missing model.norm.weight (64,)",
        "unexpected extra.weight",
        "lm_head.weight is stored as ",
    ):
        assert part in message


def test_tied_head_may_be_stored_too(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder("smollm"), tmp_path / "tied")
    key = "model.embed_tokens.weight"
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t[key].clone()}))
    assert "head.weight" not in load_checkpoint(folder, quantization="none").weights


@pytest.mark.parametrize("length", [4, 200, 20_000])
def test_truncated_weights_are_refused(folder: Path, length: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors file"):
        load_checkpoint(folder)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder or file, and not a hub id"):
        load_checkpoint(tmp_path / "nothing")


def test_file_of_another_kind_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a folder or a \.gguf file"):
        load_checkpoint(folder / WEIGHTS)


def test_missing_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[]", "must hold a JSON object, got list"), ("[" * 9**5, "JSON")],
    ids=["cut", "list", "deep"],
)
def test_bad_config_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled weights \(pytorch_model\.bin\).*convert"):
        load_checkpoint(folder)


def test_folder_without_weights_points_at_a_gguf_file(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model.gguf")
    with pytest.raises(CheckpointError, match=r"no weights; .* to load model\.gguf, name the file"):
        load_checkpoint(folder)


def test_unsupported_architecture_names_folder_and_supported(folder: Path) -> None:
    change_config(folder, architectures=["FalconForCausalLM"])
    with pytest.raises(UnsupportedArchitectureError, match=r"tiny: .*'FalconForCausalLM'.*Llama"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq' is not supported"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes with load_in_4bit"),
        ("nf4", "quantization_config must be an object"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "int4"},
            "bnb_4bit_quant_type 'int4'",
        ),
    ],
    ids=["gptq", "8-bit", "text", "int4"],
)
def test_other_quantisation_is_refused(folder: Path, settings: object, message: str) -> None:
    change_config(folder, quantization_config=settings)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_unknown_quantization_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="must be one of auto, keep, nf4, none, got 'int8'"):
        load_checkpoint(folder, quantization="int8")


def test_notes_are_reported(tiny_folder: Callable[..., Path]) -> None:
    lines: list[str] = []
    folder = tiny_folder("mistral-window")
    load_checkpoint(folder, quantization="none", report=lines.append)
    assert lines == [
        "note: tiny-mistral-window: the model attends to the last 32 tokens only: sequences are "
        "limited to 32 tokens (max_position_embeddings is 64)"
    ]


@pytest.fixture(scope="module")
def first_start(
    tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, Path, list[str]]:
    """A tiny Llama quantised into a cache, the cache, and what was reported."""
    cache_dir = tmp_path_factory.mktemp("cache")
    lines: list[str] = []
    checkpoint = load_checkpoint(tiny_folder("llama"), cache_dir=cache_dir, report=lines.append)
    return checkpoint, cache_dir, lines


def test_first_start_quantises_the_linears(
    first_start: tuple[Checkpoint, Path, list[str]], tiny_folder: Callable[..., Path]
) -> None:
    checkpoint, cache_dir, lines = first_start
    kinds = {name: isinstance(w, Quantized4Bit) for name, w in checkpoint.weights.items()}
    assert {name.split(".")[2] for name, is_4bit in kinds.items() if is_4bit} == {
        "q", "k", "v", "o", "gate", "up", "down"
    }  # fmt: skip
    assert checkpoint.folder.is_relative_to(cache_dir)
    assert (checkpoint.name, checkpoint.quantization) == ("tiny-llama", "nf4")
    assert any("quantising" in line for line in lines)


def test_second_start_reads_the_cache_without_slow_libraries(
    first_start: tuple[Checkpoint, Path, list[str]], tiny_folder: Callable[..., Path]
) -> None:
    checkpoint, cache_dir, _ = first_start
    code = (
        "import sys; from pathlib import Path; from models.checkpoints import load_checkpoint\n"
        f"c = load_checkpoint({str(tiny_folder('llama'))!r}, cache_dir=Path({str(cache_dir)!r}))\n"
        "slow = {'transformers', 'bitsandbytes', 'gguf', 'huggingface_hub', 'tokenizers'}\n"
        "print(c.fingerprint, c.folder, *(slow & set(sys.modules)))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert output == [checkpoint.fingerprint, str(checkpoint.folder)]


def test_wrong_tensors_are_named_before_quantising(folder: Path, tmp_path: Path) -> None:
    change_tensors(folder, lambda t: t.pop(Q))
    with pytest.raises(CheckpointError, match=f"missing {Q}"):
        load_checkpoint(folder, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_identity_changes_with_the_files(folder: Path) -> None:
    origin = find_origin(folder, print)
    before = origin.identity()
    change_tensors(folder, lambda t: t.update({Q: t[Q] + 1}))
    assert origin.identity() != before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty_of_keys(path: Path) -> None:
    path.write_text("{}")


@pytest.mark.parametrize("damage", [cut, flip_a_bit, empty_of_keys, Path.unlink])
@pytest.mark.parametrize(
    "name", [WEIGHTS, "config.json", "proa_summary.json", "proa_sums.json"], ids=lambda name: name
)
def test_damaged_cache_says_what_to_remove(
    first_start: tuple[Checkpoint, Path, list[str]],
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
    name: str,
    damage: Callable[[Path], None],
) -> None:
    cache_dir = shutil.copytree(first_start[1], tmp_path / "cache")
    (path,) = cache_dir.rglob(name)
    damage(path)
    match = rf"{path} is not what was written: the cache is damaged; remove {path.parent}, and"
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint(tiny_folder("llama"), cache_dir=cache_dir)


def test_unusable_cache_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file: the cache cannot be used .*name another"):
        load_checkpoint(folder, cache_dir=tmp_path / "file")


def test_stored_fingerprint_is_that_of_the_weights(
    first_start: tuple[Checkpoint, Path, list[str]],
) -> None:
    checkpoint, _, _ = first_start
    assert checkpoint.known_fingerprint == fingerprint_weights(checkpoint.weights, "nf4")
    assert load_checkpoint(checkpoint.folder).fingerprint == checkpoint.fingerprint


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("a", lambda w: w + 1),
        ("a", lambda w: w.half()),
        ("a", lambda w: w.view(3, 2)),
        ("a", lambda w: LowRank(left=w, right=torch.eye(3))),
        ("b", lambda w: w),
    ],
    ids=["value", "dtype", "shape", "kind", "name"],
)
def test_fingerprint_changes_with(
    name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    weight = torch.arange(6.0).view(2, 3)
    before = fingerprint_weights({"a": weight}, "none")
    assert fingerprint_weights({name: change(weight)}, "none") != before


def test_fingerprint_is_independent_of_order() -> None:
    a, b = torch.ones(2), torch.zeros(2)
    assert fingerprint_weights({"a": a, "b": b}, "nf4") == fingerprint_weights(
        {"b": b, "a": a}, "nf4"
    )


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise CheckpointError("broken on the way")

    with pytest.raises(CheckpointError, match="broken on the way"):
        cached_folder(tmp_path, "m", {"key": 1}, build)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_two_builders_of_one_folder_both_succeed(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with whole_folder(target) as slower, whole_folder(target) as faster:
        (slower / "x").write_text("slower")
        (faster / "x").write_text("faster")
    assert (target / "x").read_text() == "faster"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("size", [0, 7, 8, 100, 2048, 5003])
def test_checksum_tells_any_changed_byte(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_CHUNK_BYTES", 32)
    path = tmp_path / "file"
    content = bytearray(random.Random(size).randbytes(size))
    path.write_bytes(content)
    before = sum_file(path)
    assert sum_file(path) == before
    for place in {0, size // 2, size - 1} & set(range(size)):
        content[place] ^= 0x80
        path.write_bytes(content)
        assert sum_file(path) != before
        content[place] ^= 0x80
    path.write_bytes(bytes(content) + b"\0")
    assert sum_file(path) != before


def test_hub_id_fetches_safetensors_and_never_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.checkpoints import hub

    asked: dict[str, list[str]] = {}

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        asked[repository] = allow_patterns
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    checkpoint = load_checkpoint("someone/Some-Model", quantization="none")
    assert checkpoint.name == "Some-Model"
    names = ("pytorch_model.bin", "modeling_x.py", "tokenization_x.py", "model.pt", "model.ckpt")
    patterns = asked["someone/Some-Model"]
    assert not [name for name in names for pattern in patterns if fnmatch(name, pattern)]
    assert any(fnmatch("model-00001-of-00002.safetensors", pattern) for pattern in patterns)


def test_unreachable_hub_is_a_checkpoint_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from models.checkpoints import hub

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        raise hub.LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=r"someone/x: neither a local.*\(no connection\)$"):
        load_checkpoint("someone/x")


def spoil(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in (Q, "model.norm.weight"):
            tensors[name].view(-1)[-1] = value

    return change


@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=["nan", "inf"])
def test_weights_that_are_no_numbers_are_named(folder: Path, tmp_path: Path, value: float) -> None:
    change_tensors(folder, spoil(value))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight, model\.norm\.weight: NaN or inf"):
        load_checkpoint(folder, quantization="none")
    with pytest.raises(CheckpointError, match=r"(norm|q_proj)\.weight: NaN or infinity among"):
        load_checkpoint(folder, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "checkpoints").iterdir())


@pytest.mark.parametrize("name", [f"{Q}.absmax", "model.norm.weight"])
def test_4_bit_weights_that_are_no_numbers_are_named(
    first_start: tuple[Checkpoint, Path, list[str]], tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(first_start[0].folder, tmp_path / "copy")
    change_tensors(folder, lambda t: t[name].view(-1)[3:4].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"copy: .*weight: NaN or infinity among the values"):
        load_checkpoint(folder)


def test_code_in_the_current_folder_is_not_run_by_the_conversion(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch", "json", "models"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(folder)
    convert_apart(Path(), tmp_path / "out", "none", report=print)
    assert (tmp_path / "out" / WEIGHTS).is_file()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "settings",
    [None, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}],
    ids=["none", "without-method"],
)
def test_4_bit_tensors_load_whatever_the_config_says_of_them(
    first_start: tuple[Checkpoint, Path, list[str]], tmp_path: Path, settings: object
) -> None:
    folder = shutil.copytree(first_start[0].folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    if settings is not None:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_checkpoint(folder)
    assert (loaded.quantization, loaded.folder) == ("nf4", folder)
    assert loaded.fingerprint == first_start[0].fingerprint


def test_tensor_of_a_foreign_type_is_named_with_it(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({Q: t[Q].double()}))
    with pytest.raises(
        CheckpointError, match=rf"{Q} is stored as F64; what can be read is F32, F1"
    ):
        load_checkpoint(folder)
