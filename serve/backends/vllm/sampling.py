"""Our sampler as a logits processor of vLLM's: one class for both of its model runners.

It draws the token and leaves no other one possible, so whatever vLLM does next takes it: the same
token for the same seed as Proa's own engine, at exactly the temperature that the strategy gives.
Rows that do not ask for it are left alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams as VllmSamplingParams
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor

from adapters.format import Host
from decoding import Sampler
from decoding.picker import Picker
from serve.backends.vllm import models
from serve.backends.vllm.asked import Asked, read_asked
from serve.backends.vllm.reports import make_sender
from serve.backends.vllm.rows import LiveRow, RowKeeper
from serve.backends.vllm.settings import Settings, cores_of, read_settings
from serve.base_model import make_tables
from text.tokenizer import Tokenizer


class ProaLogitsProcessor(V1LogitsProcessor, V2LogitsProcessor):
    """Draws the tokens of the requests that ask for it.

    Args:
        vllm_config: of the engine.
        state: the device (V1), or the state of the requests on it (V2).
        is_pin_memory: of V1.
    """

    def __init__(self, vllm_config: VllmConfig, state: Any, is_pin_memory: bool = False) -> None:
        self._config = vllm_config
        self._is_v2 = not isinstance(state, torch.device)
        self._requests = state
        self._device: torch.device = state.device if self._is_v2 else state
        self._keeper: RowKeeper | None = None
        self._live: dict[int, LiveRow] = {}
        # Of V2: a request whose prompt has not been seen yet, by its slot.
        self._new: dict[int, Asked] = {}
        if read_settings(vllm_config.additional_config) is not None:
            _ = self._rows  # the tables of a large vocabulary take a second or two

    @classmethod
    def validate_params(cls, sampling_params: VllmSamplingParams) -> None:
        """Refuse what cannot be drawn, before the request is admitted."""
        read_asked(sampling_params, penalties_are_applied=False)

    def is_argmax_invariant(self) -> bool:
        """Tell V1 that greedy rows are for us, too."""
        return False

    @property
    def _rows(self) -> RowKeeper:
        if self._keeper is None:
            self._keeper = _make_keeper(self._config, self._device)
        return self._keeper

    # What V1 calls.

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow what enters, leaves and moves within the batch."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._drop(index)
        for index, params, prompt, output_ids in batch_update.added:
            self._drop(index)
            asked = read_asked(params, penalties_are_applied=False)
            if asked is not None:
                self._live[index] = self._rows.start(asked, prompt or [], output_ids)
        for source, target, direction in batch_update.moved:
            moved, other = self._live.pop(source, None), self._live.pop(target, None)
            if moved is not None:
                self._live[target] = moved
            if other is not None and direction is MoveDirectionality.SWAP:
                self._live[source] = other

    def _drop(self, index: int) -> None:
        live = self._live.pop(index, None)
        if live is not None:
            self._rows.park(live)

    # What V2 calls.

    def add_request(self, req_idx: int, sampling_params: VllmSamplingParams) -> bool:
        """Take a slot; return whether its logits are changed."""
        self._drop(req_idx)
        self._new.pop(req_idx, None)
        asked = read_asked(sampling_params, penalties_are_applied=True)
        if asked is not None:
            self._new[req_idx] = asked
        return asked is not None

    def _of_step(self, ctx: Any) -> dict[int, LiveRow]:
        """Return V2's rows that get a token in this step, by row of the logits."""
        state, found = self._requests, {}
        for row, slot in enumerate(ctx.idx_mapping_np.tolist()):
            if slot not in self._live and slot not in self._new:
                continue
            length = int(state.prompt_len.np[slot])
            count = int(ctx.seq_lens_upper_bound_np[row])
            if count < int(state.prefill_len.np[slot]):
                continue  # a part of its prompt: what is drawn would be thrown away
            if slot in self._new:
                prompt = state.all_token_ids.gpu[slot, :length].tolist()
                self._live[slot] = self._rows.start(self._new.pop(slot), prompt, [])
            live = self._live[slot]
            live.output_ids = self._outputs(live, slot, length, count)
            found[row] = live
        return found

    def _outputs(self, live: LiveRow, slot: int, length: int, count: int) -> Sequence[int]:
        """Return the tokens after a prompt of `length`, read from the device only if they must."""
        row = live.row
        if row.num_generated == count - length:
            return row.token_ids
        if row.num_generated == count - length - 1 and live.drawn is not None:
            return (*row.token_ids, live.drawn)
        tokens: list[int] = self._requests.all_token_ids.gpu[slot, length:count].tolist()
        return tokens

    # What both call.

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Draw; see the interfaces."""
        live = self._live if ctx is None else self._of_step(ctx)
        if live:
            self._rows.draw(logits, dict(sorted(live.items())))
        return logits


def _make_keeper(config: VllmConfig, device: torch.device) -> RowKeeper:
    """Build the sampler of the engine's vocabulary."""
    settings = read_settings(config.additional_config)
    model_config = config.model_config
    vocab_size = model_config.get_vocab_size()
    folder = Path(model_config.tokenizer or model_config.model)
    tokenizer = Tokenizer.from_folder(folder, num_embeddings=vocab_size)
    sampler = Sampler(
        make_tables(tokenizer, vocab_size), eos_token_ids=tokenizer.eos_token_ids, device=device,
        picker=_make_picker(settings, device),
    )  # fmt: skip
    sends = settings is not None and settings.reports and get_tensor_model_parallel_rank() == 0
    return RowKeeper(
        sampler, send=make_sender(settings.reports) if settings and sends else None,
        states=_states, host=_host,
    )  # fmt: skip


def _make_picker(settings: Settings | None, device: torch.device) -> Picker | None:
    if settings is None or device.type != "cpu" or settings.kernels == "reference":
        return None
    from serve.backends.vllm.native_linear import make_native_picker

    return make_native_picker(
        settings.kernels, cores_of(settings, get_tensor_model_parallel_rank())
    )


def _states() -> Tensor | None:
    return models.current[0].states if models.current else None


def _host() -> Host:
    """Return what the model is to adapters; the loader has told."""
    host: Host = models.current[0].host  # type: ignore[assignment]
    return host
