"""Compress Vision Transformers in the layout of `transformers`, as any module of blocks.

The same stages as for decoders, fed by hooks of `nn.Module`. A block is run on what the blocks
before it made, which is kept: every block is computed a few times, whatever their number.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters.mixed_rank.compress_config import CompressConfig
from adapters.mixed_rank.layers import CompressJob, Inputs, Linear, Pair
from adapters.mixed_rank.modules import LowRankLinear, factor_linears, put_factors
from adapters.mixed_rank.report import write_report
from adapters.mixed_rank.vision_folder import (
    Factored,
    VisionConfig,
    VisionError,
    VisionModel,
    save_vision,
)
from adapters.run_loop import Run
from models.weights import Matrix

BATCH = 16
"""Images that go through a block together."""


class _Stop(Exception):
    """Ends a forward pass: what was to be seen has been seen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionResult:
    """A compressed model that was made.

    Attributes:
        folder: of it.
        remove_linears, remove_total: shares of parameters that it removes, of the linears in its
            blocks and of the whole model.
    """

    folder: Path
    remove_linears: float
    remove_total: float


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
    def kind(self) -> str:
        """A name for all of them within the block."""
        return "+".join(name.removeprefix(f"{self.block}.") for name in self.names)

    @property
    def title(self) -> str:
        """A name for all of them."""
        return f"{self.block}.{self.kind}"


def compress_vision(
    model: VisionModel,
    pixels: Tensor,
    output: Path,
    *,
    data: str,
    config: CompressConfig,
    resume: bool = False,
    description: str = "",
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[[str], None] = lambda _: None,
) -> VisionResult:
    """Compress an image classifier and write it as a folder.

    Args:
        model: as loaded; it is changed.
        pixels: (N, C, H, W) images to calibrate on; each is an observation.
        output: folder of the compressed model, metrics, report and checkpoints, new or empty,
            unless resuming.
        data: what tells these images from others.
        config: options; `length` and `eval_sequences` play no part.
        resume: go on from the newest checkpoint in `output`, or start if there is none.
        description: one line about the model, for people.
        should_stop: asked after each block.
        report: told what happens, a line at a time.

    Raises:
        ValueError: the form is not one for modules.
        BudgetError: so much cannot be removed.
        TrainingError: an input is no number, or the run cannot be resumed or saved.
        TrainingInterrupted: `should_stop` said so; a checkpoint is saved.
        VisionError: the model is compressed already, or the folder cannot be written.
    """
    if model.compressed is not None:
        raise VisionError(f"{model.folder}: is compressed already")
    if config.form == "int4":
        raise ValueError("form must be float16 or int8 for a model of modules, got int4")
    blocks = find_blocks(model.module)
    run = Run(
        output,
        identity={**config.as_fields(), "data": data, "model": model.digest()},
        num_steps=2 * len(blocks), checkpoint_every=config.checkpoint_every, report=report,
        state={"groups": {}, "plan": None},
    )  # fmt: skip
    tensors = run.prepare(resume)
    job = _VisionJob(run, model, blocks, pixels, config)
    if tensors is not None:
        job.load_state_tensors(tensors)
    run.take_steps(job, should_stop)
    return job.finish(model, description)


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


_Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Stream:
    """A model, block by block: what each is called with, for every batch.

    Blocks that are done are not computed again: they hand out what they made, and what lies between
    two blocks is computed from that.

    Args:
        model: in evaluation mode.
        batches: (B, C, H, W) pixels.
        blocks: names of its blocks, in order of their use.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Tensor], blocks: Sequence[str]) -> None:
        self.model, self._batches, self._blocks = model, batches, blocks
        self._made: list[Any] = []
        self.calls: list[_Call] = []

    @torch.no_grad()
    def enter(self, block: int) -> None:
        """Find out what a block is called with; those before it are done or are computed."""
        self.calls = []
        for number, batch in enumerate(self._batches):
            made = self._made[number] if self._made else None
            with suppress(_Stop), self._patched(block, made):
                self.model(batch)

    def run(self, block: int, number: int) -> Any:
        """Return what it makes of a batch."""
        inputs, named = self.calls[number]
        return self.module(block)(*inputs, **named)

    @torch.no_grad()
    def leave(self, block: int) -> list[Tensor]:
        """Compute it for all batches; return the hidden states."""
        self._made = [self.run(block, number) for number in range(len(self._batches))]
        return [_first(made) for made in self._made]

    @torch.no_grad()
    def inputs(self, block: int, name: str) -> Iterator[Tensor]:
        """Yield what a linear of it reads of each batch; nothing is computed beyond."""
        found: list[Tensor] = []

        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs[0])
            raise _Stop

        hook = self.model.get_submodule(name).register_forward_pre_hook(note)
        try:
            for number in range(len(self._batches)):
                with suppress(_Stop):
                    self.run(block, number)
                yield found.pop()
        finally:
            hook.remove()

    def module(self, block: int) -> nn.Module:
        """Return a block."""
        return self.model.get_submodule(self._blocks[block])

    def _patched(self, block: int, made: Any) -> "_Patched":
        return _Patched([self.module(i) for i in range(block + 1)], made, self.calls)


class _Patched:
    """Blocks that hand out what is known, and a last one that notes what it is called with."""

    def __init__(self, modules: Sequence[nn.Module], made: Any, calls: list[_Call]) -> None:
        self._modules, self._made, self._calls = modules, made, calls
        self._hook: Any = None

    def __enter__(self) -> None:
        def note(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._calls.append((inputs, named))
            raise _Stop

        *done, last = self._modules
        self._hook = last.register_forward_pre_hook(note, with_kwargs=True)
        if self._made is not None and done:
            # Of the blocks before the last one only the shape of what they make counts.
            for module in done[:-1]:
                module.forward = self._pass_on
            done[-1].forward = lambda *_, **__: self._made

    def _pass_on(self, x: Tensor, *_: Any, **__: Any) -> Any:
        return x if isinstance(self._made, Tensor) else (x, *self._made[1:])

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        for module in self._modules[:-1]:
            module.__dict__.pop("forward", None)


def _first(output: Any) -> Tensor:
    """Return the hidden states of what a block gives: itself, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]


