"""A server as a process, and adapters for the tiny model."""

import os
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

    from adapters.qst.adapter import save_qst
    from adapters.qst.config import QstConfig
    from adapters.qst.network import QstNetwork
    from models.checkpoints import load_checkpoint

    base = load_checkpoint(str(tiny_llama_folder), quantization="none", report=lambda _: None)

    def write(folder: Path, *, seed: int = 0, fingerprint: str | None = None, **sizes: int) -> Path:
        """Write to a folder; `sizes` are fields of `QstConfig`."""
        network = QstNetwork(
            base.spec, QstConfig(**{"reduction": 4, "rank": 4, **sizes}), seed=seed
        )
        with torch.no_grad():
            network.get_parameter("alpha").fill_(0.25)
        save_qst(
            folder,
            network,
            base_id=base.name,
            base_fingerprint=fingerprint or base.fingerprint,
            base_quantization=base.quantization,
            description=f"side network {seed}",
            training={"steps": 0, "data": "none"},
        )
        return folder

    return write
