"""Adapter folders for the scripted model, and a registry that reads them."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from adapters.format import CONFIG_FILE, AdapterError, read_config
from serve.attachments.registry import AdapterRegistry, LoadedVariant
from tests.serve.engine.conftest import HistoryModel

NUM_BYTES = 100


class ScriptedVariant(HistoryModel):
    """A variant that side networks can be attached to."""

    def attach(self, network: Any) -> Any:
        """Stand in for `Decoder.attach`."""
        name = f"{network} on {self.name}"
        return SimpleNamespace(name=name, cache_shape=(1,), num_bytes=NUM_BYTES)


class Folders:
    """Writes folders whose one file has what the adapter is called by the model, as description.

    Attributes:
        root: below which they are written.
        loaded: names of the folders read, in order.
        gate: when set, each load waits for one release of it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.loaded: list[str] = []
        self.gate: threading.Semaphore | None = None

    def write(
        self,
        folder: str,
        text: str | None = None,
        *,
        chain: tuple[str, ...] = (),
        method: str = "qst",
    ) -> Path:
        """Write a folder and return it."""
        path = self.root / folder
        path.mkdir(parents=True, exist_ok=True)
        config = {
            "method": method, "base_id": "base", "base_fingerprint": "f", "fields": {},
            "base_quantization": "nf4", "chain": chain, "training": {}, "format_version": 1,
            "description": folder if text is None else text,
        }  # fmt: skip
        (path / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
        return path

    def load(
        self,
        folder: Path,
        spec: object,
        *,
        fingerprint: str,
        model_id: str,
        chain: tuple[str, ...],
    ) -> Any:
        """Stand in for `adapters.qst.adapter.load_qst`."""
        self.loaded.append(folder.name)
        if self.gate is not None:
            assert self.gate.acquire(timeout=30)
        config = read_config(folder)
        assert config.chain == chain
        text = config.description
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

    def variant(self, digest: str = "d" * 64, **fields: Any) -> LoadedVariant:
        """Return a variant of the scripted model; side networks on it know its digest."""
        facts: dict[str, Any] = {
            "description": "a variant", "num_parameters": 5, "num_bytes": 10 * NUM_BYTES,
            "removed": 0.4, "speed": 1.25, "decoder": ScriptedVariant(name=digest[:2]),
        }  # fmt: skip
        return LoadedVariant(digest=digest, **(facts | fields))

    spec: Any = None

    def attach(self, network: str) -> Any:
        """Stand in for `Decoder.attach`."""
        return SimpleNamespace(name=network, cache_shape=(1,), num_bytes=NUM_BYTES)
