"""How fast this machine reads memory, from a small C program that does nothing else."""

import re
from pathlib import Path

from benchmarks.report import BenchmarkFailed, run_command

SOURCE = Path(__file__).with_suffix(".c")
CACHE_LEVELS = Path("/sys/devices/system/cpu/cpu0/cache")
LEAST_BYTES = 2**30
CACHES_READ = 8  # so many last-level caches are read, which leaves little of the last pass in them
PASSES = 8
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def build_reader(folder: Path) -> Path:
    """Compile the program for this processor, into a folder that keeps it.

    Raises:
        BenchmarkFailed: there is no compiler.
    """
    program = folder / "read_bandwidth"
    if not program.is_file() or program.stat().st_mtime < SOURCE.stat().st_mtime:
        folder.mkdir(parents=True, exist_ok=True)
        run_command(["cc", "-O3", "-march=native", "-pthread", SOURCE, "-o", program])
    return program


def measure_bandwidth(program: Path, *, threads: int) -> float:
    """Return the most bytes a second that some threads together read in one of several passes."""
    size = max(LEAST_BYTES, CACHES_READ * last_level_cache_bytes())
    output = run_command([program, str(threads), str(size), str(PASSES)])
    return max(float(line) for line in output.split())


def last_level_cache_bytes(levels: Path = CACHE_LEVELS) -> int:
    """Return the size of the largest cache of the first processor; 0 where the system tells none.

    Raises:
        BenchmarkFailed: the system writes sizes in another way.
    """
    sizes = [0]
    for path in levels.glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        match = re.fullmatch(r"(\d+)([KMG]?)", text)
        if match is None:
            raise BenchmarkFailed(f"{path}: {text!r} is not a size")
        sizes.append(int(match[1]) * _UNITS.get(match[2], 1))
    return max(sizes)
