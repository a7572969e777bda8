"""Build the native kernels into `models/kernels/native/_native.so`, a shared library ctypes loads.

The library needs neither torch nor Python headers. Files named `*_avx2.cpp`, `*_avxvnni.cpp`,
`*_avx512.cpp` and `*_amx.cpp` are compiled for their instruction set; which one runs is decided at
run time.
The digest of the sources is compiled in, so that a library of other ones is refused. Processors
that are not x86-64 get no library and compute with torch.
"""

import os
import platform
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = Path("models/kernels/native/cpp")
BASE_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-pthread")
digest_sources = runpy.run_path(str(ROOT / SOURCES.parent / "sources.py"))["digest_sources"]
AVX512_FLAGS = (
    "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c",
)  # fmt: skip
ISA_FLAGS = {
    "_avx2": ("-mavx2", "-mfma", "-mf16c"),
    "_avxvnni": ("-mavx2", "-mfma", "-mf16c", "-mavxvnni"),
    "_avx512": AVX512_FLAGS,
    "_amx": (*AVX512_FLAGS, "-mamx-tile", "-mamx-int8"),
}


def find_compiler() -> str:
    """Return the C++ compiler: $CXX, or the first of c++, g++ and clang++ on the path."""
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else ("c++", "g++", "clang++"):
        path = shutil.which(name.split()[0])
        if path:
            return path
    raise SystemExit(
        "error: Proa's kernels need a C++17 compiler, and "
        + (f"CXX={wanted} was not found" if wanted else "none of c++, g++, clang++ was found")
        + ". Install one (Debian and Ubuntu: apt install g++; Fedora: dnf install gcc-c++; "
        "macOS: xcode-select --install) or name one with CXX=..."
    )


def isa_flags(name: str) -> tuple[str, ...]:
    """Return the compiler flags of a file's instruction set."""
    stem = Path(name).stem
    return next((flags for suffix, flags in ISA_FLAGS.items() if stem.endswith(suffix)), ())


class BuildNative(build_ext):
    """Compile each file with its own flags and link one library without a Python ABI tag."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler()
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)

        digest = f'-DPROA_SOURCES="{digest_sources(ROOT / SOURCES)}"'

        def compile_one(name: str) -> str:
            target = str(objects / (Path(name).stem + ".o"))
            self.call([compiler, *BASE_FLAGS, *isa_flags(name), digest, "-c", name, "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            linked = list(pool.map(compile_one, ext.sources))
        self.call([compiler, "-shared", "-pthread", "-o", str(library), *linked])

    def call(self, command: list[str]) -> None:
        """Run the compiler, and end the build with its own message when it fails."""
        self.announce(" ".join(command), level=2)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"error: {' '.join(command)} failed\n{done.stderr}")


NATIVE = Extension(
    "models.kernels.native._native",
    sources=sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / SOURCES).glob("*.cpp")),
)

setup(
    ext_modules=[NATIVE] if platform.machine().lower() in ("x86_64", "amd64") else [],
    cmdclass={"build_ext": BuildNative},
)
