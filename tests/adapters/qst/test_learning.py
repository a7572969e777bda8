"""What gradients reach, and what training changes."""

import pytest
import torch
from torch import nn

from adapters.qst.network import QstNetwork
from models.checkpoints.checkpoint import fingerprint_weights
from models.decoder import Decoder
from models.spec import DecoderSpec
from models.weights import Weight
from tests.adapters.side_decoders import (
    DOWNSAMPLES,
    TOKENS,
    FrozenStates,
    freeze_states,
    make_base,
    make_network,
    paper_base,
    train_logits,
    train_loss,
)
from tests.models.kernels.random_decoders import KINDS

SEQUENCES = [TOKENS, TOKENS[5:20]]
# Softmax does not see what is added to the scores of all keys alike.
WITHOUT_GRADIENT = ("k.bias",)


def make_decoder(spec: DecoderSpec, weights: dict[str, Weight]) -> Decoder:
    return Decoder(spec, weights, kernels="reference", head="dense")


def optimizer_of(network: nn.Module, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.0)


@pytest.mark.parametrize(
    ("kind", "downsample"),
    [*(("paper", name) for name in DOWNSAMPLES), *((kind, "adapter") for kind in KINDS)],
)
def test_first_step_moves_alpha_and_the_second_reaches_everything(
    kind: str, downsample: str
) -> None:
    spec, weights = make_base(kind)
    decoder = make_decoder(spec, weights)
    network = make_network(spec, downsample=downsample, is_fresh=True)
    train_loss(decoder, network, SEQUENCES).backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    assert gradients.pop("alpha").abs() > 0  # type: ignore[union-attr]
    assert [name for name, g in gradients.items() if g is None or g.any()] == []

    optimizer = optimizer_of(network, 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    train_loss(decoder, network, SEQUENCES).backward()
    unreached = [
        name
        for name, p in network.named_parameters()
        if not name.endswith(WITHOUT_GRADIENT) and (p.grad is None or not p.grad.any())
    ]
    assert unreached == []
    assert network.get_parameter("gamma").grad.all()  # type: ignore[union-attr]
    assert all(w.grad is None for w in weights.values() if isinstance(w, torch.Tensor))


@pytest.mark.parametrize(
    ("dtype", "moves"), [(torch.bfloat16, False), (torch.float32, True)], ids=["bf16", "fp32"]
)
def test_alpha_is_float32_because_bfloat16_never_leaves_one(
    dtype: torch.dtype, moves: bool
) -> None:
    spec, weights = paper_base()
    decoder = make_decoder(spec, weights)
    network = make_network(spec, is_fresh=True)
    assert network.get_parameter("alpha").dtype == torch.float32
    network.register_parameter("alpha", nn.Parameter(torch.ones((), dtype=dtype)))
    optimizer = optimizer_of(network, 2e-4)
    for _ in range(50):
        optimizer.zero_grad()
        train_loss(decoder, network, [TOKENS[:12]]).backward()
        optimizer.step()
    distance = abs(network.get_parameter("alpha").item() - 1)
    assert distance >= 1e-3 if moves else distance == 0


def copy_task(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    halves = torch.randint(0, 8, (count, 6), generator=generator).tolist()
    return [[*half, 255, *half] for half in halves]


def copy_loss(decoder: Decoder, network: QstNetwork, states: FrozenStates) -> torch.Tensor:
    logits = train_logits(decoder, network, states).view(64, -1, 256)
    targets = states.batch.token_ids.view(64, -1)[:, 7:].long()
    return nn.functional.cross_entropy(logits[:, 6:-1].flatten(0, 1), targets.flatten())


def test_training_learns_to_copy_and_leaves_the_base_alone() -> None:
    spec, weights = paper_base(is_quantized=True)
    decoder = make_decoder(spec, weights)
    before = fingerprint_weights(weights, "nf4")
    network = make_network(spec, is_fresh=True)
    states = freeze_states(decoder, copy_task(64))
    others = [p for name, p in network.named_parameters() if name != "alpha"]
    optimizer = torch.optim.AdamW(
        [{"params": [network.get_parameter("alpha")], "lr": 1e-2}, {"params": others, "lr": 5e-3}],
        weight_decay=0.0,
    )
    losses: list[float] = []
    while len(losses) < 300 and (not losses or losses[-1] > 0.5 * losses[0]):
        optimizer.zero_grad()
        loss = copy_loss(decoder, network, states)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] <= 0.5 * losses[0]
    assert fingerprint_weights(weights, "nf4") == before


def test_network_follows_its_parameters_wherever_they_go() -> None:
    spec, weights = paper_base()
    decoder, network = make_decoder(spec, weights), make_network(spec)
    states = freeze_states(decoder, [TOKENS])
    first = train_logits(decoder, network, states)
    other = make_network(spec, seed=5)
    expected = train_logits(decoder, other, states)
    network.load_state_dict(other.state_dict())
    assert not torch.equal(first, expected)
    assert torch.equal(train_logits(decoder, network, states), expected)
    network.load_state_dict(make_network(spec, seed=6).state_dict(), assign=True)
    network.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(train_logits(decoder, network, states), expected)
