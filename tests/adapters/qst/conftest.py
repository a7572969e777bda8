"""The kernels that serving tests of side networks run on."""

import pytest

from models.kernels.native.executor import is_native_available


@pytest.fixture(params=["reference", "avx2", "avx512"])
def kernels(request: pytest.FixtureRequest) -> str:
    """Every implementation that this processor has."""
    if request.param != "reference" and not is_native_available(request.param):
        pytest.skip(f"this processor does not run the {request.param} kernels")
    return str(request.param)
