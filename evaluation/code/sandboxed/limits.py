"""What a sandboxed process may use, set by itself before it runs what it is not to trust.

Namespaces keep it from files, network and other processes; resource limits and a filter of system
calls keep it from taking the machine: no new process, no memory outside its own address space.
Linux on x86-64 and on 64-bit ARM.
"""

import ctypes
import os
import platform
import resource
import struct
from collections.abc import Sequence

MAX_FILE_BYTES = 16 * 2**20
MAX_FILES = 64

# Code, jump if true, jump if false, operand.
Step = tuple[int, int, int, int]

# Numbers of system calls: x86-64, 64-bit ARM (None: it has none).
_DENIED: dict[str, tuple[int, int | None]] = {
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "fsopen": (430, 430),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "prlimit64": (302, 261),
    "setrlimit": (160, 164),
}
_CLONE, _CLONE3 = (56, 220), (435, 435)
_CLONE_THREAD = 0x10000
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_LOAD, _EQUAL, _AT_LEAST, _BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06


def limit(*, cpu_s: int, memory_bytes: int) -> None:
    """Bind this process and its threads, for good.

    Args:
        cpu_s: whole seconds of processor time.
        memory_bytes: of address space.

    Raises:
        OSError: the system does not take the filter of system calls.
    """
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, cpu_s, cpu_s + 1),
        (resource.RLIMIT_AS, memory_bytes, memory_bytes),
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES, MAX_FILE_BYTES),
        (resource.RLIMIT_NOFILE, MAX_FILES, MAX_FILES),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(kind, (soft, hard))
    _filter_calls(_program(*_ARCHITECTURES[platform.machine()]))


def _program(column: int, architecture: int) -> list[Step]:
    """Return the filter."""
    denied = [number for of in _DENIED.values() if (number := of[column]) is not None]
    steps = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        # The second set of numbers that x86-64 has.
        (_AT_LEAST, 0, 1, 0x40000000),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
    ]
    for number in denied:
        steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    # The C library falls back to the older call, whose flags a filter can read.
    steps += [(_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]
    steps += [
        (_EQUAL, 0, 3, _CLONE[column]),
        (_LOAD, 0, 0, 16),
        (_BITS, 1, 0, _CLONE_THREAD),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return steps


def _filter_calls(steps: Sequence[Step]) -> None:
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_void_p)]

    code = b"".join(struct.pack("=HBBI", *step) for step in steps)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = Program(len(steps), ctypes.cast(buffer, ctypes.c_void_p))
    library = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_filter, mode_filter = 38, 22, 2
    for arguments in (
        (no_new_privileges, 1, 0, 0, 0),
        (set_filter, mode_filter, ctypes.addressof(program), 0, 0),
    ):
        if library.prctl(*(ctypes.c_ulong(value) for value in arguments)) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
