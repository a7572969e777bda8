"""Masking equals slicing, for every architecture, and changes nothing where all is kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.disp.masked import MaskedDecoder, Masks, mask_channels
from adapters.disp.searcher import selection_masks
from models.decoder import Decoder
from models.kernels.reference import operations as reference
from models.program import Norm
from models.pruning import prune_spec, slice_weight, widths_of
from models.q4_1 import quantize_q4_1
from models.spec import DecoderSpec
from models.weights import Weight, dense
from tests.adapters.fitted_base import make_random
from tests.models.kernels.random_decoders import KINDS, pack_batch
from tests.models.random_selections import random_selections

TOKENS = [(7 * i + 3) % 97 for i in range(24)]
CPU = torch.device("cpu")


def ones(spec: DecoderSpec) -> Masks:
    return [[torch.ones(width) for width in layer] for layer in widths_of(spec)]


def masked_logits(decoder: MaskedDecoder, tokens: list[int], masks: Masks | None = None) -> Tensor:
    with torch.no_grad():
        hook = None if masks is None else mask_channels(masks)
        return decoder.logits(decoder.states(torch.tensor([tokens]), hook)[0])


def reference_logits(
    spec: DecoderSpec, weights: dict[str, Weight], tokens: list[int], *, prefilled: int
) -> Tensor:
    """Compute some tokens at once and the rest one by one."""
    decoder = Decoder(spec, weights, kernels="reference", head="dense")
    cache = decoder.make_cache(num_blocks=2)
    spans = [(0, prefilled), *((i, i + 1) for i in range(prefilled, len(tokens)))]
    return torch.cat(
        [decoder.forward(pack_batch([tokens], [[0, 1]], [span]), cache) for span in spans]
    )


@pytest.mark.parametrize("has_biases", [True, False], ids=["biases", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_ones_change_no_bit(kind: str, has_biases: bool) -> None:
    spec, weights = make_random(kind, has_biases=has_biases)
    decoder = MaskedDecoder(spec, weights)
    plain = masked_logits(decoder, TOKENS)
    assert torch.equal(masked_logits(decoder, TOKENS, ones(spec)), plain)
    expected = reference_logits(spec, weights, TOKENS, prefilled=len(TOKENS))
    torch.testing.assert_close(plain, expected, atol=1e-5, rtol=1e-5)


def test_masks_work_on_a_base_in_block_formats() -> None:
    spec, weights = make_random("llama", has_biases=False)
    in_blocks: dict[str, Weight] = {
        name: quantize_q4_1(dense(weight)) if len(weight.shape) == 2 else weight
        for name, weight in weights.items()
    }
    unpacked: dict[str, Weight] = {name: dense(weight) for name, weight in in_blocks.items()}
    masks = selection_masks(random_selections(spec), widths_of(spec), CPU)
    found, expected = (
        masked_logits(MaskedDecoder(spec, each), TOKENS, masks) for each in (in_blocks, unpacked)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("has_biases", [True, False], ids=["biases", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_equals_sliced_in_prefill_and_decode(kind: str, has_biases: bool) -> None:
    spec, weights = make_random(kind, has_biases=has_biases)
    selections = random_selections(spec)
    sliced = {n: slice_weight(n, w, spec, selections) for n, w in weights.items()}  # type: ignore[arg-type]
    expected = reference_logits(prune_spec(spec, selections), sliced, TOKENS, prefilled=15)
    masks = selection_masks(selections, widths_of(spec), CPU)
    found = masked_logits(MaskedDecoder(spec, weights), TOKENS, masks)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    half = masked_logits(MaskedDecoder(spec, weights, dtype=torch.bfloat16), TOKENS, masks)
    assert float((half - expected).norm() / expected.norm()) < 2e-2


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_statistics_over_selected_channels_would_not_do(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, weights = make_random(kind)
    selections = random_selections(spec)
    sliced = {n: slice_weight(n, w, spec, selections) for n, w in weights.items()}  # type: ignore[arg-type]
    apply_norm = reference.apply_norm

    def gather_first(x: Tensor, norm: Norm) -> Tensor:
        if norm.indices is None:
            return apply_norm(x, norm)
        kept = norm.indices.long()
        bias = None if norm.bias is None else norm.bias[kept]
        return apply_norm(x[:, kept], Norm(weight=norm.weight[kept], bias=bias, eps=norm.eps))

    monkeypatch.setattr(reference, "apply_norm", gather_first)
    wrong = reference_logits(prune_spec(spec, selections), sliced, TOKENS, prefilled=15)
    masks = selection_masks(selections, widths_of(spec), CPU)
    found = masked_logits(MaskedDecoder(spec, weights), TOKENS, masks)
    assert float((found - wrong).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_soft_middle_mask_counts_once(kind: str) -> None:
    spec, weights = make_random(kind)
    masks = [[m * (0.5 if j == 3 else 1.0) for j, m in enumerate(layer)] for layer in ones(spec)]
    halved = {n: w * 0.5 if n.endswith("down.weight") else w for n, w in weights.items()}  # type: ignore[operator]
    found = masked_logits(MaskedDecoder(spec, weights), TOKENS, masks)
    torch.testing.assert_close(found, masked_logits(MaskedDecoder(spec, halved), TOKENS))


def test_each_sequence_has_masks_of_its_own() -> None:
    spec, weights = make_random("llama")
    decoder = MaskedDecoder(spec, weights)
    alone = [selection_masks(random_selections(spec, seed=s), widths_of(spec), CPU) for s in (1, 2)]
    together = [
        [torch.stack(pair) for pair in zip(*layers, strict=True)]
        for layers in zip(*alone, strict=True)
    ]
    sequences = [TOKENS, TOKENS[::-1]]
    with torch.no_grad():
        states = decoder.states(torch.tensor(sequences), mask_channels(together))
        for i in range(2):
            expected = masked_logits(decoder, sequences[i], alone[i])
            torch.testing.assert_close(decoder.logits(states[i]), expected)


def test_each_stretch_of_a_sequence_has_masks_of_its_own() -> None:
    spec, weights = make_random("llama")
    decoder = MaskedDecoder(spec, weights)
    masks = [selection_masks(random_selections(spec, seed=s), widths_of(spec), CPU) for s in (1, 2)]
    layers = [
        [torch.stack(pair) for pair in zip(*both, strict=True)] for both in zip(*masks, strict=True)
    ]
    tokens = TOKENS[: len(TOKENS) // 2 * 2]
    half = len(tokens) // 2
    with torch.no_grad():
        found = masked_logits(decoder, tokens, layers)
        first, second = (masked_logits(decoder, tokens, m) for m in masks)
        by_token = [[m.repeat_interleave(half, 0) for m in layer] for layer in layers]
        torch.testing.assert_close(found, masked_logits(decoder, tokens, by_token))
    torch.testing.assert_close(found[:half], first[:half])
    assert not torch.allclose(found[half:], first[half:], atol=1e-3)
    assert not torch.allclose(found[half:], second[half:], atol=1e-3)  # attends to the first half


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_loss_and_its_gradient_are_plain_autograds(kind: str) -> None:
    spec, weights = make_random(kind)
    windows = torch.tensor([TOKENS, TOKENS[::-1]])
    found, expected = (
        [[m.requires_grad_() for m in layer] for layer in ones(spec)] for _ in range(2)
    )
    decoder = MaskedDecoder(spec, weights)
    loss = decoder.loss(windows, found)
    logits = decoder.logits(decoder.states(windows[:, :-1], mask_channels(expected)))
    plain = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    torch.testing.assert_close(loss, plain)
    loss.backward()
    plain.backward()
    for mine, theirs in zip(sum(found, []), sum(expected, []), strict=True):
        assert mine.grad is not None
        assert mine.grad.any()
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "computed-again"])
@pytest.mark.parametrize("kind", KINDS)
def test_squared_gradients_are_those_of_each_token(kind: str, recomputes: bool) -> None:
    spec, weights = make_random(kind)
    windows = torch.tensor([TOKENS[:9], TOKENS[9:18]])
    decoder = MaskedDecoder(spec, weights, gradient_checkpointing=recomputes)
    found = decoder.squared_gradients(windows)
    masks = [[torch.ones(16, w, requires_grad=True) for w in ws] for ws in widths_of(spec)]
    (decoder.loss(windows, masks) * 16).backward()
    for layer, wanted in zip(found, masks, strict=True):
        for total, mask in zip(layer, wanted, strict=True):
            assert mask.grad is not None
            assert mask.grad.any()
            assert torch.allclose(total, mask.grad.square().sum(0), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_computing_layers_again_changes_no_bit(kind: str) -> None:
    spec, weights = make_random(kind)
    windows, results = torch.tensor([TOKENS]), []
    for again in (False, True):
        masks = [[m.requires_grad_() for m in layer] for layer in ones(spec)]
        decoder = MaskedDecoder(spec, weights, gradient_checkpointing=again)
        loss = decoder.loss(windows, masks)
        results.append([loss, *torch.autograd.grad(loss, sum(masks, []))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_frozen_weights_have_no_gradient() -> None:
    spec, weights = make_random("qwen3")
    masks = [[m.requires_grad_() for m in layer] for layer in ones(spec)]
    MaskedDecoder(spec, weights).loss(torch.tensor([TOKENS]), masks).backward()
    assert all(w.grad is None for w in weights.values() if isinstance(w, Tensor))
