"""Start and memory of a server, with a script in its place."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks import versus_server
from benchmarks.serving import Server
from benchmarks.versus_server import STREAM_TOKENS, STREAMS, measure_first_start, measure_memory


def test_each_start_has_an_empty_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = iter([3.0, 1.0, 2.0])
    folders = []

    @contextmanager
    def running_server(arguments: Sequence[str]) -> Iterator[Server]:
        cache = Path(arguments[-1])
        assert arguments[:-1] == ["m.gguf", "--cache-dir"]
        assert not list(cache.iterdir())
        folders.append(cache)
        (cache / "kept").write_bytes(b"12345")
        yield Server(url="", pid=0, ready_s=next(ready))

    monkeypatch.setattr(versus_server, "running_server", running_server)
    measured, content = measure_first_start(["m.gguf"], 3)
    assert measured["ready"].value == 2.0
    assert content == {"ready_s": [3.0, 1.0, 2.0], "cache_folder_bytes": 5}
    assert len(set(folders)) == 3
    assert not any(folder.exists() for folder in folders)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_held_against_file_and_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def running_server(arguments: Sequence[str]) -> Iterator[Server]:
        assert arguments == ["m.gguf", "--kv-cache-tokens", "16000"]
        yield Server(url="http://h", pid=os.getpid(), ready_s=1.0)

    async def stream(url: str) -> None:
        assert url == "http://h"

    monkeypatch.setattr(versus_server, "running_server", running_server)
    monkeypatch.setattr(versus_server, "_stream", stream)
    measured, content = measure_memory(["m.gguf"], file_bytes=10**6, cache_bytes_per_token=100)
    assert content["cache_bytes"] == STREAMS * STREAM_TOKENS * 100
    allowed_mb = (10**6 + content["cache_bytes"]) / 1e6
    assert measured["memory"].value == pytest.approx(content["serving_peak_mb"] / allowed_mb, 1e-3)
