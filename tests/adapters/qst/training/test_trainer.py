"""One step of training: its gradient, its optimiser, its failures."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.frozen_head import FrozenHead, head_weight, perplexity
from adapters.packed_attention import PackedAttention
from adapters.precision import resolve_dtype
from adapters.qst.config import QstConfig
from adapters.qst.examples import Example, pack_examples
from adapters.qst.network import QstNetwork
from adapters.qst.trainer import Trainer
from adapters.qst.training_config import TrainingConfig
from adapters.training_state import TrainingError
from models.checkpoints import Checkpoint
from models.decoder import Decoder
from models.kernels.reference.operations import blend_side, run_side

CPU = torch.device("cpu")
MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer(checkpoint: Checkpoint, decoder: Decoder) -> MakeTrainer:
    def make(qst: QstConfig | None = None, **options: object) -> Trainer:
        qst = qst or QstConfig(reduction=4)
        network = QstNetwork(decoder.spec, qst)
        with torch.no_grad():
            network.get_parameter("alpha").fill_(0.7)  # at 1 nothing but alpha has a gradient
        head = FrozenHead(decoder, head_weight(checkpoint), CPU)
        is_classifier = qst.task == "sequence_classification"
        config = TrainingConfig(**options)  # type: ignore[arg-type]
        return Trainer(decoder, network, None if is_classifier else head, config)

    return make


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    found = {}
    for name, parameter in trainer.network.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found


def test_gradient_is_that_of_plain_autograd(
    make_trainer: MakeTrainer, checkpoint: Checkpoint, decoder: Decoder, examples: list[Example]
) -> None:
    trainer = make_trainer(clip=1e9, compute_dtype="float32")
    network = copy.deepcopy(trainer.network)
    result = trainer.step([examples[:5]], 1.0)
    batch = pack_examples(examples[:5])
    hidden = list(decoder.hidden_states(batch.packed))
    attend = PackedAttention(batch.packed.query_starts, CPU)
    program, positions = network.program(), batch.packed.positions.long()
    side = run_side(program, hidden, positions, attend=attend)
    states = blend_side(program, decoder.apply_final_norm(hidden[-1]), side)
    weight = head_weight(checkpoint)
    assert isinstance(weight, Tensor)
    loss = F.cross_entropy(F.linear(states, weight.float())[batch.rows], batch.targets)
    loss.backward()
    assert result.loss == pytest.approx(loss.item())
    assert result.num_tokens == len(batch.packed.token_ids)
    for name, gradient in gradients(trainer).items():
        torch.testing.assert_close(gradient, network.get_parameter(name).grad, msg=name)


def test_accumulated_batches_count_every_target_alike(
    make_trainer: MakeTrainer, examples: list[Example]
) -> None:
    together, apart = (make_trainer(compute_dtype="float32") for _ in range(2))
    one = together.step([examples[:7]], 1.0)
    several = apart.step([examples[:1], examples[1:4], examples[4:7]], 1.0)
    assert one.loss == pytest.approx(several.loss, rel=1e-6)
    found = gradients(apart)
    for name, gradient in gradients(together).items():
        torch.testing.assert_close(gradient, found[name], msg=name)


def test_base_stays_as_it_is(
    make_trainer: MakeTrainer, checkpoint: Checkpoint, examples: list[Example]
) -> None:
    before = {name: weight.clone() for name, weight in checkpoint.weights.items()}  # type: ignore[union-attr]
    trainer = make_trainer()
    for _ in range(3):
        trainer.step([examples], 1.0)
    for name, weight in checkpoint.weights.items():
        assert isinstance(weight, Tensor)
        assert weight.grad is None
        assert torch.equal(weight, before[name]), name


def test_gates_have_their_own_rate_and_no_decay(
    make_trainer: MakeTrainer, examples: list[Example]
) -> None:
    trainer = make_trainer(learning_rate=1e-3, alpha_learning_rate=1e-2, weight_decay=0.5)
    groups = trainer.optimizer.param_groups
    decay_of = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    for name, parameter in trainer.network.named_parameters():
        is_matrix = parameter.ndim == 2
        assert decay_of[id(parameter)] == (0.5 if is_matrix else 0.0), name
    trainer.step([examples], 0.5)
    alpha = trainer.network.get_parameter("alpha")
    assert abs(alpha.item() - 0.7) == pytest.approx(0.5e-2, rel=1e-3)  # Adam's first step
    assert [group["lr"] for group in groups] == [5e-3, 5e-4, 5e-4]


def test_large_gradient_is_clipped(make_trainer: MakeTrainer, examples: list[Example]) -> None:
    trainer = make_trainer(clip=1e-3)
    result = trainer.step([examples], 1.0)
    norm = torch.stack([g.norm() for g in gradients(trainer).values()]).norm().item()
    assert result.gradient_norm > 1e-2
    assert norm == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("downsample", ["linear", "lora", "adapter", "maxpool", "avgpool"])
def test_bfloat16_is_close_and_leaves_parameters_float32(
    downsample: str, make_trainer: MakeTrainer, examples: list[Example]
) -> None:
    qst = QstConfig(reduction=4, downsample=downsample)  # type: ignore[arg-type]
    exact, rounded = (make_trainer(qst, compute_dtype=dtype) for dtype in ("float32", "bfloat16"))
    losses = [trainer.step([examples], 1.0).loss for trainer in (exact, rounded)]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
    assert losses[0] != losses[1]
    assert {p.dtype for p in rounded.network.parameters()} == {torch.float32}


def test_auto_is_float32_where_bfloat16_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    assert resolve_dtype("auto", CPU) == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert resolve_dtype("auto", CPU) == torch.bfloat16
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16


def test_loss_that_is_not_finite_changes_nothing(
    make_trainer: MakeTrainer, examples: list[Example]
) -> None:
    trainer = make_trainer()
    up = trainer.network.get_parameter("up.weight")
    with torch.no_grad():
        up[0, 0] = torch.nan
    before = copy.deepcopy(trainer.network.state_dict())
    with pytest.raises(TrainingError, match="the loss is nan"):
        trainer.step([examples], 1.0)
    for name, value in trainer.network.state_dict().items():
        assert torch.equal(value, before[name]) or name == "up.weight"
    assert not trainer.optimizer.state


def test_gradient_that_is_not_finite_is_refused(
    make_trainer: MakeTrainer, examples: list[Example]
) -> None:
    trainer = make_trainer()
    trainer.network.get_parameter("alpha").register_hook(lambda g: g * torch.inf)
    with pytest.raises(TrainingError, match="the norm of the gradient is inf"):
        trainer.step([examples], 1.0)


def test_evaluation_of_base_and_side_network(
    make_trainer: MakeTrainer, examples: list[Example]
) -> None:
    trainer = make_trainer(batch_size=5)
    found = trainer.evaluate(examples, with_base=True)
    assert found.base_loss is not None
    assert found.loss != found.base_loss
    with torch.no_grad():
        trainer.network.get_parameter("alpha").fill_(1.0)
    alone = trainer.evaluate(examples)
    assert alone.loss == pytest.approx(found.base_loss)
    assert (alone.base_loss, alone.accuracy) == (None, None)
    assert alone.perplexity == pytest.approx(perplexity(found.base_loss))


def test_perplexity_of_a_hopeless_loss_is_infinite() -> None:
    assert perplexity(1e6) == float("inf")


def test_classifier_learns_what_the_last_token_tells(make_trainer: MakeTrainer) -> None:
    qst = QstConfig(reduction=4, task="sequence_classification", num_labels=2)
    trainer = make_trainer(qst, learning_rate=0.03)
    examples = [Example(token_ids=[i, i + 1, 100 + 50 * (i % 2)], label=i % 2) for i in range(12)]
    before = trainer.evaluate(examples)
    for _ in range(12):
        trainer.step([examples], 1.0)
    after = trainer.evaluate(examples)
    assert after.loss < before.loss / 2
    assert after.accuracy == 1.0
    assert after.base_loss is None
