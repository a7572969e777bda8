"""The instruction sets that kernel tests run on, and the compiler."""

import os
import shutil

import pytest

from models.kernels.native.executor import is_native_available

# "tiles" is what "amx" does, without its unit.
INSTRUCTION_SETS = ("avx2", "avxvnni", "avx512", "amx", "tiles")


@pytest.fixture(params=INSTRUCTION_SETS)
def native(request: pytest.FixtureRequest) -> str:
    """Each native instruction set that this processor has."""
    if not is_native_available(request.param):
        pytest.skip(f"this processor does not run the {request.param} kernels")
    return str(request.param)


@pytest.fixture(params=["avx2", "avxvnni", "avx512", "amx", "reference"])
def kernels(request: pytest.FixtureRequest) -> str:
    """Every choice of kernels that runs on a CPU; skips those this processor cannot run."""
    if request.param != "reference" and not is_native_available(request.param):
        pytest.skip(f"this processor does not run {request.param}")
    return request.param


@pytest.fixture
def compiler() -> str:
    """The C++ compiler, as `setup.py` finds it."""
    return os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")))
