"""Two decoders in step: each must be what it would be by itself."""

import pytest
import torch
from torch import Tensor

from adapters.calibration import observe_linears
from adapters.mixed_rank.walk import Walk, layer_matrices, products_of, run_layer
from adapters.packed_attention import PackedAttention
from models.kernels.reference.operations import walk_layers
from models.program import LinearOp, Program, build_program
from models.weights import dense
from tests.models.kernels.random_decoders import KINDS, make_decoder_parts

DECODERS = (*KINDS, "llama pruned", "neox pruned")
TEXTS = [torch.randint(3, 60, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 5, 1)]


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def make_program(kind: str, replaced: dict[str, Tensor] | None = None) -> Program:
    name, _, pruned = kind.partition(" ")
    spec, weights = make_decoder_parts(name, is_pruned=bool(pruned))
    weights = {**weights, **(replaced or {})}
    return build_program(spec, weights, dense(weights.get("head.weight", weights["embed.weight"])))


def streams_of(program: Program) -> list[list[Tensor]]:
    """The residual streams of every text, layer by layer."""
    device = torch.device("cpu")
    return [
        list(
            walk_layers(
                program, text, torch.arange(len(text)),
                attend=PackedAttention(torch.tensor([0, len(text)]), device),
            )
        )
        for text in TEXTS
    ]  # fmt: skip


def replaced_products(op: LinearOp, replaced: dict[str, Tensor]) -> list[Tensor]:
    return [
        replaced.get(f"{name}.weight", dense(piece.weight))
        for name, piece in zip(op.names, op.pieces, strict=True)
    ]


@pytest.mark.parametrize("kind", DECODERS)
def test_both_decoders_are_what_they_are_by_themselves(kind: str) -> None:
    program = make_program(kind)
    replaced = {
        f"{name}.weight": draw(tuple(piece.weight.shape), seed)
        for layer in program.layers
        for op in layer
        if isinstance(op, LinearOp)
        for seed, (name, piece) in enumerate(zip(op.names, op.pieces, strict=True))
        if not name.endswith(".q")  # one that stays as it is
    }
    other = make_program(kind, replaced)
    plain_streams, other_streams = streams_of(program), streams_of(other)
    read: dict[str, list[Tensor]] = {}
    observe_linears(
        other, [[text] for text in TEXTS], lambda name, x: read.setdefault(name, []).append(x)
    )
    streams = None
    for i in range(len(program.layers)):
        walk = Walk(program, TEXTS, has_drift=True, streams=streams)
        before = walk.streams if streams is None else streams[1]
        products = layer_matrices(program, i)
        for op in walk.linears(i, products):
            pairs = list(walk.inputs(op)) if op.accumulate else []  # the rest are not asked for
            for (_, drifted), wanted in zip(pairs, read[op.names[0]], strict=bool(pairs)):
                torch.testing.assert_close(drifted, wanted, rtol=1e-5, atol=1e-5)
            found = replaced_products(op, replaced)
            walk.replace(op, found)
            products |= products_of(op, found)
        compressed = [run_layer(program, i, x, products) for x in before]
        for number, pair in enumerate(zip(walk.streams, compressed, strict=True)):
            torch.testing.assert_close(pair[0], plain_streams[number][i + 1], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(pair[1], other_streams[number][i + 1], rtol=1e-5, atol=1e-5)
        streams = walk.streams, compressed


@pytest.mark.parametrize("kind", DECODERS)
def test_inputs_are_those_that_calibration_observes(kind: str) -> None:
    program = make_program(kind)
    expected: dict[str, list[Tensor]] = {}
    observe_linears(
        program, [[text] for text in TEXTS], lambda name, x: expected.setdefault(name, []).append(x)
    )
    seen, streams = set(), None
    for i in range(len(program.layers)):
        walk = Walk(program, TEXTS, has_drift=True, streams=streams)
        for op in walk.linears(i, layer_matrices(program, i)):
            pairs = list(walk.inputs(op))
            for name in op.names:
                seen.add(name)
                for (rows, drifted), wanted in zip(pairs, expected[name], strict=True):
                    torch.testing.assert_close(rows, wanted, rtol=1e-5, atol=1e-5)
                    torch.testing.assert_close(drifted, wanted, rtol=1e-5, atol=1e-5)
        streams = walk.streams, walk.streams
    assert seen == set(expected)


def test_factors_compute_what_their_product_does_and_pieces_share_the_right_one() -> None:
    program = make_program("llama")
    plain, factored = layer_matrices(program, 0), layer_matrices(program, 0)
    for seed, op in enumerate(op for op in program.layers[0] if isinstance(op, LinearOp)):
        right = draw((4, op.in_features), seed)
        pairs = [(draw((p.weight.shape[0], 4), seed + 9), right) for p in op.pieces]
        factored |= products_of(op, pairs)
        plain |= products_of(op, [left @ right for left, right in pairs])
    stream = draw((7, program.widths["x"]), 3)
    torch.testing.assert_close(
        run_layer(program, 0, stream, factored), run_layer(program, 0, stream, plain)
    )


def test_without_drift_only_the_decoder_as_it_was_is_computed() -> None:
    program = make_program("llama")
    walk = Walk(program, TEXTS, has_drift=False)
    for op in walk.linears(0, layer_matrices(program, 0)):
        assert all(drifted is None for _, drifted in walk.inputs(op))
