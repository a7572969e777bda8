"""Five selections per layer: what they leave, what it computes, and what is refused."""

import dataclasses

import pytest
import torch
from torch import Tensor

from models.decoder import Decoder
from models.kernels.reference import operations as reference
from models.program import Norm
from models.pruning import (
    MODULES,
    LayerSelection,
    check_selections,
    count_fixed,
    count_linears,
    kept_parts,
    prune_spec,
    slice_weight,
    widths_of,
)
from models.spec import DecoderSpec, LayerSpec, SpecError, canonical_weights
from models.weights import dense
from tests.models.kernels.random_decoders import KINDS, make_decoder_parts, pack_batch, run_alone
from tests.models.random_selections import WIDTHS, random_selections, whole_selections

SEQUENCE = [(7 * i + 3) % 100 for i in range(40)]
Weights = dict[str, Tensor]


def base_parts(kind: str) -> tuple[DecoderSpec, Weights]:
    spec, weights = make_decoder_parts(kind)
    return spec, {name: dense(weight) for name, weight in weights.items()}


def pruned_parts(
    kind: str, widths: tuple[int, ...] = WIDTHS
) -> tuple[DecoderSpec, Weights, DecoderSpec, Weights]:
    """Return a base, and what random selections make of it."""
    spec, weights = base_parts(kind)
    chosen = random_selections(spec, widths)
    sliced = {name: slice_weight(name, weight, spec, chosen) for name, weight in weights.items()}
    return spec, weights, prune_spec(spec, chosen), sliced


def masked_weights(kind: str, widths: tuple[int, ...]) -> Weights:
    """Zero what is removed; a zero column ignores a channel, a zero row leaves it as it was."""
    spec, weights = base_parts(kind)
    chosen = random_selections(spec, widths)
    masked = {}
    for name, weight in weights.items():
        masked[name] = weight.clone()
        for dim, kept in enumerate(kept_parts(name, spec, chosen)):
            if kept is not None:
                removed = [i for i in range(weight.shape[dim]) if i not in kept]
                masked[name].index_fill_(dim, torch.tensor(removed), 0.0)
    return masked


