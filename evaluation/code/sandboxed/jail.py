"""Gives this process a root of its own, of read-only parts of the system's, and goes on there.

    unshare --user --map-root-user --mount ... python jail.py '{"paths": [...]}' COMMAND...

What bubblewrap does, for systems without it. Linux 5.12 or newer.
"""

import ctypes
import json
import os
import platform
import sys
from collections.abc import Sequence

SCRATCH_BYTES = 16 * 2**20
_BIND, _RECURSIVE, _PRIVATE, _READ_ONLY, _REMOUNT = 4096, 16384, 1 << 18, 1, 32
_NO_SET_UID, _NO_DEVICES, _DETACH = 2, 4, 2
_MOUNT_SETATTR = 442
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_AT_RECURSIVE, _ATTRIBUTE_READ_ONLY = 0x8000, 1
_DEVICES = ("null", "zero", "urandom")

_LIBRARY = ctypes.CDLL(None, use_errno=True)


def enter(paths: Sequence[tuple[str, str]]) -> None:
    """Make the new root in memory and change to it.

    Args:
        paths: (source, target) of each folder to be seen; a source that is missing is left out.

    Raises:
        OSError: the system does not allow it.
    """
    _mount(None, "/", None, _RECURSIVE | _PRIVATE)
    # Opened before the new root covers some of them.
    opened = [
        (os.open(source, os.O_PATH | os.O_CLOEXEC), target)
        for source, target in paths
        if os.path.isdir(source)
    ]
    root = "/tmp"
    _mount("tmpfs", root, "tmpfs", _NO_SET_UID | _NO_DEVICES, f"size={SCRATCH_BYTES}")
    os.mkdir(root + "/tmp")
    _mount("tmpfs", root + "/tmp", "tmpfs", _NO_SET_UID | _NO_DEVICES, f"size={SCRATCH_BYTES}")
    for source, target in opened:
        inside = root + target
        os.makedirs(inside, exist_ok=True)
        _mount(f"/proc/self/fd/{source}", inside, None, _BIND | _RECURSIVE)
        _make_read_only(inside)
        os.close(source)
    os.mkdir(root + "/dev")
    for name in _DEVICES:
        with open(f"{root}/dev/{name}", "w"):
            pass
        _mount(f"/dev/{name}", f"{root}/dev/{name}", None, _BIND)
    os.chdir(root)
    _check(_LIBRARY.syscall(_PIVOT_ROOT[platform.machine()], b".", b"."))
    _check(_LIBRARY.umount2(b".", _DETACH))
    _mount(None, "/", None, _REMOUNT | _BIND | _READ_ONLY | _NO_SET_UID | _NO_DEVICES)
    os.chdir("/tmp")


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, data: str | None = None
) -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind, data)]
    _check(_LIBRARY.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]))


def _make_read_only(path: str) -> None:
    attributes = (ctypes.c_uint64 * 4)(_ATTRIBUTE_READ_ONLY, 0, 0, 0)
    here = -100
    _check(
        _LIBRARY.syscall(
            _MOUNT_SETATTR, here, path.encode(), _AT_RECURSIVE, ctypes.byref(attributes), 32
        )
    )


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def run(command: list[str]) -> int:
    """Run a command as a child, and return its exit status, of a signal as shells give it.

    This process is the first of its namespace, and the first takes no signal of its own kind.
    """
    child = os.fork()
    if child == 0:
        os.execv(command[0], command)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    enter(json.loads(sys.argv[1])["paths"])
    sys.exit(run(sys.argv[2:]))
