"""Side networks that read the base's keys and values: config, file, training."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from adapters.format import AdapterError, read_adapter
from adapters.frozen_head import FrozenHead
from adapters.qst.adapter import describe_qst, load_qst, save_qst
from adapters.qst.config import DEFAULT_SIDE_LAYERS, QstConfig, from_fields
from adapters.qst.examples import Example, pack_examples
from adapters.qst.network import QstNetwork, qst_tensors
from adapters.qst.trainer import Trainer
from adapters.qst.training_config import TrainingConfig
from models.decoder import Decoder
from models.fork import ForkNetwork
from tests.adapters.side_decoders import make_base, make_network, paper_base
from tests.models.kernels.random_decoders import make_decoder_parts
from tests.models.kernels.test_fork import Row, run

CPU = torch.device("cpu")
TOKENS = [(5 * i + 1) % 97 for i in range(20)]


def fork_config(**fields: object) -> QstConfig:
    return QstConfig(side_attention="base", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"side_layers": 0}, "side_layers must be an integer of at least 1, or null, got 0"),
        ({"side_layers": True}, "side_layers must be"),
        ({"side_layers": [1]}, "side_layers must be"),
        ({"rank": 0}, "rank must be an integer of at least 1"),
        ({"reduction": 4}, "reduction has no meaning with side_attention base"),
        ({"final_gate": "sigmoid", "gate_shape": "vector"}, "gate_shape has no mea.*final_gate"),
        ({"side_attention": "both"}, "side_attention must be one of own, base, got 'both'"),
        ({"side_attention": "own", "side_layers": 2}, "side_layers must be null with side_att"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        from_fields({"side_attention": "base", **fields})


def test_layers_follow_from_the_base_and_are_held_against_it() -> None:
    base, _ = make_base("llama")
    assert fork_config().resolved(base).side_layers == min(DEFAULT_SIDE_LAYERS, len(base.layers))
    with pytest.raises(AdapterError, match="side_layers must be at most the base's 3, got 4"):
        fork_config(side_layers=4).resolved(base)
    with pytest.raises(AdapterError, match="rank must be at most hidden_size 64, got 65"):
        fork_config(rank=65).resolved(base)
    with pytest.raises(AdapterError, match="a fork has no narrow decoder"):
        fork_config().side_spec(base)


@pytest.mark.parametrize("kind", ["llama", "opt", "phi"])
def test_tensors_are_those_of_queries_outputs_and_mlp(kind: str) -> None:
    base, _ = make_base(kind)
    config = fork_config(side_layers=1, rank=2, task="sequence_classification", num_labels=3)
    names = {name for name, _ in qst_tensors(config.resolved(base), base)}
    linears = ("q", "o", "gate", "up", "down") if base.gated_mlp else ("q", "o", "up", "down")
    last = len(base.layers) - 1
    expected = {f"layers.{last}.{n}.{side}" for n in linears for side in ("left", "right")}
    assert names == expected | {"classifier.weight"}


def test_fresh_fork_is_the_base() -> None:
    spec, weights = paper_base(is_quantized=True)
    decoder = Decoder(spec, weights)
    network = make_network(spec, is_fresh=True, side_attention="base", side_layers=3)
    fork = decoder.attach(network.side_network())  # type: ignore[arg-type]
    cache = decoder.make_cache(num_blocks=2)
    base, adapted = (run(decoder, cache, [Row(TOKENS, fork=f)]) for f in (None, fork))
    torch.testing.assert_close(adapted, base, rtol=0, atol=1e-5)


def save(folder: Path, network: QstNetwork) -> None:
    save_qst(folder, network, base_id="tiny", base_fingerprint="0" * 64, base_quantization="none")


def test_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    spec, _ = paper_base()
    network = make_network(spec, side_attention="base", side_layers=2, rank=5)
    save(tmp_path, network)
    adapter = load_qst(tmp_path, spec, fingerprint="0" * 64, model_id="tiny")
    assert isinstance(adapter.network, ForkNetwork)
    assert adapter.network.num_layers == 2
    for name, delta in adapter.network.deltas.items():
        assert torch.equal(delta.left, network.get_parameter(f"{name}.left"))
        assert torch.equal(delta.right, network.get_parameter(f"{name}.right"))
    assert adapter.qst == network.config
    rows = dict(describe_qst(read_adapter(tmp_path)))
    assert rows["forked layers"] == "the last 2, differences of rank 5"


def test_file_for_other_heads_is_refused_by_name(tmp_path: Path) -> None:
    spec, _ = paper_base()
    save(tmp_path, make_network(spec, side_attention="base", side_layers=1))
    layers = tuple(dataclasses.replace(layer, num_attention_heads=8) for layer in spec.layers)
    other = dataclasses.replace(spec, layers=layers)
    with pytest.raises(
        AdapterError, match=r"layers.3.q.left: shape \(64, 16\), expected \(128, 16"
    ):
        load_qst(tmp_path, other, fingerprint="0" * 64, model_id="tiny")


def make_examples() -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for length in (9, 20, 5, 14):
        ids = torch.randint(0, 97, (length,), generator=generator).tolist()
        found.append(
            Example(token_ids=ids, is_target=[0] * (length // 2) + [1] * (length - length // 2))
        )
    return found


def make_trainer(kind: str, **options: object) -> tuple[Trainer, Decoder]:
    spec, weights = make_base(kind, is_quantized=True)
    decoder = Decoder(spec, weights, kernels="reference", head="dense")
    network = make_network(spec, side_attention="base", side_layers=2, rank=4)
    weight = weights["embed.weight" if spec.tied_head else "head.weight"]
    head = FrozenHead(decoder, weight, CPU)  # type: ignore[arg-type]
    config = TrainingConfig(compute_dtype="float32", **options)  # type: ignore[arg-type]
    return Trainer(decoder, network, head, config), decoder


@pytest.mark.parametrize("kind", ["llama", "qwen3", "opt", "phi", "neox"])
def test_training_computes_what_serving_does(kind: str) -> None:
    trainer, decoder = make_trainer(kind)
    fork = decoder.attach(trainer.network.side_network())  # type: ignore[arg-type]
    losses, count = 0.0, 0
    for example in make_examples():
        rows = [i for i in range(1, len(example.token_ids)) if example.is_target[i]]
        row = Row(example.token_ids, fork=fork, num_outputs=len(example.token_ids))
        logits = run(decoder, decoder.make_cache(num_blocks=2), [row])
        targets = torch.tensor([example.token_ids[i] for i in rows])
        before = torch.tensor([i - 1 for i in rows])
        losses += float(F.cross_entropy(logits[before], targets, reduction="sum"))
        count += len(rows)
    found = trainer.evaluate(make_examples(), with_base=True)
    assert found.loss == pytest.approx(losses / count, rel=1e-5)
    assert found.base_loss is not None
    assert abs(found.base_loss - found.loss) > 1e-3


def test_gradient_is_that_of_the_loss() -> None:
    trainer, _ = make_trainer("llama", clip=1e9)
    examples = make_examples()
    parameter = trainer.network.get_parameter("layers.1.up.right")
    with torch.no_grad():
        before = parameter.clone()
    trainer.step([examples], 0.0)
    gradient = parameter.grad
    assert gradient is not None
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.copy_(before + sign * 1e-2 * direction)
        losses.append(trainer.evaluate(examples).loss)
    slope = (losses[0] - losses[1]) / 2e-2
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=0.02)
    assert all(p.grad is not None for p in trainer.network.parameters())


def test_base_of_factors_is_refused_by_name() -> None:
    spec, weights = make_decoder_parts("llama", is_low_rank=True)
    decoder = Decoder(spec, weights, kernels="reference", head="dense")
    network = make_network(spec, side_attention="base", side_layers=1)
    with pytest.raises(AdapterError, match=r"layers.2.q: two factors.*side_attention own does"):
        Trainer(decoder, network, None, TrainingConfig())


def test_training_lowers_the_loss_and_leaves_the_base() -> None:
    trainer, decoder = make_trainer("llama", learning_rate=2e-2)
    batch = pack_examples(make_examples())
    before = [state.clone() for state in decoder.hidden_states(batch.packed)]
    start = trainer.evaluate(make_examples()).loss
    for _ in range(12):
        trainer.step([make_examples()], 1.0)
    assert trainer.evaluate(make_examples()).loss < 0.8 * start
    after = list(decoder.hidden_states(batch.packed))
    assert all(map(torch.equal, before, after))
