"""Side networks as files: the same logits back, and clear words for what is wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.format import CONFIG_FILE, TENSOR_FILE, AdapterError, digest, read_config
from adapters.qst.adapter import QstAdapter, load_qst, save_qst
from models.checkpoints.checkpoint import fingerprint_weights
from models.decoder import Decoder
from models.spec import DecoderSpec
from models.weights import dense
from tests.adapters.side_decoders import (
    DOWNSAMPLES,
    TOKENS,
    Stream,
    make_base,
    make_network,
    paper_base,
    run_streams,
)
from tests.models.kernels.random_decoders import KINDS

FINGERPRINT = "ab" * 32
Tensors = dict[str, torch.Tensor]


def save(folder: Path, spec: DecoderSpec, **fields: Any) -> None:
    network = make_network(spec, **fields)
    save_qst(
        folder, network, base_id="tiny", base_fingerprint=FINGERPRINT, base_quantization="nf4",
        description="for tests",
    )  # fmt: skip


def load(folder: Path, spec: DecoderSpec) -> QstAdapter:
    return load_qst(folder, spec, fingerprint=FINGERPRINT, model_id="tiny")


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        *(("paper", {"downsample": name}) for name in DOWNSAMPLES),
        *((kind, {}) for kind in KINDS),
        ("paper", {"gate_shape": "vector", "final_gate": "sigmoid"}),
        ("paper", {"tie_embedding_downsample": True, "side_intermediate": (8, 8, 8, 16)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_loaded_adapter_gives_the_logits_of_the_saved_one(
    tmp_path: Path, kind: str, fields: dict[str, Any]
) -> None:
    spec, weights = make_base(kind)
    decoder = Decoder(spec, weights, kernels="reference", head="dense")
    network = make_network(spec, **fields)
    save(tmp_path, spec, **fields)
    adapter = load(tmp_path, spec)
    streams = [
        Stream(tokens=TOKENS, side=decoder.attach(side))
        for side in (network.side_network(), adapter.network)
    ]
    saved, loaded = run_streams(decoder, streams)[0]
    assert torch.equal(saved, loaded)
    assert adapter.digest == digest(tmp_path)
    assert not adapter.network.up.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_file_holds_alpha_and_every_gamma_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    spec, _ = paper_base()
    network = make_network(spec)
    save_qst(
        tmp_path, network, base_id="tiny", base_fingerprint=FINGERPRINT, base_quantization="nf4",
        dtype=dtype,
    )  # fmt: skip
    tensors = load_file(tmp_path / TENSOR_FILE)
    for name, shape in (("alpha", ()), ("gamma", (4,))):
        assert tensors[name].dtype == torch.float32
        assert tensors[name].shape == shape
        assert torch.equal(tensors[name], network.get_parameter(name))
    assert tensors["up.weight"].dtype == dtype
    assert tensors.keys() == network.state_dict().keys()
    assert load(tmp_path, spec).network.up.dtype == torch.float32


def test_stored_config_says_everything(tmp_path: Path) -> None:
    spec, _ = paper_base()
    save(tmp_path, spec)
    fields = read_config(tmp_path).fields
    assert None not in fields.values()
    assert fields["side_head_dim"] == 4
    assert fields["rotary_inv_freq"] == pytest.approx([1.0, 0.01])


def test_classifier_comes_with_its_head(tmp_path: Path) -> None:
    spec, _ = paper_base()
    save(tmp_path, spec, task="sequence_classification", num_labels=2, labels=("no", "yes"))
    adapter = load(tmp_path, spec)
    assert adapter.qst.labels == ("no", "yes")
    assert adapter.classifier is not None
    assert adapter.classifier.shape == (2, 64)


def put_nan(tensors: Tensors) -> None:
    tensors["layers.1.q.weight"][3, 2] = float("nan")


def put_infinity(tensors: Tensors) -> None:
    tensors["alpha"] = torch.tensor(float("inf"))


def drop_some(tensors: Tensors) -> None:
    del tensors["gamma"], tensors["downsamples.0.first.weight"]


def misshape(tensors: Tensors) -> None:
    tensors["up.weight"] = tensors["up.weight"].T.contiguous()


def put_integers(tensors: Tensors) -> None:
    tensors["up.bias"] = tensors["up.bias"].int()


def add_unknown(tensors: Tensors) -> None:
    tensors["layers.9.q.weight"] = torch.zeros(2)


def break_several(tensors: Tensors) -> None:
    drop_some(tensors), misshape(tensors), put_nan(tensors), add_unknown(tensors)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (put_nan, "layers.1.q.weight: holds values that are not finite"),
        (put_infinity, "alpha: holds values that are not finite"),
        (drop_some, "gamma: missing; downsamples.0.first.weight: missing"),
        (misshape, r"up.weight: shape \(16, 64\), expected \(64, 16\)"),
        (put_integers, "up.bias: torch.int32, expected 16- or 32-bit floats"),
        (add_unknown, "layers.9.q.weight: not a tensor of this side network"),
        (break_several, "gamma: missing.*not finite.*up.weight: shape.*layers.9"),
    ],
)
def test_tensors_that_do_not_fit_are_all_named(
    tmp_path: Path, damage: Callable[[Tensors], None], message: str
) -> None:
    spec, _ = paper_base()
    save(tmp_path, spec)
    tensors = load_file(tmp_path / TENSOR_FILE)
    damage(tensors)
    save_file(tensors, tmp_path / TENSOR_FILE)
    with pytest.raises(AdapterError, match=message):
        load(tmp_path, spec)


def test_network_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    spec, _ = paper_base()
    save(tmp_path, spec)
    before = digest(tmp_path)
    network = make_network(spec)
    with torch.no_grad():
        network.get_parameter("up.weight").fill_(1e6)
    with pytest.raises(AdapterError, match="up.weight: holds values that are not finite"):
        save_qst(
            tmp_path, network, base_id="tiny", base_fingerprint=FINGERPRINT,
            base_quantization="nf4", dtype=torch.float16,
        )  # fmt: skip
    assert digest(tmp_path) == before


def test_base_quantised_otherwise_is_refused(tmp_path: Path) -> None:
    spec, weights = paper_base(is_quantized=True)
    requantised = {name: dense(weight) for name, weight in weights.items()}
    trained, served = (
        fingerprint_weights(weights, "nf4"),
        fingerprint_weights(requantised, "none"),  # type: ignore[arg-type]
    )
    save_qst(
        tmp_path, make_network(spec), base_id="tiny", base_fingerprint=trained,
        base_quantization="nf4",
    )  # fmt: skip
    with pytest.raises(AdapterError, match=r"quantization nf4.*the name is the same, but"):
        load_qst(tmp_path, spec, fingerprint=served, model_id="tiny")
    assert load_qst(tmp_path, spec, fingerprint=trained, model_id="tiny").digest


def test_other_base_is_refused_before_its_tensors_are_looked_at(tmp_path: Path) -> None:
    spec, _ = paper_base()
    save(tmp_path, spec)
    other, _ = make_base("opt")
    with pytest.raises(AdapterError, match="trained on tiny .* this base is opt"):
        load_qst(tmp_path, other, fingerprint="cd" * 32, model_id="opt")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"reduction": 4', '"reduction": 7', "reduction 7 does not divide"),
        ('"reduction": 4', '"reduction": 4, "speed": 9', "unknown qst fields: speed"),
        (
            '"rank": 16',
            '"rank": 8',
            r"downsamples.0.first.weight: .*, expected \(8, ",
        ),
        ('"format_version": 1', '"format_version": 9', "format_version 9 is newer"),
        ('"side_heads": 4', '"side_heads": 1000000000', r"expected \(4000000000, 16\)"),
    ],
)
def test_config_that_does_not_fit_is_refused(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    spec, _ = paper_base()
    save(tmp_path, spec)
    path = tmp_path / CONFIG_FILE
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(AdapterError, match=message) as error:
        load(tmp_path, spec)
    assert str(tmp_path) in str(error.value)
