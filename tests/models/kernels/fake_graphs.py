"""CUDA graphs on the CPU, for what can be tested of them without a GPU.

As a real one, a graph holds no tensor that it did not make itself: a replay that would read memory
that was freed since fails.
"""

import contextlib
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_pools = itertools.count(1)


class FakeGraph(TorchDispatchMode):
    """Keeps a list of operations and computes them again."""

    live: "weakref.WeakSet[FakeGraph]" = weakref.WeakSet()

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._made: dict[int, Tensor] = {}
        self._pool: int | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        inputs = tree_map_only(Tensor, self._hold, (args, kwargs))
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not any(tensor is t for t in tree_leaves(args)):
                self._made[id(tensor)] = tensor
        self._calls.append((func, *inputs, tree_map_only(Tensor, self._hold, out)))
        return out

    def _hold(self, tensor: Tensor) -> object:
        return self._made[id(tensor)] if id(tensor) in self._made else weakref.ref(tensor)

    def pool(self) -> int:
        assert self._pool is not None
        return self._pool

    def begin(self, pool: int | None) -> None:
        assert pool is None or pool in {graph._pool for graph in FakeGraph.live}, "a pool that died"
        self._pool = next(_pools) if pool is None else pool
        FakeGraph.live.add(self)

    def replay(self) -> None:
        with torch.inference_mode():
            for func, args, kwargs, out in self._calls:
                args, kwargs, out = (
                    tree_map_only(weakref.ref, _find, part) for part in (args, kwargs, out)
                )
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old is not new:
                        old.copy_(new)


def _find(reference: "weakref.ref[Tensor]") -> Tensor:
    tensor = reference()
    assert tensor is not None, "a graph reads memory that was freed"
    return tensor


class _Stream:
    def __init__(self, device: torch.device) -> None: ...

    def wait_stream(self, other: "_Stream") -> None: ...


@contextlib.contextmanager
def _capture(
    graph: FakeGraph, *, pool: int | None, stream: _Stream, capture_error_mode: str
) -> Iterator[None]:
    assert capture_error_mode == "thread_local"
    graph.begin(pool)
    with graph:
        yield


def fake_cuda(patch: pytest.MonkeyPatch) -> None:
    """Have the CUDA executor's graphs computed on the CPU."""
    for name, value in {
        "CUDAGraph": FakeGraph,
        "graph": _capture,
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": contextlib.nullcontext,
        "device": contextlib.nullcontext,
    }.items():
        patch.setattr(torch.cuda, name, value)
    patch.setattr("models.decoder.resolve_kernels", lambda kernels, device: kernels)
