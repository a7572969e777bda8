"""The folders of the executors say what is in them."""

import importlib
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["", ".native", ".reference", ".cuda"])
def test_package_names_all_that_is_in_it(name: str) -> None:
    package = importlib.import_module(f"models.kernels{name}")
    assert package.__file__ is not None
    inside = {
        path.stem for path in Path(package.__file__).parent.glob("[a-z]*") if path.suffix != ".so"
    }
    assert [word for word in inside if f"`{word}`" not in (package.__doc__ or "")] == []
