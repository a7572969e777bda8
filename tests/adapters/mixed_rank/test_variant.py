"""Folders of mixed-rank variants: what does not fit is named, field by field."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.format import AdapterError, read_adapter, read_config, write_adapter
from adapters.methods import host_of
from adapters.mixed_rank.compress import compress
from adapters.mixed_rank.compress_config import CompressConfig
from adapters.mixed_rank.variant import derive_mixed_rank, describe_mixed_rank
from models.checkpoints import Checkpoint
from tests.adapters.fitted_base import LENGTH, fitted_checkpoint, make_text

GATE = "layers.1.gate+up"


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    return fitted_checkpoint()


@pytest.fixture(scope="module")
def variant(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In 8 bits, everything factored that can be."""
    folder = tmp_path_factory.mktemp("variant")
    config = CompressConfig(
        remove=0.2, rank_step=32, sequences=8, length=LENGTH, eval_sequences=0, plan="uniform",
        compensate=False,
    )  # fmt: skip
    compress(base, make_text(), folder, host=host_of(base), config=config)
    return folder


def first_factored(fields: dict[str, Any]) -> str:
    return next(name for name, rank in fields["ranks"].items() if rank is not None)


def set_rank(rank: object) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(fields: dict[str, Any], _: dict[str, Tensor]) -> None:
        fields["ranks"] = {**fields["ranks"], first_factored(fields): rank}

    return change


def change_tensors(change: Callable[[str, Tensor], Tensor | None]) -> Callable[..., None]:
    """Change the first right factor, or take it away."""

    def apply(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        name = next(n for n in tensors if n.endswith(".right"))
        found = change(name, tensors.pop(name))
        if found is not None:
            tensors[name] = found

    return apply


def spoil_scale(name: str, tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[0, 1] = 0x7C  # the first scale is infinite
    tensor[0, 0] = 0
    return tensor


FAULTS = {
    "must be an integer of at least 1 or null, got 0": set_rank(0),
    "must be an integer of at least 1 or null, got -32": set_rank(-32),
    "must be an integer of at least 1 or null, got '32'": set_rank("32"),
    r"must be below \d+, where factors are no smaller than the matrix, got 4096": set_rank(4096),
    "must be a multiple of 32 with int8 factors, got 9": set_rank(9),
    r"\.right: must be torch.uint8 of shape": change_tensors(lambda _, t: t[:, :-34].contiguous()),
    r"\.right: missing": change_tensors(lambda *_: None),
    r"\.right: must be torch.uint8 of shape .* got torch.float16": change_tensors(
        lambda _, t: t.half()
    ),
    r"\.right: has values that are no finite numbers": change_tensors(spoil_scale),
    "extra: not a tensor of this variant": lambda _, t: t.update(extra=torch.zeros(1)),
    "'layers.9.q' names no linears of this decoder": lambda f, _: f.update(
        ranks={**f["ranks"], "layers.9.q": None}
    ),
    "'layers.0.o\\+down' names no linears of this decoder that share an input": lambda f, _: (
        f.update(ranks={**f["ranks"], "layers.0.o+down": None})
    ),
    "ranks must be an object of ranks by linears, got": lambda f, _: f.update(ranks=[]),
    "form must be one of float16, int8, int4, got 'int3'": lambda f, _: f.update(form="int3"),
    "plan must be one of mixed, uniform, got 7": lambda f, _: f.update(plan=7),
    "is_compensated must be one of False, True, got 1": lambda f, _: f.update(is_compensated=1),
    "remove_total must be a number from 0 to below 1, got 1": lambda f, _: f.update(remove_total=1),
    "colour: unknown mixed_rank field": lambda f, _: f.update(colour="red"),
    "form.*missing|missing.*form": lambda f, _: f.pop("form"),
}


@pytest.mark.parametrize("message", FAULTS)
def test_what_does_not_fit_is_named(
    message: str, base: Checkpoint, variant: Path, tmp_path: Path
) -> None:
    stored = read_adapter(variant)
    assert derive_mixed_rank(stored, host_of(base)).brought
    fields, tensors = dict(stored.config.fields), dict(stored.tensors)
    FAULTS[message](fields, tensors)
    write_adapter(tmp_path, replace(stored.config, fields=fields), tensors)
    with pytest.raises(AdapterError, match=message):
        derive_mixed_rank(read_adapter(tmp_path), host_of(base))


def test_description_says_what_it_is(variant: Path) -> None:
    rows = dict(describe_mixed_rank(read_adapter(variant)))
    assert rows["factors"] == "int8"
    assert rows["ranks"] == "uniform"
    assert rows["fitted to"] == "exact"
    assert read_config(variant).method == "mixed_rank"
