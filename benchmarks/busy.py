"""Other processes that keep processors busy while something is measured."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.report import BenchmarkFailed

# Ends by itself, and when its parent does, so that none is left behind.
_LOOP = """
import os, sys, time
end, parent = time.monotonic() + float(sys.argv[1]), int(sys.argv[2])
while time.monotonic() < end and os.getppid() == parent:
    pass
"""


@contextmanager
def busy_processes(count: int, *, limit_s: float) -> Iterator[None]:
    """Run processes that compute without pause, until the block ends.

    Args:
        count: how many.
        limit_s: seconds after which they end by themselves.

    Raises:
        BenchmarkFailed: one had ended before the block did, so that not all of it was measured
            beside them.
    """
    command = [sys.executable, "-c", _LOOP, str(limit_s), str(os.getpid())]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
        if any(process.poll() is not None for process in processes):
            raise BenchmarkFailed(f"the busy processes had ended; they run for {limit_s:g} s")
    finally:
        for process in processes:
            process.kill()
            process.wait()
