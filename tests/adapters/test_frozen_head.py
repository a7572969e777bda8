"""Cross entropy through a frozen head against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adapters import frozen_head as module
from adapters.frozen_head import FrozenHead, head_loss
from models.quantization import quantize_4bit
from models.weights import Matrix, dense
from tests.models.gguf_files import random_blocks

CPU = torch.device("cpu")


class DenseLogits:
    def __init__(self, weight: Matrix) -> None:
        self.weight = dense(weight)
        self.largest = 0

    def logits(self, states: Tensor) -> Tensor:
        self.largest = max(self.largest, len(states))
        return F.linear(states, self.weight)


@pytest.mark.parametrize("kind", ["float32", "float16", "4-bit", "Q8_0"])
def test_loss_and_gradient_are_those_of_cross_entropy(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK_VALUES", 90 * 5)
    monkeypatch.setattr(module, "_SOFTMAX_ROWS", 3)
    monkeypatch.setattr(module, "_VOCABULARY_ROWS", 32)
    torch.manual_seed(0)
    weight: Matrix = torch.randn(90, 64)
    if kind == "4-bit":
        weight = quantize_4bit(weight)
    elif kind == "Q8_0":
        weight = random_blocks(90, 64, "Q8_0")
    elif kind == "float16":
        weight = weight.half()
    source = DenseLogits(weight)
    states = torch.randn(17, 64, requires_grad=True)
    targets = torch.randint(0, 90, (17,))
    found = head_loss(states, targets, FrozenHead(source, weight, CPU)) / 17
    expected = F.cross_entropy(F.linear(states, source.weight), targets)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x, states)[0] for x in (found, expected)]
    rounding = 1e-3 if kind == "Q8_0" else None  # unpacked to 16 bits
    torch.testing.assert_close(*gradients, rtol=rounding, atol=rounding and 1e-5)
    assert source.largest == 5  # logits of the whole batch are never there together


def test_loss_of_an_unlikely_target_is_finite() -> None:
    weight = torch.tensor([[1000.0], [-1000.0]])
    states = torch.ones(1, 1, requires_grad=True)
    loss = head_loss(states, torch.tensor([1]), FrozenHead(DenseLogits(weight), weight, CPU))
    assert loss.item() == 2000.0
    loss.backward()
    assert states.grad is not None
    assert states.grad.item() == 2000.0


def test_loss_without_gradient_computes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(9, 4)
    head = FrozenHead(DenseLogits(weight), weight, CPU)
    monkeypatch.setattr(head, "pull_back", None)
    states, targets = torch.randn(3, 4), torch.tensor([0, 8, 4])
    expected = F.cross_entropy(F.linear(states, weight), targets, reduction="sum")
    torch.testing.assert_close(head_loss(states, targets, head), expected)
