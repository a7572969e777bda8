"""Checkpoints of a training run: all that is needed to go on as if nothing had happened.

A checkpoint is a folder `step-NNNNNNNN` that appears under its name only when it is whole and on
the disk; the one before is removed after that. There is no random state in it: the order of the
data follows from the seed and the step.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

FOLDER = "checkpoints"
_VERSION = 2
_STATE_FILE = "state.json"
_TENSOR_FILE = "state.safetensors"
_PART = ".part"
_OPTIMIZER_KEYS = ("step", "exp_avg", "exp_avg_sq")


class TrainingError(ValueError):
    """A training run cannot start, go on or be saved."""


class TrainingInterrupted(Exception):
    """A run was asked to stop; its checkpoint is saved."""

    def __init__(self, step: int, folder: Path) -> None:
        super().__init__(f"stopped after step {step}; {folder} has the checkpoint")
        self.step = step


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where a run is, without its tensors.

    Attributes:
        step: optimiser steps done.
        identity: every option, and what data and base are; a run resumes only with the same.
        metrics_bytes: length of `metrics.jsonl`.
        num_tokens: tokens computed so far.
        state: what else the method keeps; JSON values.
    """

    step: int
    identity: Mapping[str, Any]
    metrics_bytes: int = 0
    num_tokens: int = 0
    state: Mapping[str, Any] = field(default_factory=dict)


def save_progress(folder: Path, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint and remove the older ones.

    Args:
        folder: holds the checkpoints; made if missing.
        progress: where the run is.
        tensors: parameters and optimiser state, by name.

    Raises:
        TrainingError: it cannot be written; the checkpoint before is whole.
    """
    part, target = folder / _PART, folder / f"step-{progress.step:08d}"
    if target.exists():
        return
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    older = _checkpoints(folder)
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        # Straight from the tensors' memory, of which there may be much.
        safetensors.torch.save_file(whole, part / _TENSOR_FILE)
        _sync(part / _TENSOR_FILE)
        digest = _digest(part / _TENSOR_FILE)
        state = {"version": _VERSION, "tensors_sha256": digest, **asdict(progress)}
        _write(part / _STATE_FILE, (json.dumps(state) + "\n").encode())
        _sync(part)
        part.rename(target)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        kept = f"that of {older[0].name} is whole" if older else "there is none yet"
        raise TrainingError(
            f"{folder}: the checkpoint of step {progress.step} cannot be saved ({error}); {kept}"
        ) from error
    for path in older:
        shutil.rmtree(path, ignore_errors=True)


def load_progress(folder: Path) -> tuple[Progress, dict[str, Tensor]] | None:
    """Read the newest checkpoint; None if there is none.

    Raises:
        TrainingError: it is damaged or of another version.
    """
    found = _checkpoints(folder)
    if not found:
        return None
    path = found[0]
    try:
        state = json.loads((path / _STATE_FILE).read_text(encoding="utf-8"))
        if state.pop("version") != _VERSION:
            raise TrainingError(f"{path}: a checkpoint of another version of proa; train anew")
        if state.pop("tensors_sha256") != _digest(path / _TENSOR_FILE):
            raise ValueError(f"{_TENSOR_FILE} is not what was written")
        known = {item.name for item in fields(Progress)}
        if set(state) != known:
            raise ValueError(f"fields {sorted(set(state) ^ known)}")
        return Progress(**state), safetensors.torch.load_file(path / _TENSOR_FILE)
    except TrainingError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise TrainingError(f"{path}: the checkpoint is damaged ({error})") from error


def optimizer_tensors(optimizer: Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """Return AdamW's state of a network's parameters, by `exp_avg.NAME` and so on."""
    return {
        f"{key}.{name}": value
        for name, parameter in network.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: Optimizer, network: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Take over what `optimizer_tensors` returned; other tensors are left alone."""
    for name, parameter in network.named_parameters():
        optimizer.state[parameter] = {
            key: tensors[f"{key}.{name}"].to(parameter.device)
            for key in _OPTIMIZER_KEYS
            if f"{key}.{name}" in tensors
        }


def check_identity(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to resume a run with other options, data or base.

    Raises:
        TrainingError: names everything that differs.
    """
    differing = [
        f"{name}: {saved.get(name)!r} then, {current.get(name)!r} now"
        for name in sorted({*saved, *current})
        if saved.get(name) != current.get(name)
    ]
    if differing:
        raise TrainingError(
            "the run cannot be resumed with other options or data: " + "; ".join(differing)
        )


def _checkpoints(folder: Path) -> list[Path]:
    """List whole checkpoints, the newest first."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
