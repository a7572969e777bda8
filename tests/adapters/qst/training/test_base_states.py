"""The base's states on the disk: what is read back, what is computed, what is refused."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapters.format import TENSOR_FILE
from adapters.qst.base_states import BaseStates
from adapters.qst.config import QstConfig
from adapters.qst.examples import Example, pack_examples
from adapters.training_state import TrainingError
from models.checkpoints import Checkpoint
from models.decoder import Decoder
from tests.adapters.qst.training.small_run import run

CPU = torch.device("cpu")
Base = tuple[Checkpoint, Decoder]


def read(states: BaseStates, examples: list[Example]) -> list[Tensor]:
    return list(states(pack_examples(examples)))


@pytest.fixture
def computed(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each forward pass of the base."""
    found: list[int] = []
    hidden_states = decoder.hidden_states

    def count(batch):  # type: ignore[no-untyped-def]
        found.append(len(batch.token_ids))
        return hidden_states(batch)

    monkeypatch.setattr(decoder, "hidden_states", count)
    return found


def test_states_come_from_the_disk_once_they_were_computed(
    decoder: Decoder, examples: list[Example], computed: list[int], tmp_path: Path
) -> None:
    plain = read(BaseStates(decoder, CPU, first=1), examples[:4])
    states = BaseStates(decoder, CPU, first=1, folder=tmp_path / "new" / "states")
    first = read(states, examples[:4])
    lengths = [len(example.token_ids) for example in examples[:5]]
    assert computed == [sum(lengths[:4])] * 2
    # One that is new is computed alone, in the midst of others.
    mixed = [examples[2], examples[4], examples[0]]
    second = read(states, mixed)
    assert computed[2:] == [lengths[4]]
    assert len(first) == len(plain) == len(decoder.spec.layers)
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    spans = list(pairwise(starts))
    for kept, wanted, again in zip(first, plain, second, strict=True):
        torch.testing.assert_close(kept, wanted, rtol=1e-3, atol=1e-5)
        assert torch.equal(again[: lengths[2]], kept[slice(*spans[2])])
        assert torch.equal(again[-lengths[0] :], kept[slice(*spans[0])])


def test_channels_that_float16_does_not_hold_keep_their_size(
    decoder: Decoder, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden_states = decoder.hidden_states
    monkeypatch.setattr(
        decoder, "hidden_states", lambda batch: (state * 1e6 for state in hidden_states(batch))
    )
    plain = read(BaseStates(decoder, CPU), examples[:1])
    kept = read(BaseStates(decoder, CPU, folder=tmp_path), examples[:1])
    for a, b in zip(kept, plain, strict=True):
        assert b.abs().max() > 65_504
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1.0)


@pytest.mark.parametrize("damage", [b"", b"nonsense"])
def test_damaged_file_is_computed_again(
    decoder: Decoder, examples: list[Example], computed: list[int], tmp_path: Path, damage: bytes
) -> None:
    states = BaseStates(decoder, CPU, folder=tmp_path)
    before = read(states, examples[:1])
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage)
    assert all(map(torch.equal, read(states, examples[:1]), before))
    assert len(computed) == 2
    assert path.stat().st_size > len(damage)


def test_other_bases_and_first_layers_have_files_of_their_own(
    decoder: Decoder, examples: list[Example], computed: list[int], tmp_path: Path
) -> None:
    for base, first in (("a", 0), ("b", 0), ("a", 1), ("a", 0)):
        read(BaseStates(decoder, CPU, first=first, folder=tmp_path, base=base), examples[:1])
    assert len(computed) == len(list(tmp_path.iterdir())) == 3


def test_room_is_checked_before_anything_is_computed(
    decoder: Decoder, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = BaseStates(decoder, CPU, folder=tmp_path)
    size = states.bytes_missing(examples)
    read(states, examples)
    assert states.bytes_missing(examples) == 0
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size == pytest.approx(written, rel=0.2)
    others = [Example(token_ids=[1, 2, 3], is_target=[0, 1, 1])]
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 5})())
    states.check_room(examples)
    with pytest.raises(TrainingError, match=r"states: .* has 0.0 GB free, and they take"):
        states.check_room(others)


def test_folder_that_cannot_be_written_is_named(
    decoder: Decoder, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="states: .* cannot be made"):
        BaseStates(decoder, CPU, folder=tmp_path / "file" / "below")
    states = BaseStates(decoder, CPU, folder=tmp_path / "states")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(TrainingError, match="states cannot be kept in .*No space left"):
        read(states, examples[:1])
    assert not list((tmp_path / "states").iterdir())


@pytest.mark.parametrize(
    "qst", [QstConfig(reduction=4), QstConfig(side_attention="base", side_layers=1)]
)
def test_run_over_kept_states_ends_as_the_one_that_kept_them(
    qst: QstConfig, base: Base, computed: list[int], tmp_path: Path
) -> None:
    folder = tmp_path / "states"
    run(base, tmp_path / "first", qst=qst, state_folder=folder)
    num_passes = len(computed)
    lines: list[str] = []
    run(base, tmp_path / "second", qst=qst, state_folder=folder, report=lines.append)
    assert len(computed) == num_passes
    assert f"states of the base: 0 MB to come in {folder}" in lines
    files = [(tmp_path / name / TENSOR_FILE).read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]
