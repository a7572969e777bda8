"""A server as a process, and adapters and variants for the tiny model."""

import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Process:
    """A server process and what it has said."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        assert process.stderr is not None
        for line in process.stderr:
            self.lines.append(line)
            found = re.search(r"is ready on (http://\S+)", line)
            if found:
                self.url = found[1]
                break
        else:
            raise AssertionError("".join(self.lines))
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def wait_for(self, text: str) -> str:
        """Return the first line with a text; fails when the process ends without one."""
        while True:
            is_running = self.reader.is_alive()
            for line in list(self.lines):
                if text in line:
                    return line
            assert is_running, "".join(self.lines)
            self.reader.join(0.01)

    def stop(self, *signals: int) -> int:
        for number in signals:
            os.kill(self.process.pid, number)
        status = self.process.wait(60)
        self.reader.join(60)
        return status


StartServer = Callable[..., Process]


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    """Start `proa serve` on a free port and wait until it is ready; killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str, **variables: str) -> Process:
        kept = {name: text for name, text in os.environ.items() if not name.startswith("PROA_")}
        process = subprocess.Popen(
            [sys.executable, "-m", "serve.cli.main", "serve", "--port", "0", *words],
            cwd=ROOT,
            env=kept | variables,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return Process(process)

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


WriteAdapter = Callable[..., Path]


@pytest.fixture(scope="session")
def write_adapter(tiny_llama_folder: Path) -> WriteAdapter:
    """Write a side network with random weights for the tiny model, quantization "none"."""
    import torch  # slow, and not every test needs an adapter

    from adapters.disp.variant import load_disp
    from adapters.qst.adapter import save_qst
    from adapters.qst.config import QstConfig
    from adapters.qst.network import QstNetwork
    from models.checkpoints import load_checkpoint
    from models.pruning import prune_spec

    base = load_checkpoint(str(tiny_llama_folder), quantization="none", report=lambda _: None)

    def write(
        folder: Path,
        *,
        seed: int = 0,
        fingerprint: str | None = None,
        on: Path | None = None,
        chain: tuple[str, ...] | None = None,
        **sizes: int,
    ) -> Path:
        """Write to a folder, for the variant in the folder `on`; `sizes`: fields of `QstConfig`.

        `chain` is given where more than that variant is below it.
        """
        spec, below = base.spec, ()
        if on is not None:
            variant = load_disp(
                on, spec, fingerprint=base.fingerprint, quantization="none", model_id=base.name
            )
            spec, below = prune_spec(spec, variant.selections), (variant.digest,)
        network = QstNetwork(spec, QstConfig(**{"reduction": 4, "rank": 4, **sizes}), seed=seed)
        with torch.no_grad():
            network.get_parameter("alpha").fill_(0.25)
        save_qst(
            folder,
            network,
            base_id=base.name,
            base_fingerprint=fingerprint or base.fingerprint,
            base_quantization=base.quantization,
            chain=below if chain is None else chain,
            description=f"side network {seed}",
            training={"steps": 0, "data": "none"},
        )
        return folder

    return write


@pytest.fixture(scope="session")
def write_variant(tiny_llama_folder: Path) -> WriteAdapter:
    """Write a pruned variant of the tiny model with random channels, for any quantization."""
    from adapters.disp.variant import save_disp
    from models.checkpoints import load_checkpoint
    from models.pruning import MODULES, LayerSelection, widths_of

    base = load_checkpoint(str(tiny_llama_folder), quantization="none", report=lambda _: None)

    def write(
        folder: Path,
        *,
        seed: int = 0,
        fingerprint: str | None = None,
        quantization: str = "none",
        keep: float = 0.5,
    ) -> Path:
        """Write to a folder; `fingerprint` is that of a base of this quantization."""
        rng = random.Random(seed)
        selections = tuple(
            LayerSelection(
                **{
                    module: tuple(sorted(rng.sample(range(width), round(width * keep))))
                    for module, width in zip(MODULES, widths, strict=True)
                }
            )
            for widths in widths_of(base.spec)
        )
        save_disp(
            folder,
            selections,
            base.spec,
            base_id=base.name,
            base_fingerprint=fingerprint or base.fingerprint,
            base_quantization=quantization,
            dense_fingerprint="" if fingerprint else base.fingerprint,
            align=8,
            residual="independent",
            description=f"variant {seed}",
            training={"steps": 0},
        )
        return folder

    return write
