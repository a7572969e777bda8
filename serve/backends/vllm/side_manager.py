"""What stands in for vLLM's LoRA manager in a worker: the side networks that requests name.

vLLM carries a LoRA request from the API to the worker, tells apart the cached prefixes of different
ones, and says which token of a step has which. All of that is what side networks need; only
what is done with an adapter differs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.request import LoRARequest

from adapters.format import AdapterError
from adapters.methods import SideMethod, method_of
from models.kernels.reference.executor import attach_plain
from models.side import SideNetwork, SideProgram, build_side_program
from serve.backends.vllm.addresses import AdapterAddress, parse_address
from serve.backends.vllm.settings import Heads, heads_of
from serve.backends.vllm.side_stack import SideRun

Held: TypeAlias = tuple[Heads, SideProgram, float]


class SideManager:
    """The side networks that a worker holds; called as vLLM calls its `WorkerLoRAManager`.

    Those that are added stay until they are removed.
    """

    is_enabled = True

    def __init__(self, vllm_config: VllmConfig, device: torch.device, *_: object) -> None:
        self._device = device
        self._held: dict[int, Held | None] = {}
        # By folder and digest; one for all scales.
        self._programs: dict[tuple[str, str], tuple[Heads, SideProgram]] = {}
        self._model: Any = None

    def create_lora_manager(self, model: nn.Module, vllm_config: VllmConfig) -> nn.Module:
        """Take the model; nothing of it is replaced."""
        self._model = model
        return model

    def add_adapter(self, request: LoRARequest) -> bool:
        """Load an adapter that is not there yet.

        Raises:
            LoRAAdapterNotFoundError: there is no such folder.
            ValueError: it does not hold a side network of this model.
        """
        if request.adapter_id in self._held:
            return False
        address = parse_address(request.lora_path)
        if not Path(address.folder).is_dir():
            raise LoRAAdapterNotFoundError(request.lora_name, request.lora_path)
        try:
            self._held[request.adapter_id] = self._load(address)
        except AdapterError as error:
            raise ValueError(f"adapter {request.lora_name!r}: {error}") from error
        return True

    def _load(self, address: AdapterAddress) -> Held:
        known = self._programs.get((address.folder, address.digest))
        if known is None:
            known = self._programs[address.folder, address.digest] = self._read(address)
        return *known, address.scale

    def _read(self, address: AdapterAddress) -> tuple[Heads, SideProgram]:
        stored, host = address.read(), self._model.sides.host
        method = method_of(stored.config)
        if not isinstance(method, SideMethod):
            raise AdapterError(f"it is a {method.title}, not a side network")
        network = method.build(stored, host).network
        heads = heads_of(network)
        assert isinstance(network, SideNetwork)
        if not self._model.sides.knows(heads):
            raise AdapterError(
                f"its attention has {heads[0]} heads, KV heads and channels, and the engine has no "
                "cache for such side networks; start it with this adapter"
            )
        side = attach_plain(build_side_program(network, host.spec), self._device)
        assert isinstance(side.lowered, SideProgram)
        return heads, side.lowered

    def set_active_adapters(self, requests: set[LoRARequest], mapping: Any) -> None:
        """Say what the next step runs.

        Args:
            requests: the adapters of its tokens.
            mapping: `index_mapping` is the adapter of each token, 0 for none.
        """
        for request in requests:
            self.add_adapter(request)
        self._model.sides.ask(list(self._runs(mapping.index_mapping)))

    def _runs(self, adapter_ids: Sequence[int]) -> Iterator[tuple[Heads, SideRun]]:
        of_tokens = torch.tensor(adapter_ids, device=self._device)
        for adapter_id in sorted(set(adapter_ids)):
            held = self._held.get(adapter_id)
            if held is not None:
                heads, program, scale = held
                rows = torch.nonzero(of_tokens == adapter_id)[:, 0]
                yield heads, SideRun(program, scale, rows)

    def remove_adapter(self, adapter_id: int) -> bool:
        """Forget an adapter; False if there is none such."""
        was_held = self._held.pop(adapter_id, self) is not self
        used = {id(held[1]) for held in self._held.values() if held is not None}
        self._programs = {k: v for k, v in self._programs.items() if id(v[1]) in used}
        return was_held

    def remove_all_adapters(self) -> None:
        """Forget all."""
        self._held.clear()
        self._programs.clear()

    def pin_adapter(self, adapter_id: int) -> bool:
        """Do nothing: what is added stays."""
        return adapter_id in self._held

    def list_adapters(self) -> set[int]:
        """Return the ids of those that are held."""
        return set(self._held)

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """Nothing is cached for warm-ups."""
        yield

    def add_dummy_lora(self, request: LoRARequest, rank: int) -> bool:
        """Hold nothing under an id, for warm-ups."""
        self._held[request.adapter_id] = None
        return True

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """Return a rank; side networks have none."""
        return default_rank

    def supports_tower_connector_lora(self) -> bool:
        """Return that there are no other towers."""
        return False
