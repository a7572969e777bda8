"""Compress Vision Transformers in the layout of `transformers`, as any module of blocks.

The same three stages as for decoders, fed by hooks of `nn.Module`: spectra of all linears inside
blocks, a plan of ranks, then factors block by block on what the compressed model reads.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapters.mixed_rank.compress_config import CompressConfig
from adapters.mixed_rank.factors import compensate_at, fit, refit_left
from adapters.mixed_rank.modules import LowRankLinear, SharedFactor, set_module
from adapters.mixed_rank.moments import (
    Moments,
    MomentSum,
    SplitMoments,
    drop_drift,
    output_error,
    representative,
)
from adapters.mixed_rank.ranks import plan_groups
from adapters.mixed_rank.recovery import recover
from adapters.windows import step_generator
from models.q8_0 import quantize_q8_0
from models.weights import dense

_HELD_OUT_BATCHES = 4


class _Stop(Exception):
    """Ends a forward pass: what was to be seen has been seen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Linears of a block that read the same tensor.

    Attributes:
        block: name of the block's module.
        names: of the linears' modules, in order of their use.
    """

    block: str
    names: tuple[str, ...]

    @property
    def title(self) -> str:
        """A name for all of them."""
        parts = [name.removeprefix(f"{self.block}.") for name in self.names]
        return f"{self.block}.{'+'.join(parts)}"


def find_blocks(model: nn.Module) -> list[str]:
    """Return the names of a model's blocks: members of its innermost lists of modules."""

    def has_list(module: nn.Module) -> bool:
        return any(isinstance(part, nn.ModuleList) for part in module.modules())

    return [
        f"{name}.{number}" if name else str(number)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for number, member in enumerate(module)
        if not has_list(member) and any(isinstance(m, nn.Linear) for m in member.modules())
    ]


@torch.no_grad()
def find_groups(model: nn.Module, pixels: Tensor) -> list[Group]:
    """Return the linears of all blocks, those together that read the same tensor.

    Args:
        model: takes (B, C, H, W) pixels.
        pixels: some to try it on.
    """
    blocks = find_blocks(model)
    owner = {
        f"{block}.{name}": block
        for block in blocks
        for name, module in model.get_submodule(block).named_modules()
        if isinstance(module, nn.Linear)
    }
    seen: list[tuple[str, Tensor]] = []

    def look(name: str) -> Callable[..., None]:
        return lambda _, inputs: seen.append((name, inputs[0]))

    hooks = [model.get_submodule(name).register_forward_pre_hook(look(name)) for name in owner]
    try:
        model(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    groups: list[tuple[Tensor, list[str]]] = []
    for name, x in seen:
        if groups and groups[-1][0] is x and owner[groups[-1][1][0]] == owner[name]:
            groups[-1][1].append(name)
        else:
            groups.append((x, [name]))
    return [Group(block=owner[names[0]], names=tuple(names)) for _, names in groups]


@torch.no_grad()
def inputs_of(model: nn.Module, batches: Sequence[Tensor], name: str) -> Iterator[Tensor]:
    """Yield what a module reads of each batch; no pass goes on after it."""
    found: list[Tensor] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0])
        raise _Stop

    hook = model.get_submodule(name).register_forward_pre_hook(note)
    try:
        for batch in batches:
            with suppress(_Stop):
                model(batch)
            yield found.pop()
    finally:
        hook.remove()


