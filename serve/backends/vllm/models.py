"""vLLM's own models with side networks beside them.

Hooks on the layers hand the residual stream to `SideStack`; nothing of a model is changed, so its
kernels, quantisation and tensor parallelism stay as they are. Every rank computes the side networks
whole: they are a half per cent of the work, and dividing them would cost two sums a layer.
"""

import importlib
import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.interfaces import SupportsLoRA

from models.families import describe_model
from serve.backends.vllm.settings import Heads, find_forms, read_settings
from serve.backends.vllm.side_stack import PackedHeads, SideRun, SideStack

MIN_HEAD_SIZE = 32
"""Channels of a packed head; what vLLM's attention takes on every device."""

# Architecture in a checkpoint's config: vLLM's class. Those that vLLM has no class of its own for
# run in its "transformers" classes.
BASES = {
    "LlamaForCausalLM": ("vllm.model_executor.models.llama", "LlamaForCausalLM"),
    "MistralForCausalLM": ("vllm.model_executor.models.mistral", "MistralForCausalLM"),
    "Qwen2ForCausalLM": ("vllm.model_executor.models.qwen2", "Qwen2ForCausalLM"),
    "Qwen3ForCausalLM": ("vllm.model_executor.models.qwen3", "Qwen3ForCausalLM"),
    "OPTForCausalLM": ("vllm.model_executor.models.opt", "OPTForCausalLM"),
    "PhiForCausalLM": ("vllm.model_executor.models.transformers", "TransformersForCausalLM"),
}
PREFIX = "Proa"
_LAYER = re.compile(r"(?:.*\.)?layers\.\d+")

current: list["SideRunner"] = []
"""The side networks of this process's model: its sampler asks for the states that it has seen."""


def __getattr__(name: str) -> type:
    """Make the class of an architecture when it is asked for: each loads a module of vLLM's."""
    base = BASES.get(name.removeprefix(PREFIX))
    if base is None or not name.startswith(PREFIX):
        raise AttributeError(name)
    module, class_name = base
    cls = type(name, (_WithSides, getattr(importlib.import_module(module), class_name)), {})
    cls.__module__ = __name__
    globals()[name] = cls
    return cls


