"""Which linears of a program take inputs that are more than 8 bits."""

from models.kernels.native.lowering import _find_precise
from models.program import LinearOp, build_program
from models.weights import LowRank, Weight, dense
from tests.models.kernels.random_decoders import make_decoder_parts


def precise_names(weights: dict[str, Weight], *, is_rest: bool = False) -> set[str]:
    """Return the precise linears of the second layer and the head, or the others."""
    spec, _ = make_decoder_parts("llama")
    program = build_program(spec, weights, dense(weights["head.weight"]))
    found = _find_precise(program.ops)
    return {
        name
        for op in program.ops
        if isinstance(op, LinearOp) and (id(op) in found) is not is_rest
        for name in op.names
        if name.startswith(("layers.1.", "head"))
    }


def test_all_but_the_beginning_of_the_mlp_are_precise() -> None:
    _, weights = make_decoder_parts("llama")
    assert precise_names(weights, is_rest=True) == {"layers.1.gate", "layers.1.up"}


def test_two_factors_are_as_precise_as_the_linear_that_they_are() -> None:
    _, weights = make_decoder_parts("llama")
    for name, weight in list(weights.items()):
        if name.startswith("layers.") and len(weight.shape) == 2:
            whole = dense(weight)
            weights[name] = LowRank(left=whole[:, :8].contiguous(), right=whole[:8].contiguous())
    for first, second in (("q", "k"), ("q", "v"), ("gate", "up")):
        for i in range(3):
            pair = weights[f"layers.{i}.{first}.weight"], weights[f"layers.{i}.{second}.weight"]
            weights[f"layers.{i}.{second}.weight"] = LowRank(left=pair[1].left, right=pair[0].right)
    rest = {"layers.1.gate.right", "layers.1.gate.left", "layers.1.up.left"}
    assert precise_names(weights, is_rest=True) == rest
    assert {"layers.1.q.right", "layers.1.v.left", "layers.1.o.right", "layers.1.down.left"} <= (
        precise_names(weights)
    )