@pytest.mark.parametrize("kind", KINDS)
def test_sliced_weights_are_those_of_the_pruned_spec(kind: str) -> None:
    _, _, pruned, sliced = pruned_parts(kind)
    shapes = {name: shape for name, shape, _ in canonical_weights(pruned)}
    assert {name: tuple(weight.shape) for name, weight in sliced.items()} == shapes
    assert widths_of(pruned) == (WIDTHS,) * 3


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("widths", [WIDTHS, (1, 1, 1, 1, 1), (32, 64, 32, 96, 64)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sliced_decoder_computes_what_the_masked_base_does(
    kernels: str, kind: str, widths: tuple[int, ...]
) -> None:
    spec, _, pruned, sliced = pruned_parts(kind, widths)
    results = []
    for parts in ((spec, masked_weights(kind, widths)), (pruned, sliced)):
        decoder = Decoder(*parts, kernels=kernels, head="dense", num_threads=1)  # type: ignore[arg-type]
        cache = decoder.make_cache(num_blocks=4, dtype=torch.float32)
        steps = [(0, 20), (20, 21), (21, 37), *((i, i + 1) for i in range(37, 40))]
        logits = [
            decoder.forward(pack_batch([SEQUENCE], [[3, 0, 2]], [span]), cache) for span in steps
        ]
        results.append(torch.cat(logits))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)
    assert results[0].std() > 0.1


def test_norm_statistics_run_over_channels_that_are_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, _, pruned, sliced = pruned_parts("llama")
    right = run_alone(Decoder(pruned, sliced, kernels="reference", head="dense"), SEQUENCE)
    apply_norm = reference.apply_norm

    def select_first(x: Tensor, norm: Norm) -> Tensor:
        if norm.indices is None:
            return apply_norm(x, norm)
        kept = norm.indices.long()
        weight = norm.weight[kept]
        return apply_norm(x[:, kept], dataclasses.replace(norm, weight=weight, indices=None))

    monkeypatch.setattr(reference, "apply_norm", select_first)
    wrong = run_alone(Decoder(pruned, sliced, kernels="reference", head="dense"), SEQUENCE)
    assert (right - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_whole_selections_change_nothing(kind: str) -> None:
    spec, weights = base_parts(kind)
    chosen = whole_selections(spec)
    assert prune_spec(spec, chosen) == spec
    assert all(slice_weight(name, w, spec, chosen) is w for name, w in weights.items())


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_the_weights(kind: str) -> None:
    spec, weights, pruned, sliced = pruned_parts(kind)
    for of, held in ((spec, weights), (pruned, sliced)):
        matrices = {n: w.numel() for n, w in held.items() if n.startswith("layers.") and w.ndim > 1}
        biases = sum(w.numel() for n, w in held.items() if n.endswith(".bias"))
        total = sum(w.numel() for w in held.values())
        assert count_linears(spec, widths_of(of)) == sum(matrices.values())
        assert count_linears(spec, widths_of(of)) + count_fixed(of) + biases == total
    assert count_fixed(pruned) == count_fixed(spec)


def test_count_of_llama_2_7b() -> None:
    layer = LayerSpec(
        num_attention_heads=32, num_key_value_heads=32, head_dim=128, intermediate_size=11008
    )
    spec = DecoderSpec(
        family="llama", vocab_size=32000, hidden_size=4096, max_position_embeddings=4096,
        layers=(layer,) * 32, norm="rms", norm_eps=1e-5, activation="silu", gated_mlp=True,
    )  # fmt: skip
    assert count_linears(spec, widths_of(spec)) == 6_476_005_376
    assert count_fixed(spec) == 2 * 32000 * 4096 + 65 * 4096


def test_count_of_tensors_can_be_differentiated() -> None:
    spec, _ = base_parts("llama")
    widths = torch.tensor([WIDTHS] * 3, dtype=torch.float64, requires_grad=True)
    count = count_linears(spec, [list(layer) for layer in widths])
    assert int(count) == count_linears(spec, [WIDTHS] * 3)
    count.backward()
    assert widths.grad is not None
    # q and k and v: 64 + 2 * 32 rows; o: 64 columns; gate and up: 2 matrices.
    assert widths.grad[1].tolist() == [128, 64, 2 * 80, 2 * 33 + 17, 80]


def changed(spec: DecoderSpec, **changes: object) -> tuple[LayerSelection, ...]:
    first, *others = whole_selections(spec)
    return (dataclasses.replace(first, **changes), *others)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("module", "kept", "message"),
    [
        ("attn_in", (-1, 2), "layer 0, attn_in: indices must be 0 to 63, got -1"),
        ("attn_out", (0, 64), "layer 0, attn_out: indices must be 0 to 63, got 64"),
        ("mlp_in", (3, 3), "layer 0, mlp_in: .* strictly increasing, got 3 after 3"),
        ("mlp_mid", (9, 4), "layer 0, mlp_mid: .* strictly increasing, got 4 after 9"),
        ("mlp_mid", (160,), "layer 0, mlp_mid: indices must be 0 to 159, got 160"),
        ("mlp_out", (), "layer 0, mlp_out: must keep at least 1 channel of 0 to 63, got none"),
    ],
)
def test_wrong_selection_is_named(module: str, kept: tuple[int, ...], message: str) -> None:
    spec, _ = base_parts("llama")
    with pytest.raises(SpecError, match=message):
        check_selections(spec, changed(spec, **{module: kept}))


def test_all_problems_are_in_one_message() -> None:
    spec, _ = base_parts("llama")
    wrong = changed(spec, **dict.fromkeys(MODULES, (5, 5, 700)))
    with pytest.raises(SpecError) as caught:
        prune_spec(spec, wrong[:2])
    for module in MODULES:
        assert f"layer 0, {module}: indices must be 0 to" in str(caught.value)
    assert str(caught.value).count("5 after 5") == 5
    assert "selections must be for 3 layers, got 2" in str(caught.value)


def test_pruned_decoder_is_not_pruned_again() -> None:
    spec, _, pruned, _ = pruned_parts("llama")
    with pytest.raises(SpecError, match="layer 1 of the decoder is pruned already"):
        prune_spec(pruned, whole_selections(spec))
