"""Adapter folders for the scripted model, and a registry that reads them."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from adapters.format import CONFIG_FILE, AdapterError
from serve.backends.adapters import AdapterRegistry

NUM_BYTES = 100


class Folders:
    """Writes folders whose one file is what the adapter is called by the model.

    Attributes:
        root: below which they are written.
        loaded: names of the folders read, in order.
        gate: when set, each load waits for one release of it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.loaded: list[str] = []
        self.gate: threading.Semaphore | None = None

    def write(self, folder: str, text: str | None = None) -> Path:
        """Write a folder and return it."""
        path = self.root / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG_FILE).write_text(folder if text is None else text, encoding="utf-8")
        return path

    def load(self, folder: Path, spec: object, *, fingerprint: str, model_id: str) -> Any:
        """Stand in for `adapters.qst.adapter.load_qst`."""
        self.loaded.append(folder.name)
        if self.gate is not None:
            assert self.gate.acquire(timeout=30)
        try:
            text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise AdapterError(f"{folder}: no {CONFIG_FILE}") from None
        if text == "damaged":
            raise AdapterError(f"{folder}: not for {model_id}")
        task = "sequence_classification" if text == "classifier" else "causal_lm"
        return SimpleNamespace(
            qst=SimpleNamespace(task=task), network=text, digest=text, description=f"says {text}",
            num_parameters=7,
        )  # fmt: skip

    def registry(self, **settings: Any) -> AdapterRegistry:
        """Return a registry over the folders."""
        return AdapterRegistry(
            self, fingerprint="f", model_id="base", load=self.load,  # type: ignore[arg-type]
            **({"roots": [self.root]} | settings),
        )  # fmt: skip

    spec: Any = None

    def attach(self, network: str) -> Any:
        """Stand in for `Decoder.attach`."""
        return SimpleNamespace(name=network, cache_shape=(1,), num_bytes=NUM_BYTES)
