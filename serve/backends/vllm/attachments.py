"""What requests get of the adapters that they name."""

import asyncio
import itertools
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from vllm.lora.request import LoRARequest

from serve.attachments.registry import AdapterRegistry
from serve.backends.vllm.addresses import AdapterAddress
from serve.backends.vllm.engine import VllmEngine

MAX_SCALES = 64
"""Of one side network, that the workers know at a time."""

_adapter_ids = itertools.count(1)


class SideHandle:
    """A side network in an engine; the workers forget it when nothing holds the handle any more.

    Args:
        engine: has the model that it sits on.
        address: where it lies.
    """

    def __init__(self, engine: VllmEngine, address: AdapterAddress) -> None:
        self.address = address
        self._engine = engine
        self._lock = asyncio.Lock()
        self._added: dict[float, LoRARequest] = {}

    async def at_scale(self, scale: float) -> LoRARequest:
        """Return what names it to vLLM, loaded; runs on the engine's loop.

        Raises:
            ValueError: a worker cannot load it.
        """
        async with self._lock:
            if scale not in self._added:
                # The name keeps cached prefixes apart: content and scale, whatever the path.
                name = f"{self.address.digest}:{scale!r}"
                address = replace(self.address, scale=scale)
                request = LoRARequest(name, next(_adapter_ids), str(address))
                await self._engine.add(request)
                if len(self._added) == MAX_SCALES:
                    # A request that runs with it brings it back.
                    oldest = self._added.pop(next(iter(self._added)))
                    self._engine.forget([oldest.adapter_id])
                self._added[scale] = request
            return self._added[scale]

    def __del__(self) -> None:
        if self._added:
            self._engine.forget([request.adapter_id for request in self._added.values()])


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmAttachment:
    """What the sequences of an arm need beside the base.

    Attributes:
        engine: runs them.
        side: the side network that they use, or None.
        head: address of the temperature head that they use, or None.
    """

    engine: VllmEngine
    side: SideHandle | None = None
    head: str | None = None


VllmRegistry: TypeAlias = AdapterRegistry[VllmAttachment, Any]
