"""Adapter folders for the scripted model, and a registry that loads them."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import pytest
import torch

from adapters.format import AdapterConfig, AdapterError, StoredAdapter, digest, write_adapter
from serve.attachments.registry import AdapterRegistry, Loaded
from serve.engine.sequence import Attachment, ModelVariant, SideAdapter
from tests.serve.engine.conftest import HistoryModel

NUM_BYTES = 100
ScriptedRegistry: TypeAlias = AdapterRegistry[Attachment, ModelVariant]


class ScriptedSpeedTest:
    """A speed test of three steps, unless another step is given."""

    def __init__(self, step: Callable[[], bool] | None = None) -> None:
        self.speed: float | None = None
        self.num_steps = 0
        self._step = step

    def step(self) -> bool:
        self.num_steps += 1
        if self._step is not None:
            return self._step()
        if self.num_steps == 3:
            self.speed = 1.25
        return self.speed is None


class Folders:
    """Writes adapters that are called by the model what their description says, and loads them.

    Attributes:
        root: below which they are written.
        loaded: names of the folders read, in order.
        gate: when set, each load waits for one release of it.
        speed_tests: of the variants loaded, in order.
        speed_step: of the speed tests of variants loaded from now on, in place of their own.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.loaded: list[str] = []
        self.gate: threading.Semaphore | None = None
        self.speed_tests: list[ScriptedSpeedTest] = []
        self.speed_step: Callable[[], bool] | None = None

    def write(
        self,
        folder: str,
        text: str | None = None,
        *,
        chain: tuple[str, ...] = (),
        method: str = "qst",
    ) -> Path:
        """Write a folder and return it."""
        config = AdapterConfig(
            method=method, base_id="base", base_fingerprint="f", base_quantization="nf4",
            fields={"name": Path(folder).name}, chain=chain,
            description=folder if text is None else text,
        )  # fmt: skip
        write_adapter(self.root / folder, config, {"numbers": torch.zeros(7)})
        return self.root / folder

    def write_variant(self, folder: str, text: str | None = None, *on: Path) -> Path:
        """Write a variant of the scripted model, on some others."""
        chain = tuple(digest(path) for path in on)
        return self.write(folder, text, chain=chain, method="disp")

    def load(
        self, stored: StoredAdapter, below: ModelVariant | None
    ) -> Loaded[Attachment, ModelVariant]:
        """Load as a backend would; side networks on a variant know it by name."""
        text = stored.config.description
        self.loaded.append(stored.config.fields["name"])
        if self.gate is not None:
            assert self.gate.acquire(timeout=30)
        if text == "damaged":
            raise AdapterError("not for base")
        if stored.config.method == "disp":
            variant = ModelVariant(HistoryModel(name=text), stored.digest)
            self.speed_tests.append(ScriptedSpeedTest(self.speed_step))
            return Loaded(
                given=Attachment(variant, None), below=variant, num_parameters=5,
                num_bytes=10 * NUM_BYTES, removed=0.4, speed_test=self.speed_tests[-1],
            )  # fmt: skip
        below_name = "" if below is None else f" on {below.model.name}"  # type: ignore[attr-defined]
        return Loaded(
            given=Attachment(below, self.side(text + below_name)), num_parameters=7,
            num_bytes=NUM_BYTES,
        )  # fmt: skip

    def side(self, name: str) -> SideAdapter:
        """Return the side network that the scripted model knows by a name."""
        network: Any = SimpleNamespace(name=name, cache_shape=(1,), num_bytes=NUM_BYTES)
        return SideAdapter(network, name)

    def registry(self, **settings: Any) -> ScriptedRegistry:
        """Return a registry over the folders."""
        return ScriptedRegistry(self.load, **({"roots": [self.root]} | settings))


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path / "root")
