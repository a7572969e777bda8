"""Load the native library, and refuse one that was built for other code than this.

The kernels read structures that `structs.py` mirrors by hand and panels that `panels.py` lays out;
a library that has another idea of either reads and writes memory at random. So the library tells
the size and end of each structure, and the digest of the sources that it was built of. An
installed copy has no sources beside it; its library and its Python files come in one wheel.
"""

import ctypes
import functools
import platform
import sys
from pathlib import Path

from models.kernels.native.sources import digest_sources
from models.kernels.native.structs import STRUCTURES, NativeOp, NativeStep

_PATH = Path(__file__).with_name("_native.so")
_P, _C = ctypes.c_void_p, ctypes.c_int

# Name: what it returns, what it takes.
FUNCTIONS = {
    "proa_layout": (_C, [_C]),
    "proa_sources": (ctypes.c_char_p, []),
    "proa_kernels_name": (ctypes.c_char_p, [ctypes.c_char_p]),
    "proa_pool_create": (_P, [_C]),
    "proa_pool_destroy": (None, [_P]),
    "proa_program_create": (_P, [ctypes.POINTER(NativeOp), _C, _P, _C, _P, ctypes.c_char_p]),
    "proa_program_destroy": (None, [_P]),
    "proa_program_run": (None, [_P, ctypes.POINTER(NativeStep)]),
    "proa_sample": (None, [_P, ctypes.c_char_p, _P, _C, _C, _P, _P, _P, _P]),
    "proa_measure": (None, [_P, ctypes.c_char_p, _P, _C, _C, _P, _P, _P, _P, _P]),
    "proa_pack_codes4": (None, [_P, _P, _C, _C, _C, _P]),
    "proa_blocks_bytes": (ctypes.c_int64, [_C, _C, _C]),
    "proa_pack_blocks": (None, [_C, _P, _C, _C, _C, _P]),
}


class NativeLibraryError(ValueError):
    """The native library does not fit this code; the message says how to rebuild it."""


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """Return the library beside this file, or None on a processor that has none.

    Raises:
        NativeLibraryError: it is missing, or was built for other code or another machine.
    """
    has_kernels = platform.machine().lower() in ("x86_64", "amd64")
    return load_library(_PATH) if has_kernels or _PATH.exists() else None


def load_library(path: Path) -> ctypes.CDLL:
    """Load a library, declare its functions and check that it is this code's.

    Args:
        path: of the library; `cpp` beside it holds its sources, or is missing.

    Raises:
        NativeLibraryError: it is missing, or was built for other code or another machine.
    """
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise _refusal(path, str(error).removeprefix(f"{path}: ")) from error
    for i, structure in enumerate(STRUCTURES):
        last = getattr(structure, structure._fields_[-1][0])
        if (library.proa_layout(2 * i), library.proa_layout(2 * i + 1)) != (
            ctypes.sizeof(structure),
            last.offset,
        ):
            raise _refusal(path, f"{structure.__name__} is laid out otherwise")
    sources = path.with_name("cpp")
    if sources.is_dir() and library.proa_sources().decode() != digest_sources(sources):
        raise _refusal(path, f"its sources in {sources} have changed")
    return library


def _refusal(path: Path, reason: str) -> NativeLibraryError:
    checkout = path.absolute().parents[3]
    if (checkout / "setup.py").is_file():
        options = f"-e {checkout}"
    else:
        options = "--force-reinstall FOLDER, where FOLDER holds Proa's sources"
    return NativeLibraryError(
        f"{path} was not built for this code ({reason}); rebuild it with: "
        f"{sys.executable} -m pip install --no-deps {options}"
    )
