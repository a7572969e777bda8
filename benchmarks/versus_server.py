"""How soon a server is ready with a file that it never saw, and what memory it serves with."""

import asyncio
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import say
from benchmarks.serving import memory_mb, running_server
from benchmarks.versus_goals import Figure
from client.api import ApiClient
from serve.bench.http import HttpStreams
from serve.bench.streams import Decoding, random_prompts

STREAMS = 8
STREAM_TOKENS = 2000
NEW_TOKENS = 48  # a whole number of cache blocks, as all tokens of a stream are


def measure_first_start(
    arguments: Sequence[str], repeats: int
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Time starts of the server, each with an empty cache folder.

    The system may have the model's file in its own cache.
    """
    times = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            with running_server([*arguments, "--cache-dir", cache]) as server:
                times.append(server.ready_s)
            kept = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
        say(f"ready after {times[-1]:.2f} s; {kept / 1e6:.0f} MB in the cache folder")
    detail = f"{min(times):.2f} to {max(times):.2f} s of {repeats} starts"
    figures = {"ready_s": [round(t, 2) for t in times], "cache_folder_bytes": kept}
    return {"ready": Figure(value=median(times), detail=detail)}, figures


def measure_memory(
    arguments: Sequence[str], *, file_bytes: int, cache_bytes_per_token: int
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Read the server's largest resident memory while it serves long streams.

    Args:
        arguments: of the server.
        file_bytes: size of the model's file.
        cache_bytes_per_token: of keys and values.
    """
    tokens = STREAMS * STREAM_TOKENS
    with running_server([*arguments, "--kv-cache-tokens", str(tokens)]) as server:
        loading = memory_mb(server.pid, "VmHWM")
        idle = memory_mb(server.pid, "VmRSS")
        # Starts VmHWM afresh, so that it is the peak of serving and not of loading.
        Path(f"/proc/{server.pid}/clear_refs").write_text("5", encoding="ascii")
        asyncio.run(_stream(server.url))
        peak = memory_mb(server.pid, "VmHWM")
    cache_bytes = tokens * cache_bytes_per_token
    allowed_mb = (file_bytes + cache_bytes) / 1e6
    measured = Figure(
        value=peak / allowed_mb,
        detail=f"{peak:.0f} MB of {file_bytes / 1e6:.0f} + {cache_bytes / 1e6:.0f} MB; "
        f"{idle:.0f} MB idle, {loading:.0f} MB at most while loading",
    )
    figures = {"serving_peak_mb": peak, "idle_mb": idle, "loading_peak_mb": loading}
    content = {name: round(value, 1) for name, value in figures.items()}
    return {"memory": measured}, content | {"file_bytes": file_bytes, "cache_bytes": cache_bytes}


async def _stream(url: str) -> None:
    """Run the streams, all at once."""
    runner = HttpStreams(ApiClient(url), Decoding(), model=None, key="")
    pool = await runner.token_pool()
    prompts = random_prompts(pool, STREAMS, STREAM_TOKENS - NEW_TOKENS, random.Random(0))
    await runner.run(prompts, NEW_TOKENS)
