"""What a hook of the reference walk sees and changes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.reference.operations import Hook, walk_layers
from models.program import LinearOp, Program, build_program
from tests.models.kernels.random_decoders import KINDS, make_decoder_parts

TOKENS = [(7 * i + 3) % 97 for i in range(12)]
POSITIONS = torch.arange(len(TOKENS))


def make_program(kind: str, **options: bool) -> Program:
    spec, weights = make_decoder_parts(kind, **options)
    head = weights["embed.weight" if spec.tied_head else "head.weight"]
    assert isinstance(head, Tensor)
    return build_program(spec, weights, head)


def attend(op: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stand in for attention."""
    return q.flatten(1) + k.mean() + v.mean()


def walk(program: Program, hook: Hook | None) -> list[Tensor]:
    tokens = torch.tensor(TOKENS)
    return list(walk_layers(program, tokens, POSITIONS, attend=attend, hook=hook))


class Recorder:
    """Notes what passes, and can change it."""

    def __init__(self, scale_in: float = 1.0, scale_out: float = 1.0) -> None:
        self.seen: list[tuple[tuple[str, ...], Tensor, Tensor]] = []
        self._scale_in, self._scale_out = scale_in, scale_out
        self._read: Tensor | None = None

    def before(self, op: LinearOp, x: Tensor) -> Tensor:
        assert x.shape == (len(TOKENS), op.in_features)
        self._read = x
        return x * self._scale_in

    def after(self, op: LinearOp, out: Tensor) -> Tensor:
        assert self._read is not None
        self.seen.append((op.names, self._read, out))
        return out * self._scale_out


def names_of(recorder: Recorder) -> list[str]:
    return [name for names, _, _ in recorder.seen for name in names]


@pytest.mark.parametrize("kind", KINDS)
def test_hook_that_changes_nothing_changes_no_bit(kind: str) -> None:
    program = make_program(kind, is_pruned=True)
    for mine, plain in zip(walk(program, Recorder()), walk(program, None), strict=True):
        assert torch.equal(mine, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_hook_sees_every_linear_of_the_layers_once(kind: str) -> None:
    recorder = Recorder()
    walk(make_program(kind), recorder)
    mlp = ["gate", "up", "down"] if kind in ("llama", "qwen3") else ["up", "down"]
    wanted = {f"layers.{i}.{name}" for i in range(3) for name in ("q", "k", "v", "o", *mlp)}
    assert sorted(names_of(recorder)) == sorted(wanted)


def test_factors_of_a_low_rank_matrix_are_linears_of_their_own() -> None:
    recorder = Recorder()
    walk(make_program("llama", is_low_rank=True), recorder)
    found = names_of(recorder)
    assert {"layers.0.q.right", "layers.0.q.left", "layers.2.down.right"} <= set(found)
    assert "layers.0.q" not in found


def test_output_is_that_of_the_changed_input() -> None:
    recorder = Recorder(scale_in=0.5)
    program = make_program("llama")
    walk(program, recorder)
    names, x, out = recorder.seen[0]
    op = next(op for op in program.ops if isinstance(op, LinearOp) and op.names == names)
    expected = torch.cat([F.linear(x * 0.5, p.weight, p.bias) for p in op.pieces], dim=1)  # type: ignore[arg-type]
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("is_pruned", [False, True], ids=["whole", "scattered"])
def test_changed_output_is_what_reaches_the_stream(is_pruned: bool) -> None:
    program = make_program("llama", is_pruned=is_pruned)
    states = walk(program, Recorder(scale_out=0.0))
    assert all(torch.equal(state, states[0]) for state in states)
    assert not torch.equal(walk(program, None)[1], states[0])


def test_layers_are_all_operations_between_taps() -> None:
    program = make_program("opt")
    assert sum(program.layers, ()) == tuple(
        op for op in program.ops[1:-1] if "Tap" not in type(op).__name__
    )
    assert len(program.layers) == program.num_layers


def test_walk_keeps_only_the_stream_between_layers() -> None:
    program, buffers = make_program("llama"), dict[str, Tensor]()
    tokens = torch.tensor(TOKENS)
    for state in walk_layers(program, tokens, POSITIONS, attend=attend, buffers=buffers):
        assert list(buffers) == ["x"]
        assert buffers["x"] is state
