"""The base's hidden states of training sequences: computed, or kept on the disk once they were."""

import hashlib
import os
import shutil
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from adapters.qst.examples import Example, TrainingBatch, pack_examples
from adapters.training_state import TrainingError
from models.decoder import Decoder

_LARGEST = 32_768.0  # of a stored row; half of what float16 holds


class BaseStates:
    """Gives the hidden states that a side network reads.

    With a folder each sequence's states are kept there in float16, each row with a scale if it
    needs one, and read back by whoever asks for the same sequence of the same base: later epochs,
    other learning rates, other side networks that begin at the same layer. What is given is what
    was kept, so it does not matter who computed it.

    Args:
        decoder: the base.
        device: where it computes.
        first: the first state that is wanted: 0 is the embedding, i what layer i - 1 leaves.
        folder: made if it is missing; None: nothing is kept.
        base: tells bases apart, such as a checkpoint's fingerprint and what is attached.

    Raises:
        TrainingError: the folder cannot be made.
    """

    def __init__(
        self,
        decoder: Decoder,
        device: torch.device,
        *,
        first: int = 0,
        folder: Path | None = None,
        base: str = "",
    ) -> None:
        self._decoder, self._device, self._first, self._folder = decoder, device, first, folder
        self._base = f"{base} {decoder.kernels} {first}\n".encode()
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise TrainingError(f"states: {folder} cannot be made: {error.strerror}") from error

    @property
    def num_states(self) -> int:
        """States of a token."""
        return len(self._decoder.spec.layers) + 1 - self._first

    def bytes_missing(self, examples: Sequence[Example]) -> int:
        """Return about how much the folder will grow by these sequences; 0 without one."""
        if self._folder is None:
            return 0
        lengths = {self._path(self._folder, e): len(e.token_ids) for e in examples}
        num_tokens = sum(length for path, length in lengths.items() if not path.is_file())
        return num_tokens * self.num_states * (self._decoder.spec.hidden_size * 2 + 4)

    def check_room(self, examples: Sequence[Example]) -> int:
        """Refuse sequences whose states the disk has no room for.

        Returns:
            `bytes_missing` of them.

        Raises:
            TrainingError: says what they take and what is free.
        """
        needed = self.bytes_missing(examples)
        if self._folder is not None:
            free = shutil.disk_usage(self._folder).free
            if needed > free:
                raise TrainingError(
                    f"states: {self._folder} has {free / 1e9:.1f} GB free, and they take "
                    f"{needed / 1e9:.1f} GB"
                )
        return needed

    def __call__(self, batch: TrainingBatch) -> Iterator[Tensor]:
        """Yield h[first] .. h[N] of a batch, (T, D) float32 each; without gradient.

        Raises:
            TrainingError: they cannot be kept.
        """
        if self._folder is None:
            yield from self._compute(batch)
            return
        paths = [self._path(self._folder, example) for example in batch.examples]
        kept = [_read(path) for path in paths]
        missing = [i for i, states in enumerate(kept) if states is None]
        if missing:
            packed = pack_examples([batch.examples[i] for i in missing])
            whole = torch.stack(list(self._compute(packed)), dim=1).cpu()
            starts = packed.packed.query_starts.tolist()
            for i, (start, stop) in zip(missing, pairwise(starts), strict=True):
                kept[i] = _keep(paths[i], whole[start:stop])
        parts = [part for part in kept if part is not None]
        for i in range(self.num_states):
            rows = [states[:, i].float() * scales[:, i, None] for states, scales in parts]
            yield torch.cat(rows).to(self._device)

    def _compute(self, batch: TrainingBatch) -> Iterator[Tensor]:
        states = self._decoder.hidden_states(batch.packed)
        index = 0
        while True:
            with torch.autocast(self._device.type, enabled=False), torch.no_grad():
                state = next(states, None)
            if state is None:
                return
            if index >= self._first:
                yield state
            index += 1

    def _path(self, folder: Path, example: Example) -> Path:
        tokens = array("q", example.token_ids).tobytes()
        return folder / f"{hashlib.sha256(self._base + tokens).hexdigest()}.safetensors"


def _read(path: Path) -> tuple[Tensor, Tensor] | None:
    """Return (S, M, D) float16 states and (S, M) scales; None if they are not there whole."""
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, SafetensorError):
        return None
    if tensors.keys() != {"states", "scales"}:
        return None
    return tensors["states"], tensors["scales"]


def _keep(path: Path, states: Tensor) -> tuple[Tensor, Tensor]:
    """Write what `_read` gives back, whole or not at all."""
    scales = (states.abs().amax(-1) / _LARGEST).clamp(min=1.0)
    kept = (states / scales[..., None]).half().contiguous(), scales.contiguous()
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        safetensors.torch.save_file({"states": kept[0], "scales": kept[1]}, part)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise TrainingError(f"states cannot be kept in {path.parent}: {error}") from error
    return kept
