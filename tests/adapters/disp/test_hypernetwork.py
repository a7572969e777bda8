"""The hypernetwork starts with everything kept, or with the head start."""

import pytest
import torch

from adapters.disp.hypernetwork import Hypernetwork, head_start
from adapters.disp.structures import Structures
from tests.models.kernels.random_decoders import make_decoder_parts

SPEC, _ = make_decoder_parts("llama")  # D = 64, I = 160, three layers


def test_everything_is_kept_at_the_start() -> None:
    structures = Structures(SPEC, "independent")
    logits = Hypernetwork(structures.widths, seed=0)()
    assert logits.shape == (3 * (4 * 64 + 160),)
    assert float(logits.mean().detach()) == pytest.approx(3.0 / 0.4, abs=0.5)
    assert structures.threshold(logits).all()


def test_network_has_the_published_shapes() -> None:
    network = Hypernetwork([64, 160], seed=0)
    sizes = {name: tuple(p.shape) for name, p in network.named_state()}
    assert sizes["inputs"] == (2, 1, 32)
    assert sizes["heads.1.weight"] == (160, 128)
    assert sizes["norm.weight"] == (128,)
    assert sum(p.numel() for p in network.gru.parameters()) == 37_632
    assert not any(name.startswith("heads") and "bias" in name for name in sizes)


def test_seed_decides_and_leaves_torch_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (dict(Hypernetwork([8], seed=s).named_state()) for s in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["inputs"], other["inputs"])


def test_inputs_are_not_trained() -> None:
    network = Hypernetwork([8, 8], seed=0)
    network().sum().backward()
    assert not network.inputs.requires_grad
    assert all(p.grad is not None and p.grad.any() for p in network.heads.parameters())


def test_head_start_grows_with_importance_for_the_parameters_taken() -> None:
    importance, costs = torch.tensor([1.0, 30.0, 100.0, 0.0]), torch.tensor([1.0, 3.0, 1.0, 1.0])
    assert head_start(importance, costs).argsort().tolist() == [3, 0, 1, 2]
    assert head_start(importance[:3], costs[:3]).tolist() == pytest.approx([-1.2, 0.0, 1.2])


def test_equal_importance_gives_no_head_start() -> None:
    assert torch.equal(head_start(torch.full((5,), 3.0), torch.ones(5)), torch.zeros(5))


def test_network_starts_with_the_head_start_alone() -> None:
    network = Hypernetwork([4, 3], seed=0)
    network.head_start.copy_(torch.arange(7.0))
    assert torch.allclose(network(), (3.0 + torch.arange(7.0)) / 0.4)
