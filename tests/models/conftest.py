"""Tiny random checkpoints, written by transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models.tiny_models import make_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that saves a model of `CONFIGS`, once a session, and gives its folder."""
    folders: dict[tuple[str, str], Path] = {}

    def save(name: str, **changes: object) -> Path:
        key = (name, repr(sorted(changes.items())))
        if key not in folders:
            folder = tmp_path_factory.mktemp("models") / f"tiny-{name}"
            make_model(name, **changes).save_pretrained(folder)
            folders[key] = folder
        return folders[key]

    return save
