"""A tiny base, and sequences that repeat themselves."""

from pathlib import Path

import pytest
import torch

from adapters.qst.examples import Example
from models.checkpoints import Checkpoint
from models.decoder import Decoder
from tests.adapters.qst.training.small_run import build, make_examples


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tiny_llama_folder: Path) -> tuple[Checkpoint, Decoder]:
    return build(tiny_llama_folder)


@pytest.fixture
def checkpoint(base: tuple[Checkpoint, Decoder]) -> Checkpoint:
    return base[0]


@pytest.fixture
def decoder(base: tuple[Checkpoint, Decoder]) -> Decoder:
    return base[1]


@pytest.fixture
def examples() -> list[Example]:
    return make_examples()