class _VisionJob(CompressJob):
    """The blocks of a model over batches of images."""

    def __init__(
        self, run: Run, model: VisionModel, blocks: Sequence[str], pixels: Tensor,
        config: CompressConfig,
    ) -> None:  # fmt: skip
        super().__init__(run, config, len(blocks), len(pixels))
        self._batches = pixels.split(BATCH)
        self._blocks, self._model = blocks, model.module
        self._groups: dict[str, list[Group]] = {block: [] for block in blocks}
        for group in find_groups(self._model, pixels[:1]):
            self._groups[group.block].append(group)
        self._titles = {g.title: g for groups in self._groups.values() for g in groups}
        self._original = copy.deepcopy(self._model)
        self.begin()

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state_tensors` returned; the blocks that are done are computed anew."""
        super().load_state_tensors(tensors)
        for title in self.factors:
            self._put_final(title)

    def begin(self) -> None:
        """Go back to the first block."""
        self._plain = _Stream(self._original, self._batches, self._blocks)
        self._compressed = (
            _Stream(self._model, self._batches, self._blocks) if self.config.compensate else None
        )
        self._targets: list[Tensor] = []

    def measured(self, layer: int) -> Iterator[Linear]:
        """Run a block of the model as it was."""
        self._plain.enter(layer)
        for group in self._groups[self._blocks[layer]]:
            yield self._linear(group, partial(self._inputs, layer, group, None))
        self._plain.leave(layer)

    def factored(self, layer: int) -> Iterator[Linear]:
        """Run a block of both."""
        self._plain.enter(layer)
        if self._compressed is not None:
            self._compressed.enter(layer)
        for group in self._groups[self._blocks[layer]]:
            yield self._linear(group, partial(self._inputs, layer, group, self._compressed))
        self._targets = self._plain.leave(layer)

    def _linear(self, group: Group, inputs: Callable[[], Inputs]) -> Linear:
        modules = [self._original.get_submodule(name) for name in group.names]
        weights = [m.weight for m in modules if isinstance(m, nn.Linear)]
        assert len(weights) == len(modules)

        return Linear(
            group.title, group.kind, torch.cat(weights).detach().float(), inputs,
            lambda pair: self._put(group, *pair, is_int8=False),
        )  # fmt: skip

    def _put(self, group: Group, left: Matrix, right: Matrix, *, is_int8: bool) -> None:
        linears = factor_linears(self._model, group.names, right.shape[0], is_int8=is_int8)
        put_factors(linears, left, right)

    def _put_final(self, title: str) -> None:
        is_int8 = self.config.form == "int8"
        self._put(self._titles[title], *self.factors[title], is_int8=is_int8)

    def _inputs(
        self, layer: int, group: Group, compressed: "_Stream | None"
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        name = group.names[0]
        others = None if compressed is None else compressed.inputs(layer, name)
        for batch in self._plain.inputs(layer, name):
            drifted = None if others is None else next(others)
            for number, image in enumerate(batch):
                other = None if drifted is None else drifted[number].flatten(0, -2)
                yield image.flatten(0, -2), other

    def targets(self, layer: int) -> Sequence[Tensor]:
        """Return the hidden states after it, of each batch."""
        return self._targets

    def forward(self, layer: int, number: int, pairs: Mapping[str, Pair]) -> Tensor:
        """Return the hidden states of a batch."""
        block, values = self._blocks[layer], {}
        for title, (left, right) in pairs.items():
            names = [name.removeprefix(f"{block}.") for name in self._titles[title].names]
            sizes = [self._low_rank(name).out_features for name in self._titles[title].names]
            values[f"{names[0]}.right.weight"] = right
            for name, part in zip(names, left.split(sizes), strict=True):
                values[f"{name}.left.weight"] = part
        assert self._compressed is not None
        inputs, named = self._compressed.calls[number]
        module = self._compressed.module(layer)
        return _first(torch.func.functional_call(module, values, inputs, named))

    def end_layer(self, layer: int, pairs: Mapping[str, Pair]) -> None:
        """Put the final factors into the model, and go on."""
        for title in pairs:
            self._put_final(title)
        if self._compressed is not None:
            self._compressed.leave(layer)

    def _low_rank(self, name: str) -> LowRankLinear:
        module = self._model.get_submodule(name)
        assert isinstance(module, LowRankLinear)
        return module

    def finish(self, model: VisionModel, description: str) -> VisionResult:
        """Write the model, and what is told of it."""
        config, output = self.config, self.run.output
        groups, removed, whole = self.finished_groups()
        rest = sum(p.numel() for p in self._original.parameters()) - whole
        result = VisionResult(
            folder=output, remove_linears=removed / whole, remove_total=removed / (whole + rest)
        )
        about = VisionConfig(
            form=config.form, factored=[
                Factored(linears=self._titles[title].names, rank=facts["rank"])
                for title, facts in groups.items() if facts["rank"] is not None
            ],
            remove_linears=result.remove_linears, remove_total=result.remove_total,
            description=description, training={"options": config.as_fields()},
        )  # fmt: skip
        save_vision(output, model, about)
        told = {
            "remove_linears": result.remove_linears, "remove_total": result.remove_total,
            "error_planned": sum(facts["error"] for facts in groups.values()),
            "options": config.as_fields(),
        }  # fmt: skip
        write_report(output, {**told, "model": model.name, "groups": groups})
        self.run.close()
        return result
