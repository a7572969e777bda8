"""Measure what serving adds: HTTP, start-up, memory, and what AdapT costs.

python -m benchmarks.serving
"""

import argparse
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.engine_in_turn import decode_in_turn
from benchmarks.report import (
    PROA,
    RESULTS,
    ROOT,
    BenchmarkFailed,
    Target,
    describe_run,
    finish,
    run_proa_bench,
    say,
    target_table,
    warn_if_busy,
)
from client.api import ApiClient
from client.blocking import BlockingClient
from client.errors import RequestError
from serve.bench.streams import Decoding
from stats.summary import median_ratio

HTTP_STREAMS = 8
MEMORY_STREAMS = 32
REQUIRED_HTTP_SHARE = 0.85
REQUIRED_READY_S = 6.0
REQUIRED_MEMORY_MB = 900.0
REQUIRED_ADAPT_SHARE = 0.98
START_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 60.0
POLL_S = 0.02
PLAIN = Decoding(temperature=0.8)
ADAPT = Decoding(temperature=None, strategy={"strategy": "adapt"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """A `proa serve` that answers.

    Attributes:
        url: its address.
        pid: its process.
        ready_s: seconds from starting the process to the first answer of /readyz.
    """

    url: str
    pid: int
    ready_s: float


@contextmanager
def running_server(model: Sequence[str]) -> Iterator[Server]:
    """Start a server, wait until it is ready, and stop it at the end.

    Raises:
        BenchmarkFailed: it ends, or is not ready in time.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    started = time.perf_counter()
    command = [*PROA, "serve", *model, "--port", str(port)]
    client = BlockingClient(ApiClient(url))
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        while not _is_ready(client):
            if process.poll() is not None:
                raise BenchmarkFailed(f"the server ended with status {process.returncode}")
            if time.perf_counter() - started > START_TIMEOUT_S:
                raise BenchmarkFailed(f"the server is not ready after {START_TIMEOUT_S:g} s")
            time.sleep(POLL_S)
        yield Server(url=url, pid=process.pid, ready_s=time.perf_counter() - started)
    finally:
        client.close()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """Give a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def memory_mb(pid: int, field: str) -> float:
    """Give a memory figure of a process from /proc, such as VmRSS or VmHWM, in MB of 10^6 bytes."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024 / 1e6
    raise BenchmarkFailed(f"/proc/{pid}/status has no {field}")


def measure_http(model: Sequence[str], options: argparse.Namespace) -> tuple[Target, Any]:
    """Compare decode speed through HTTP with the engine alone, in turn."""
    load = [*("--streams", str(HTTP_STREAMS)), *_load_arguments(options), "--repeats", "3"]
    http: list[float] = []
    alone: list[float] = []
    latency: dict[str, Any] = {}
    with running_server(model) as server:
        for number in range(options.repeats):
            figures = run_proa_bench([*model, *load])
            alone.append(figures["decode_tokens_per_s"][str(HTTP_STREAMS)])
            figures = run_proa_bench(["--url", server.url, *load])
            http.append(figures["decode_tokens_per_s"][str(HTTP_STREAMS)])
            latency = {name: figures[name] for name in ("ttft_ms", "tpot_ms")}
            say(f"round {number + 1}: engine {alone[-1]}, HTTP {http[-1]} tokens/s")
    target = Target(
        name=f"through HTTP, {HTTP_STREAMS} streams",
        required=REQUIRED_HTTP_SHARE,
        measured=median(http) / median(alone),
        detail=f"{median(http):.1f} tokens/s against {median(alone):.1f} of the engine alone",
    )
    return target, {"engine_tokens_per_s": alone, "http_tokens_per_s": http, **latency}


def measure_start(model: Sequence[str], repeats: int) -> tuple[Target, Any]:
    """Time starts of the server, the first of which may download and quantise."""
    with running_server(model) as server:
        first = server.ready_s
    times = []
    for _ in range(repeats):
        with running_server(model) as server:
            times.append(server.ready_s)
        say(f"ready after {times[-1]:.2f} s")
    target = Target(
        name="server ready, second start",
        required=REQUIRED_READY_S,
        measured=median(times),
        is_ceiling=True,
        unit="s",
        detail=f"{min(times):.2f} to {max(times):.2f} s of {repeats} starts",
    )
    return target, {"first_s": round(first, 3), "ready_s": [round(t, 3) for t in times]}


def measure_memory(model: Sequence[str], options: argparse.Namespace) -> tuple[Target, Any]:
    """Read the server's largest resident memory while it serves many streams."""
    with running_server(model) as server:
        loading = memory_mb(server.pid, "VmHWM")
        idle = memory_mb(server.pid, "VmRSS")
        # Starts VmHWM afresh, so that it is the peak of serving and not of loading.
        Path(f"/proc/{server.pid}/clear_refs").write_text("5", encoding="ascii")
        load = [*("--streams", str(MEMORY_STREAMS)), *_load_arguments(options)]
        run_proa_bench(["--url", server.url, *load, "--repeats", "1"])
        peak = memory_mb(server.pid, "VmHWM")
    target = Target(
        name=f"resident memory, {MEMORY_STREAMS} streams",
        required=REQUIRED_MEMORY_MB,
        measured=peak,
        is_ceiling=True,
        unit="MB",
        detail=f"{idle:.0f} MB idle, {loading:.0f} MB at most while loading",
    )
    figures = {"serving_peak_mb": peak, "idle_mb": idle, "loading_peak_mb": loading}
    return target, {name: round(value, 1) for name, value in figures.items()}


def measure_adapt(model: Sequence[str], options: argparse.Namespace) -> tuple[Target, Any]:
    """Compare decode speed with AdapT and at a plain temperature, in turn on one engine."""
    rates = decode_in_turn(
        {"model": model[0]} if model else {}, {"plain": PLAIN, "adapt": ADAPT},
        num_streams=HTTP_STREAMS, prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens, rounds=4 * options.repeats,
    )  # fmt: skip
    plain, adapt = (median(rates[name]) for name in ("plain", "adapt"))
    share = median_ratio(rates["adapt"], rates["plain"])
    target = Target(
        name=f"AdapT against plain temperature, {HTTP_STREAMS} streams",
        required=REQUIRED_ADAPT_SHARE,
        measured=share,
        detail=f"{adapt:.1f} tokens/s against {plain:.1f}",
    )
    return target, {f"{name}_tokens_per_s": values for name, values in rates.items()}


def _is_ready(client: BlockingClient) -> bool:
    try:
        client.text("/readyz")
    except RequestError:
        return False
    return True


def _load_arguments(options: argparse.Namespace) -> list[str]:
    return [
        *("--prompt-tokens", str(options.prompt_tokens)),
        *("--new-tokens", str(options.new_tokens)),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurements.

    Returns:
        0 if every figure reaches what is required, 1 if not or if a command failed.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="what to serve [default: the demo model]")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="rounds [default: %(default)s]")
    parser.add_argument(
        "--output-dir", type=Path, default=RESULTS, help="for the result [default: %(default)s]"
    )
    options = parser.parse_args(arguments)
    model = [] if options.model is None else [options.model]
    warn_if_busy()
    content = describe_run()
    try:
        measured = {
            "start": measure_start(model, options.repeats),
            "http": measure_http(model, options),
            "memory": measure_memory(model, options),
            "adapt": measure_adapt(model, options),
        }
    except BenchmarkFailed as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        return 1
    targets = [target for target, _ in measured.values()]
    print(target_table(targets))
    content |= {
        "model": options.model or "the demo model",
        "config": {
            "prompt_tokens": options.prompt_tokens,
            "new_tokens": options.new_tokens,
            "repeats": options.repeats,
        },
        "targets": [target.as_json() for target in targets],
        **{name: figures for name, (_, figures) in measured.items()},
    }
    finish("serving", content, options.output_dir)
    return 0 if all(target.is_met for target in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
