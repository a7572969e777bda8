"""Two decoders in step: each must be what it would be by itself."""

import pytest
import torch
from torch import Tensor

from adapters.calibration import observe_linears
from adapters.mixed_rank.walk import Walk
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
    plain, other = streams_of(program), streams_of(make_program(kind, replaced))
    walk = Walk(program, TEXTS, has_drift=True)
    for i in range(len(program.layers)):
        for op in walk.linears(i):
            matrices = [
                replaced.get(f"{name}.weight", dense(piece.weight))
                for name, piece in zip(op.names, op.pieces, strict=True)
            ]
            walk.replace(op, matrices)
        for number, pair in enumerate(zip(*walk.streams, strict=True)):
            torch.testing.assert_close(pair[0], plain[number][i + 1], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(pair[1], other[number][i + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", DECODERS)
def test_inputs_are_those_that_calibration_observes(kind: str) -> None:
    program = make_program(kind)
    expected: dict[str, list[Tensor]] = {}
    observe_linears(
        program, [[text] for text in TEXTS], lambda name, x: expected.setdefault(name, []).append(x)
    )
    walk = Walk(program, TEXTS, has_drift=True)
    seen = set()
    for i in range(len(program.layers)):
        for op in walk.linears(i):
            pairs = list(walk.inputs(op))
            for name in op.names:
                seen.add(name)
                for (rows, drifted), wanted in zip(pairs, expected[name], strict=True):
                    torch.testing.assert_close(rows, wanted, rtol=1e-5, atol=1e-5)
                    torch.testing.assert_close(drifted, wanted, rtol=1e-5, atol=1e-5)
    assert seen == set(expected)


def test_walk_goes_on_from_the_streams_of_an_earlier_one() -> None:
    program = make_program("llama")
    first = Walk(program, TEXTS, has_drift=True)
    for op in first.linears(0):
        first.replace(op, [draw(tuple(p.weight.shape), 3) for p in op.pieces])
    second = Walk(program, TEXTS, has_drift=True, streams=first.streams)
    for walk in (first, second):
        for op in walk.linears(1):
            walk.replace(op, [draw(tuple(p.weight.shape), 4) for p in op.pieces])
    for ours, theirs in zip(second.streams, first.streams, strict=True):
        for left, right in zip(ours, theirs, strict=True):
            assert torch.equal(left, right)


def test_without_drift_only_the_decoder_as_it_was_is_computed() -> None:
    program = make_program("llama")
    walk = Walk(program, TEXTS, has_drift=False)
    for op in walk.linears(0):
        assert all(drifted is None for _, drifted in walk.inputs(op))
    plain, compressed = walk.streams
    assert all(a is b for a, b in zip(plain, compressed, strict=True))
