"""What this process may use of the machine, container limits included."""

import ctypes
import mmap
import os
import platform
import threading
from contextlib import suppress
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_LOW_PRIORITY = 19


def count_processors(cgroup: Path = _CGROUP) -> int:
    """Return how many processors this process may use: its affinity, or its container's quota."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota, _, period = _read(cgroup / "cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit() and int(period):
        count = min(count, max(1, round(int(quota) / int(period))))
    return count


def describe_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    for line in _read(cpuinfo).splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name} ({cores} cores)"


def free_memory_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int:
    """Return how many bytes can be taken without swapping, within the container's limit."""
    free = _physical_bytes()
    for line in _read(meminfo).splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = _read(cgroup / "memory.max"), _read(cgroup / "memory.current")
    if limit.isdigit() and used.isdigit():
        free = min(free, max(0, int(limit) - int(used)))
    return free


def release_mapped_pages(folder: Path, smaps: Path = Path("/proc/self/smaps")) -> int:
    """Give back the resident pages of files mapped from a folder, unless something wrote to them.

    Loading has read all of a checkpoint; what is still used (rows of the embedding) is mapped again
    from the system's file cache when it is touched.

    Returns:
        How many mappings were released; 0 where the system does not know such a thing.
    """
    mapped = None
    count = 0
    for line in _read(smaps).splitlines():
        fields = line.split(maxsplit=5)
        if "-" in fields[0] and not fields[0].endswith(":"):
            is_ours = len(fields) == 6 and Path(fields[5]).parent == folder
            mapped = [int(text, 16) for text in fields[0].split("-")] if is_ours else None
        elif fields[0] == "Anonymous:" and fields[1] == "0" and mapped is not None:
            count += _release(*mapped)
    return count


def _release(start: int, end: int) -> bool:
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return False
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return int(madvise(start, end - start, mmap.MADV_DONTNEED)) == 0


def trim_heap() -> None:
    """Return freed memory to the system, where the C library is glibc."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def lower_priority() -> None:
    """Let this thread yield to all others, where the system has priorities of threads."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOW_PRIORITY)


def _physical_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 4 * 2**30


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
