"""A side network's parameters, and the formulas that they stand for."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.qst.config import QstConfig
from adapters.qst.network import QstNetwork
from models.kernels.reference.operations import apply_downsample, blend_side
from tests.adapters.side_decoders import DOWNSAMPLES, make_base, make_network, paper_base


def downsample_by_formula(kind: str, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    first, second = tensors.get("first.weight"), tensors.get("second.weight")
    if kind == "maxpool":
        return torch.stack([x[:, 4 * i : 4 * i + 4].max(1).values for i in range(16)], dim=1)
    if kind == "avgpool":
        return torch.stack([x[:, 4 * i : 4 * i + 4].sum(1) / 4 for i in range(16)], dim=1)
    assert first is not None
    if kind == "linear":
        return x @ first.T
    assert second is not None
    if kind == "lora":
        return x @ first.T @ second.T
    middle = x @ first.T
    narrow = middle * middle.sigmoid() @ second.T
    centred = narrow - narrow.mean(1, keepdim=True)
    normed = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()
    return normed * tensors["norm.weight"] + tensors["norm.bias"]


@pytest.mark.parametrize("kind", DOWNSAMPLES)
def test_downsamples_are_the_papers(kind: str) -> None:
    network = make_network(paper_base()[0], downsample=kind)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for i, down in enumerate(network.side_network().downsamples):
        prefix = f"downsamples.{i}."
        tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in network.named_parameters()
            if name.startswith(prefix)
        }
        expected = downsample_by_formula(kind, tensors, x)
        torch.testing.assert_close(apply_downsample(x, down, 16), expected, rtol=0, atol=1e-5)


def test_tied_embedding_goes_through_the_first_layers_downsample() -> None:
    network = make_network(paper_base()[0], tie_embedding_downsample=True)
    downs = network.side_network().downsamples
    assert downs[0].first is downs[1].first
    assert downs[1].first is not downs[2].first


@pytest.mark.parametrize("shape", ["scalar", "vector"])
@pytest.mark.parametrize(
    ("gate", "share"), [("raw", 0.6), ("sigmoid", 0.645656), ("sigmoid_swapped", 0.354344)]
)
def test_gates_are_the_papers_or_the_published_codes(gate: str, share: float, shape: str) -> None:
    network = make_network(paper_base()[0], final_gate=gate, gate_shape=shape)
    gamma = network.get_parameter("gamma")
    with torch.no_grad():
        network.get_parameter("alpha").fill_(0.6)
    side = network.side_network()
    torch.testing.assert_close(side.base_share, torch.full((64,), share))
    expected = 1 / (1 + torch.exp(-gamma.view(4, -1).expand(4, 16)))
    torch.testing.assert_close(side.gates, expected)
    normed, stream = torch.randn(3, 64), torch.randn(3, 16)
    scale = torch.rsqrt(stream.pow(2).mean(1, keepdim=True) + 1e-5)
    up = F.linear(stream * scale * side.weights["final_norm.weight"], side.up, side.up_bias)
    blended = blend_side(network.program(), normed, stream)
    torch.testing.assert_close(blended, share * normed + (1 - share) * up, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["paper", "opt", "qwen3"])
def test_fresh_parameters_start_as_documented(kind: str) -> None:
    network = QstNetwork(make_base(kind)[0], QstConfig(reduction=4))
    for name, parameter in network.named_parameters():
        assert parameter.dtype == torch.float32
        if name == "alpha" or name.endswith("norm.weight"):
            assert bool((parameter == 1).all()), name
        elif parameter.ndim == 2:
            bound = parameter.shape[1] ** -0.5
            assert 0.9 * bound < parameter.abs().max() <= bound, name
        else:
            assert not parameter.any(), name


def test_seed_chooses_the_start() -> None:
    spec, _ = paper_base()
    states = [
        QstNetwork(spec, QstConfig(reduction=4), seed=seed).state_dict()["up.weight"]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_network_can_be_copied_once_it_has_run() -> None:
    network = make_network(paper_base()[0])
    network.program()
    twin = copy.deepcopy(network)
    with torch.no_grad():
        twin.get_parameter("layers.0.q.weight").zero_()
    assert twin.program().network.weights["layers.0.q.weight"].eq(0).all()  # type: ignore[union-attr]
    pieces = [op for op in twin.program().layers[0] if hasattr(op, "pieces")][0].pieces
    assert not pieces[0].weight.any()
    assert network.get_parameter("layers.0.q.weight").any()


def test_classifier_reads_blended_states() -> None:
    network = make_network(
        paper_base()[0], task="sequence_classification", num_labels=3, labels=("a", "b", "c")
    )
    states = torch.randn(2, 64)
    expected = states @ network.get_parameter("classifier.weight").T
    torch.testing.assert_close(network.classify(states), expected)
