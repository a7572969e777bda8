"""The native backend over the engine's scripted model."""

from collections.abc import Callable
from typing import Any

import pytest

from decoding import Sampler
from serve.attachments.registry import AdapterRegistry
from serve.backends.native import NativeBackend
from serve.engine.limits import EngineLimits
from tests.serve.engine.conftest import expect, expect_all, model, sampler, tables
from tests.serve.engine.scripted_adapters import folders

__all__ = ["expect", "expect_all", "folders", "make_backend", "model", "sampler", "tables"]


@pytest.fixture
def make_backend(
    model: Any, sampler: Sampler, request: pytest.FixtureRequest
) -> Callable[..., NativeBackend]:
    """Give a function that builds a backend over `model`; it is closed after the test."""

    def make(adapters: AdapterRegistry | None = None, **settings: Any) -> NativeBackend:
        defaults: dict[str, Any] = {
            "num_cache_blocks": 64,
            "block_size": 4,
            "max_batch_tokens": 16,
            "max_running_sequences": 4,
        }
        limits = EngineLimits(**(defaults | settings))
        backend = NativeBackend(model, sampler, limits, eos_token_ids=(0,), adapters=adapters)

        def close() -> None:
            if model.gate is not None:
                model.gate.release(1000)
            backend.close()

        request.addfinalizer(close)
        return backend

    return make
