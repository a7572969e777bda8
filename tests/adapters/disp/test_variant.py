"""Pruned variants as files: the same selections back, and clear words for what is wrong."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.disp.variant import DispVariant, load_disp, save_disp
from adapters.format import CONFIG_FILE, TENSOR_FILE, AdapterError, digest, read_config
from models.pruning import MODULES, LayerSelection, Selections
from models.spec import DecoderSpec
from tests.models.kernels.random_decoders import KINDS, make_decoder_parts
from tests.models.random_selections import random_selections, whole_selections

FINGERPRINT, DENSE = "ab" * 32, "cd" * 32
SPEC = make_decoder_parts("llama")[0]
Tensors = dict[str, torch.Tensor]


def save(folder: Path, selections: Selections, spec: DecoderSpec = SPEC, **changes: Any) -> None:
    options: dict[str, Any] = {
        "base_id": "tiny", "base_fingerprint": FINGERPRINT, "base_quantization": "nf4",
        "dense_fingerprint": DENSE, "align": 1, "residual": "independent",
        "description": "for tests", "training": {"steps": 3},
    }  # fmt: skip
    save_disp(folder, selections, spec, **(options | changes))


def load(folder: Path, spec: DecoderSpec = SPEC, **changes: Any) -> DispVariant:
    options = {"fingerprint": FINGERPRINT, "quantization": "nf4", "model_id": "tiny"}
    return load_disp(folder, spec, **(options | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "variant", random_selections(SPEC))
    return tmp_path / "variant"


def edit_fields(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    values["fields"] |= changes
    (folder / CONFIG_FILE).write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize("widths", [(32, 48, 33, 80, 17), (1, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_variant_is_read_as_it_was_written(
    tmp_path: Path, kind: str, widths: tuple[int, ...]
) -> None:
    spec = make_decoder_parts(kind)[0]
    selections = random_selections(spec, widths)
    save(tmp_path, selections, spec)
    variant = load(tmp_path, spec)
    assert variant.selections == selections
    assert variant.disp.widths == (widths,) * 3
    assert variant.digest == digest(tmp_path)
    assert variant.config.training == {"steps": 3}
    assert (variant.config.method, variant.config.base_quantization) == ("disp", "nf4")


def test_saving_what_was_loaded_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "again", load(folder).selections)
    assert digest(tmp_path / "again") == digest(folder)


def test_folder_holds_two_files_without_code(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, TENSOR_FILE]
    tensors = load_file(folder / TENSOR_FILE)
    assert tensors.keys() == {f"layers.{i}.{module}" for i in range(3) for module in MODULES}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.int32}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10_000


def test_variant_that_removes_nothing_can_be_stored(tmp_path: Path) -> None:
    save(tmp_path, whole_selections(SPEC), align=64)
    variant = load(tmp_path)
    assert (variant.disp.remove_linears, variant.disp.remove_total) == (0, 0)
    assert variant.selections == whole_selections(SPEC)


def test_dense_base_takes_the_variant_of_the_quantised_one(folder: Path) -> None:
    assert load(folder, fingerprint=DENSE, quantization="none").digest == digest(folder)
    with pytest.raises(AdapterError, match="quantization none, fingerprint cdcdcd.* abababab"):
        load(folder, quantization="none")
    with pytest.raises(AdapterError, match="quantization nf4, fingerprint ababab.* cdcdcdcd"):
        load(folder, fingerprint=DENSE)


def test_base_without_dense_weights_has_no_dense_fingerprint(tmp_path: Path) -> None:
    save(tmp_path, random_selections(SPEC), dense_fingerprint="")
    assert load(tmp_path).disp.dense_fingerprint == ""
    with pytest.raises(AdapterError, match="quantization nf4, fingerprint ababab"):
        load(tmp_path, fingerprint=DENSE, quantization="none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "ef" * 32, "model_id": "other"}, "trained on tiny .*base is other .*efef"),
        ({"fingerprint": "ef" * 32}, "the name is the same, but the weights or how they are quant"),
        ({"quantization": "none"}, "the name is the same, but the weights"),
    ],
    ids=["other", "same_name", "dense"],
)
def test_wrong_base_is_refused(folder: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(AdapterError, match=f"variant: the adapter was .*{message}"):
        load(folder, **changes)


def test_base_with_other_layers_is_refused(folder: Path) -> None:
    fewer = dataclasses.replace(SPEC, layers=SPEC.layers[:2])
    with pytest.raises(AdapterError) as caught:
        load(folder, fewer)
    assert "widths must be for 2 layers, got 3" in str(caught.value)
    assert "layers.2.mlp_mid: not a tensor of this variant" in str(caught.value)


def test_adapter_of_another_method_is_refused(folder: Path) -> None:
    values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    (folder / CONFIG_FILE).write_text(json.dumps(values | {"method": "qst"}), encoding="utf-8")
    with pytest.raises(AdapterError, match="variant: method must be 'disp', got 'qst'"):
        load(folder)


def test_variant_of_a_variant_is_refused(folder: Path) -> None:
    values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    (folder / CONFIG_FILE).write_text(json.dumps(values | {"chain": ["x"]}), encoding="utf-8")
    with pytest.raises(AdapterError, match="made for the base with x; this is the base itself"):
        load(folder)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def replace_with(name: str, make: Callable[[torch.Tensor], torch.Tensor | None]):  # type: ignore[no-untyped-def]
    def change(tensors: Tensors) -> None:
        made = make(tensors.pop(name))
        if made is not None:
            tensors[name] = made.contiguous()

    return change


A, M = "layers.1.attn_in", "layers.2.mlp_mid"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_with(A, lambda t: None), f"{A}: missing"),
        (lambda t: t.update({"layers.3.attn_in": ints(1)}), "layers.3.attn_in: not a tensor"),
        (lambda t: t.update({"layers.0.mask": ints(1)}), "layers.0.mask: not a tensor of this"),
        (replace_with(A, lambda t: t.long()), f"{A}: must be torch.int32, got torch.int64"),
        (replace_with(A, lambda t: t.float()), f"{A}: must be torch.int32, got torch.float32"),
        (replace_with(A, lambda t: t.bool()), f"{A}: must be torch.int32, got torch.bool"),
        (replace_with(A, lambda t: t[:-1]), rf"{A}: shape \(31,\), expected \(32,\) as widths"),
        (replace_with(A, lambda t: t[None]), rf"{A}: shape \(1, 32\), expected \(32,\) as widths"),
        (replace_with(A, lambda t: t[0]), rf"{A}: shape \(\), expected \(32,\) as widths say"),
        (replace_with(A, lambda t: t[:0]), f"{A}: .*must keep at least 1 channel of 0 to 63"),
        (replace_with(A, lambda t: t - 40), f"{A}: indices must be 0 to 63, got -"),
        (replace_with(A, lambda t: t + 40), f"{A}: indices must be 0 to 63, got "),
        (replace_with(M, lambda t: t.flip(0)), f"{M}: indices must be strictly increasing, got"),
        (
            replace_with(M, lambda t: torch.cat((t[:1], t[:-1]))),
            f"{M}: indices must be strictly increasing, got ([0-9]+) after .*",
        ),
        (replace_with(M, lambda t: ints(*range(100_000))), rf"{M}: shape \(100000,\), expected"),
    ],
    ids=[
        "missing", "layer", "unknown", "int64", "float", "bool", "width", "2d", "0d", "empty",
        "negative", "outside", "unsorted", "duplicate", "huge",
    ],
)  # fmt: skip
def test_wrong_tensors_are_named(
    folder: Path, change: Callable[[Tensors], None], message: str
) -> None:
    tensors = load_file(folder / TENSOR_FILE)
    change(tensors)
    save_file(tensors, folder / TENSOR_FILE)
    with pytest.raises(AdapterError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_every_problem_is_in_one_message(folder: Path) -> None:
    tensors = load_file(folder / TENSOR_FILE)
    del tensors["layers.0.attn_in"]
    tensors["layers.0.attn_out"] = tensors["layers.0.attn_out"].long()
    tensors["layers.1.mlp_out"] = tensors["layers.1.mlp_out"].flip(0).contiguous()
    tensors["extra"] = ints(1)
    save_file(tensors, folder / TENSOR_FILE)
    edit_fields(folder, remove_linears=0.01)
    with pytest.raises(AdapterError) as caught:
        load(folder)
    for part in (
        "remove_linears must be 0.",
        "layers.0.attn_in: missing",
        "layers.0.attn_out: must be torch.int32, got torch.int64",
        "layers.1.mlp_out: indices must be strictly increasing",
        "extra: not a tensor of this variant",
    ):
        assert part in str(caught.value)


def test_widths_that_contradict_the_tensors_are_refused(folder: Path) -> None:
    widths = [list(layer) for layer in load(folder).disp.widths]
    widths[2][3] += 1
    edit_fields(folder, widths=widths)
    message = r"remove_linears must be .*layers\.2\.mlp_mid: shape \(80,\), expected \(81,\)"
    with pytest.raises(AdapterError, match=message):
        load(folder)


def shared_selections(*, is_broken: bool = False) -> Selections:
    stream, middle = tuple(range(0, 64, 2)), tuple(range(96))
    layer = LayerSelection(
        attn_in=stream, attn_out=stream, mlp_in=stream, mlp_mid=middle, mlp_out=stream
    )
    last = dataclasses.replace(layer, mlp_out=tuple(range(1, 65, 2))) if is_broken else layer
    return (layer, layer, last)


def test_shared_residual_has_one_list_everywhere(tmp_path: Path) -> None:
    save(tmp_path / "good", shared_selections(), residual="shared", align=32)
    assert load(tmp_path / "good").disp.residual == "shared"
    save(tmp_path / "bad", shared_selections(is_broken=True), align=32)
    edit_fields(tmp_path / "bad", residual="shared")
    with pytest.raises(AdapterError, match="residual is 'shared', but attn_in, attn_out, mlp_in, "):
        load(tmp_path / "bad")


@pytest.mark.parametrize(
    ("selections", "changes", "message"),
    [
        (random_selections(SPEC)[:2], {}, "selections must be for 3 layers, got 2"),
        (random_selections(SPEC), {"align": 64}, "attn_in must be a multiple of align 64 or 64"),
        (shared_selections(is_broken=True), {"residual": "shared"}, "residual is 'shared', but"),
        (random_selections(SPEC), {"residual": "both"}, "residual must be one of"),
        (random_selections(SPEC), {"dense_fingerprint": "no"}, "dense_fingerprint must be 64"),
    ],
    ids=["layers", "align", "shared", "residual", "fingerprint"],
)
def test_what_would_not_load_is_not_written(
    tmp_path: Path, selections: Selections, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        save(tmp_path / "variant", selections, **changes)
    assert not (tmp_path / "variant").exists()


def test_newer_format_and_missing_files_are_named(folder: Path) -> None:
    values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    (folder / CONFIG_FILE).write_text(json.dumps(values | {"format_version": 2}), encoding="utf-8")
    with pytest.raises(AdapterError, match="format_version 2 is newer than 1"):
        read_config(folder)
    (folder / CONFIG_FILE).write_text(json.dumps(values), encoding="utf-8")
    (folder / TENSOR_FILE).unlink()
    with pytest.raises(AdapterError, match=f"no adapter; {TENSOR_FILE} is missing"):
        load(folder)
