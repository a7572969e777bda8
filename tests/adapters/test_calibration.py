"""Inputs of linears against those that the modules of transformers see."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from adapters.calibration import mean_square_inputs, observe_linears
from models.checkpoints import load_checkpoint
from models.families import describe_model
from models.program import Program, build_program
from models.weights import dense
from tests.models.kernels.random_decoders import make_decoder_parts
from tests.models.tiny_models import CONFIGS, make_model

TOLERANCE = 2e-5
SEQUENCES = [torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 5)]
Observed = list[tuple[str, Tensor]]


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that saves a model of `CONFIGS` and gives its folder."""

    def save(name: str) -> Path:
        make_model(name).save_pretrained(tmp_path)
        return tmp_path

    return save


def make_program(kind: str = "llama", **options: bool) -> Program:
    spec, weights = make_decoder_parts(kind, **options)
    return build_program(spec, weights, dense(weights["head.weight"]))


def observe(program: Program, batches: list[list[Tensor]]) -> Observed:
    seen: Observed = []
    observe_linears(program, batches, lambda name, rows: seen.append((name, rows)))
    return seen


def inputs_of_modules(folder: Path) -> dict[str, Tensor]:
    """Return what each `nn.Linear` but the head reads of `SEQUENCES`, one run for each."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    found: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            rows = found.setdefault(name, [])
            module.register_forward_pre_hook(
                lambda _, inputs, rows=rows: rows.append(inputs[0].flatten(0, -2))
            )
    with torch.no_grad():
        for tokens in SEQUENCES:
            model(tokens[None])
    return {name: torch.cat(rows) for name, rows in found.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_inputs_are_those_that_modules_of_transformers_see(
    name: str, tiny_folder: Callable[[str], Path]
) -> None:
    folder = tiny_folder(name)
    checkpoint = load_checkpoint(folder, quantization="none")
    sources = describe_model(json.loads((folder / "config.json").read_text())).sources
    tied = "embed.weight" if checkpoint.spec.tied_head else "head.weight"
    head = checkpoint.weights[tied]
    assert isinstance(head, Tensor)
    program = build_program(checkpoint.spec, checkpoint.weights, head)
    expected, matched = inputs_of_modules(folder), set()
    for linear, rows in observe(program, [SEQUENCES]):
        module = sources[f"{linear}.weight"].name.removesuffix(".weight")
        torch.testing.assert_close(rows, expected[module], rtol=0, atol=TOLERANCE)
        matched.add(module)
    assert matched == set(expected)


def test_a_layer_runs_over_all_batches_before_the_next() -> None:
    seen = observe(make_program(), [[s] for s in SEQUENCES])
    linears = [name.split(".") for name, _ in seen]
    assert [int(layer) for _, layer, _ in linears] == [0] * 14 + [1] * 14 + [2] * 14
    assert [name for _, _, name in linears[:14]] == 2 * ["q", "k", "v", "o", "gate", "up", "down"]
    assert [len(rows) for _, rows in seen[:14]] == [9] * 7 + [5] * 7


def test_batches_do_not_change_what_is_seen() -> None:
    program = make_program()
    apart = observe(program, [[s] for s in SEQUENCES])
    for name, rows in observe(program, [SEQUENCES]):
        parts = torch.cat([part for other, part in apart if other == name])
        torch.testing.assert_close(rows, parts)


def test_linears_that_share_their_input_get_the_same_tensor() -> None:
    rows = dict(observe(make_program(), [SEQUENCES]))
    assert rows["layers.0.q"] is rows["layers.0.k"] is rows["layers.0.v"]
    assert rows["layers.1.gate"] is rows["layers.1.up"]


def test_four_bit_and_low_rank_matrices_are_observed_in_float32() -> None:
    seen = observe(make_program(is_quantized=True, is_low_rank=True), [SEQUENCES])
    assert {rows.dtype for _, rows in seen} == {torch.float32}
    rows = dict(seen)
    assert rows["layers.0.q.right"].shape == (14, 64)
    assert rows["layers.0.q.left"].shape == (14, 16)


def test_rows_need_no_gradient() -> None:
    assert not any(rows.requires_grad for _, rows in observe(make_program(), [SEQUENCES]))


def test_mean_squares_are_those_of_the_observed_rows() -> None:
    program = make_program()
    batches = [[SEQUENCES[0]], [SEQUENCES[1], SEQUENCES[0]]]
    rows: dict[str, list[Tensor]] = {}
    observe_linears(program, batches, lambda name, x: rows.setdefault(name, []).append(x))
    means = mean_square_inputs(program, batches)
    assert set(means) == set(rows)
    for name, parts in rows.items():
        torch.testing.assert_close(means[name], torch.cat(parts).square().mean(0))