@torch.no_grad()
def calls_of(
    model: nn.Module, batches: Sequence[Tensor], block: str
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], Tensor]]:
    """Yield arguments, named ones and result of a block for each batch."""
    found: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []

    def note(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        found.append((inputs, named, _first(output)))
        raise _Stop

    hook = model.get_submodule(block).register_forward_hook(note, with_kwargs=True)
    try:
        for batch in batches:
            with suppress(_Stop):
                model(batch)
            yield found.pop()
    finally:
        hook.remove()


def compress_modules(
    model: nn.Module,
    batches: Sequence[Tensor],
    config: CompressConfig,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, dict[str, Any]]:
    """Put factors in the place of a model's linears.

    Args:
        model: in evaluation mode; it is changed.
        batches: (B, C, H, W) pixels to fit to.
        config: `form` "int4" is not for modules; sequences, lengths and checkpoints play no part.
        report: told what happens, a line at a time.

    Returns:
        By the title of each group: rank, shape and errors.

    Raises:
        BudgetError: so much cannot be removed.
        MomentsError: an input is no number; the linear is named.
    """
    groups = find_groups(model, batches[0][:1])
    plain = copy.deepcopy(model) if config.compensate else model
    facts: dict[str, dict[str, Any]] = {}
    for number, group in enumerate(groups):
        weight = _stacked(model, group)
        moments = _moments(group, weight, model, batches, config)
        factors = fit(weight, moments, config.calibration)
        facts[group.title] = {
            "outputs": weight.shape[0], "inputs": weight.shape[1],
            "errors": [float(e) for e in factors.errors[:: config.rank_step]],
        }  # fmt: skip
        report(f"{number + 1} of {len(groups)} measured: {group.title}")
    plans = plan_groups(
        facts, step=config.rank_step, remove=config.remove, is_uniform=config.plan == "uniform"
    )
    for title, plan in plans.items():
        facts[title] |= plan
    blocks = list(dict.fromkeys(group.block for group in groups))
    for number, block in enumerate(blocks):
        of_block = [group for group in groups if group.block == block]
        _compress_block(model, plain, block, of_block, batches, config, facts, number)
        report(f"{number + 1} of {len(blocks)} compressed: {block}")
    return facts


def _compress_block(
    model: nn.Module,
    plain: nn.Module,
    block: str,
    groups: Sequence[Group],
    batches: Sequence[Tensor],
    config: CompressConfig,
    facts: dict[str, dict[str, Any]],
    number: int,
) -> None:
    fitted: list[tuple[Group, Tensor, Moments]] = []
    for group in groups:
        rank = facts[group.title]["rank"]
        if rank is None:
            continue
        weight = _stacked(plain, group)
        if config.compensate:
            parts = _split_moments(group, weight, plain, model, batches)
            left, right = compensate_at(weight, *parts, rank)
            moments = parts[0] + parts[1]
        else:
            moments = _moments(group, weight, model, batches, config)
            left, right = fit(weight, moments, config.calibration).at(rank)
        facts[group.title]["error_fitted"] = output_error(left @ right, weight, moments)
        _put(model, group, left, right, is_int8=False)
        fitted.append((group, weight, moments))
    if fitted and config.compensate and config.steps:
        before, after = _recover(model, plain, block, batches, config, number)
        for group, *_ in fitted:
            facts[group.title] |= {"layer_error_fitted": before, "layer_error_trained": after}
    for group, weight, moments in fitted:
        left, right = _taken(model, group)
        if config.form == "int8":
            rounded = dense(quantize_q8_0(right))
            left = refit_left(left @ right, rounded, drop_drift(moments))
            _put(model, group, left, right, is_int8=True)
        product = torch.matmul(*_taken(model, group))
        facts[group.title]["error_stored"] = output_error(product, weight, moments)


def _recover(
    model: nn.Module, plain: nn.Module, block: str, batches: Sequence[Tensor],
    config: CompressConfig, number: int,
) -> tuple[float, float]:  # fmt: skip
    module = model.get_submodule(block)
    names = [name for name, _ in module.named_parameters() if _is_factor(name)]
    own = dict(module.named_parameters())
    calls = [(inputs, named) for inputs, named, _ in calls_of(model, batches, block)]
    targets = [output for *_, output in calls_of(plain, batches, block)]

    def forward(batch: int, values: Sequence[Tensor]) -> Tensor:
        inputs, named = calls[batch]
        replaced = dict(zip(names, values, strict=True))
        return _first(torch.func.functional_call(module, replaced, inputs, named))

    trained, recovery = recover(
        [own[name] for name in names], forward, targets,
        num_held_out=max(1, min(_HELD_OUT_BATCHES, len(batches) // 4)), steps=config.steps,
        learning_rate=config.learning_rate, generator=step_generator(config.seed, number),
    )  # fmt: skip
    with torch.no_grad():
        for name, value in zip(names, trained, strict=True):
            own[name].copy_(value)
    return recovery.before, recovery.after


def _is_factor(name: str) -> bool:
    return name.endswith((".left.weight", ".right.weight"))


def _first(output: Any) -> Tensor:
    """Return the hidden states of what a block gives: itself, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]


def _moments(
    group: Group, weight: Tensor, model: nn.Module, batches: Sequence[Tensor],
    config: CompressConfig,
) -> Moments:  # fmt: skip
    name = group.names[0]
    if config.calibration == "representative":
        rows = torch.cat(list(inputs_of(model, batches, name)))
        return representative(group.title, weight, rows.flatten(1, -2))
    total = MomentSum(group.title, weight)
    for found in inputs_of(model, batches, name):
        for image in found:
            total.add(image.flatten(0, -2))
    return total.total()


def _split_moments(
    group: Group, weight: Tensor, plain: nn.Module, drifted: nn.Module, batches: Sequence[Tensor]
) -> tuple[Moments, Moments]:
    name, total = group.names[0], SplitMoments(group.title, weight)
    pairs = zip(inputs_of(plain, batches, name), inputs_of(drifted, batches, name), strict=True)
    for found, other in pairs:
        for image, seen in zip(found, other, strict=True):
            total.add(image.flatten(0, -2), seen.flatten(0, -2))
    return total.totals()


def _linear(model: nn.Module, name: str) -> nn.Linear | LowRankLinear:
    module = model.get_submodule(name)
    assert isinstance(module, (nn.Linear, LowRankLinear))
    return module


def _stacked(model: nn.Module, group: Group) -> Tensor:
    modules = [_linear(model, name) for name in group.names]
    return torch.cat([m.weight for m in modules if isinstance(m, nn.Linear)]).detach()


def _put(model: nn.Module, group: Group, left: Tensor, right: Tensor, *, is_int8: bool) -> None:
    rank, inputs = right.shape
    shared = SharedFactor(rank, inputs, is_int8=is_int8)
    shared.put(right.float())
    start = 0
    for name in group.names:
        old = _linear(model, name)
        outputs = old.out_features
        module = LowRankLinear(outputs, shared, rank, old.bias, is_int8=is_int8)
        module.left.put(left[start : start + outputs].float())
        set_module(model, name, module.eval())
        start += outputs


def _taken(model: nn.Module, group: Group) -> tuple[Tensor, Tensor]:
    """Return the factors of a group as they are now, in float64."""
    modules = [_linear(model, name) for name in group.names]
    factored = [module for module in modules if isinstance(module, LowRankLinear)]
    lefts = [module.left.matrix().detach() for module in factored]
    return torch.cat(lefts).double(), factored[0].right.matrix().detach().double()