class SideRunner(nn.Module):
    """Side networks beside a model: their attention layers, and what runs in a step.

    Args:
        vllm_config: of the engine.
        forms: attention of the side networks that may come.

    Attributes:
        states: (L, D), what the LM head has read last.
    """

    def __init__(self, vllm_config: VllmConfig, forms: Sequence[Heads]) -> None:
        super().__init__()
        self.states: Tensor | None = None
        self._attentions = nn.ModuleList(
            nn.ModuleList(
                _SideAttention(vllm_config, f"model.layers.{layer}.side{form}", *heads)
                for layer, heads in enumerate(of_layers)
            )
            for form, of_layers in enumerate(forms)
        )
        self._forms = {
            of_layers: SideStack(partial(self._attend, form))
            for form, of_layers in enumerate(forms)
        }
        self._asked: list[tuple[Heads, SideRun]] = []
        self._is_active = False

    def _attend(self, form: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layers: Any = self._attentions[form]
        out: Tensor = layers[layer](q, k, v)
        return out

    def ask(self, runs: list[tuple[Heads, SideRun]]) -> None:
        """Set what the coming steps run; tokens by their number in the step."""
        self._asked = runs

    def knows(self, heads: Heads) -> bool:
        """Whether there is a cache for side networks with such attention."""
        return heads in self._forms

    def begin(self, positions: Tensor) -> None:
        """Start a step."""
        self._is_active = bool(self._asked)
        for heads, stack in self._forms.items():
            runs = [run for of, run in self._asked if of == heads]
            stack.begin(runs, positions)

    def tap(self, index: int, hidden: Tensor) -> None:
        """See `SideStack.tap`."""
        if self._is_active:
            for stack in self._forms.values():
                stack.tap(index, hidden)

    def blend(self, normed: Tensor) -> Tensor:
        """See `SideStack.blend`."""
        if self._is_active:
            for stack in self._forms.values():
                normed = stack.blend(normed)
        return normed


class _SideAttention(nn.Module):
    """Attention of one layer of side networks, over vLLM's paged cache.

    Some of vLLM's kernels want one softmax scale for all layers, so the queries carry theirs.
    """

    def __init__(
        self, vllm_config: VllmConfig, prefix: str, num_heads: int, num_kv_heads: int, width: int
    ) -> None:
        super().__init__()
        model_config = vllm_config.model_config
        base_scale = model_config.get_head_size() ** -0.5
        self._factor = width**-0.5 / base_scale
        self._dtype = model_config.dtype
        self._heads = PackedHeads(num_heads, num_kv_heads, width, packed_size(width))
        self.attention = Attention(
            num_heads, self._heads.size, base_scale, num_kv_heads=self._heads.num_kv_heads,
            cache_config=vllm_config.cache_config, prefix=f"{prefix}.attn",
        )  # fmt: skip

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return (T, H, E) float32 of (T, H, E) queries, (T, K, E) keys and values."""
        heads = self._heads
        packed = heads.pack_queries(q * self._factor), heads.pack_keys(k), heads.pack_keys(v)
        q, k, v = (x.to(self._dtype).contiguous() for x in packed)
        out = self.attention(q, k, v)
        return heads.unpack(out.view(len(q), heads.num_heads, heads.size).float())


def packed_size(width: int) -> int:
    """Return the width of the packed heads for side heads of a width."""
    return max(MIN_HEAD_SIZE, -(-width // MIN_HEAD_SIZE) * MIN_HEAD_SIZE)


class _WithSides(SupportsLoRA):
    """What a model gets; comes before vLLM's class among its bases."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        settings = read_settings(vllm_config.additional_config)
        forms: Sequence[Heads] = ()
        if settings is not None and settings.adapters:
            config_file = Path(vllm_config.model_config.model, "config.json")
            config: Any = json.loads(config_file.read_text(encoding="utf-8"))
            forms = find_forms(settings.adapters, describe_model(config).spec)
        layers = [m for name, m in self.named_modules() if _LAYER.fullmatch(name)]
        check_parallelism(vllm_config)
        self.sides = SideRunner(vllm_config, forms)
        current[:] = [self.sides]
        if forms:
            layers[0].register_forward_pre_hook(self._take_embedding, with_kwargs=True)
            for index, layer in enumerate(layers):
                layer.register_forward_hook(partial(self._take_output, index + 1))

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.sides.begin(positions)
        states = super().forward(input_ids, positions, *args, **kwargs)
        return self.sides.blend(states) if isinstance(states, Tensor) else states

    def compute_logits(self, hidden_states: Tensor) -> Any:
        self.sides.states = hidden_states
        return super().compute_logits(hidden_states)

    def _take_embedding(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        given = (*args, *kwargs.values())
        hidden = next(x for x in given if isinstance(x, Tensor) and x.is_floating_point())
        self.sides.tap(0, hidden.flatten(0, -2))

    def _take_output(self, index: int, _: nn.Module, __: Any, output: Any) -> None:
        """Hand on what a layer leaves; some give the last sum's two parts."""
        if isinstance(output, tuple):
            hidden, residual = (*output, None)[:2]
            output = hidden if residual is None else hidden + residual
        self.sides.tap(index, output.flatten(0, -2))


def check_parallelism(vllm_config: VllmConfig) -> None:
    """Refuse what our sampler and side networks would be left out of.

    Raises:
        ValueError: speculative decoding, or layers divided among machines.
    """
    if vllm_config.speculative_config is not None:
        raise ValueError(
            "speculative decoding: vLLM then leaves samplers of others out, and Proa's with them; "
            "start it without --speculative-config"
        )
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError(
            "pipeline_parallel_size must be 1: side networks read every layer; use "
            "--tensor-parallel-size"
        )


def side_cache_values(forms: Sequence[Heads]) -> int:
    """Return how many numbers the caches of side networks hold for each token."""
    total = 0
    for form in forms:
        for num_heads, num_kv_heads, width in form:
            heads = PackedHeads(num_heads, num_kv_heads, width, packed_size(width))
            total += 2 * heads.num_kv_heads * heads.size
    return total
