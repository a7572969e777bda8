"""Compress Vision Transformers in the layout of `transformers`, as any module of blocks.

The same stages as for decoders, fed by hooks of `nn.Module`. A block is run on what the blocks
before it made, which is kept: every block is computed a few times, whatever their number.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from adapters.mixed_rank.blocks import BlockStream, Watch, hidden_states
from adapters.mixed_rank.compress_config import CompressConfig
from adapters.mixed_rank.layers import (
    CompressJob,
    Inputs,
    Linear,
    Measured,
    Measurement,
    Pair,
    planned_error,
    stream_name,
)
from adapters.mixed_rank.loss import LABELS, differentiate_samples
from adapters.mixed_rank.modules import LowRankLinear, factor_linears, put_factors
from adapters.mixed_rank.moments import GradientSum
from adapters.mixed_rank.report import write_report
from adapters.mixed_rank.vision_folder import (
    Factored,
    VisionConfig,
    VisionError,
    VisionModel,
    save_vision,
)
from adapters.run_loop import Run
from adapters.windows import step_generator
from models.weights import Matrix

BATCH = 16
"""Images that go through a block together."""
_MEASURED_BYTES = 2**30
"""Of moments that are summed at once: of as many blocks as that takes in one pass."""


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


def _add_rows(found: Measurement, group: Group, seen: Watch, *, is_whole: bool) -> None:
    """Add what a group's linears read of a batch, as a whole or image by image."""
    rows = seen.rows[group.names[0]]
    for part in (rows,) if is_whole else rows:
        found.add_rows(group.title, part.flatten(0, -2))


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
        self._original = copy.deepcopy(self._model).requires_grad_(False)
        self._found: dict[int, dict[str, Measured]] = {}
        self.begin()

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state_tensors` returned; the blocks that are done are computed anew."""
        super().load_state_tensors(tensors)
        for title in self.factors:
            self._put_final(title)

    def begin(self) -> None:
        """Go to the first block."""
        self._plain = BlockStream(self._original, self._batches, self._blocks)
        self._compressed = (
            BlockStream(self._model, self._batches, self._blocks)
            if self.config.compensate
            else None
        )
        self._targets: list[Tensor] = []

    def measured(self, layer: int) -> dict[str, Measured]:
        """Run the model as it was forth and back, for this block and as many before it as fit."""
        if layer not in self._found:
            first, rest = layer, _MEASURED_BYTES - self._moment_bytes(layer)
            while first and (rest := rest - self._moment_bytes(first - 1)) >= 0:
                first -= 1
            self._found = self._measure_blocks(range(first, layer + 1))
        return self._found.pop(layer)

    def _moment_bytes(self, layer: int) -> int:
        shapes = [self._matrix(group)[1].shape for group in self._groups[self._blocks[layer]]]
        # Sums in float32 and float64, of inputs and of gradients.
        return sum(12 * (n * n + min(m, n) ** 2) for m, n in shapes)

    def _measure_blocks(self, layers: range) -> dict[int, dict[str, Measured]]:
        config, has_metric = self.config, self.config.metric == "loss"
        groups = {i: self._groups[self._blocks[i]] for i in layers}
        found = {
            i: Measurement({g.title: self._matrix(g) for g in groups[i]}, config) for i in layers
        }
        made: dict[int, GradientSum] = {}
        generator = step_generator(config.seed, LABELS)
        names = [name for i in layers for g in groups[i] for name in g.names]
        for batch in self._batches:
            with Watch(self._original, names, [self._blocks[i] for i in layers]) as seen:
                with torch.set_grad_enabled(has_metric):
                    logits = self._original(batch.clone().requires_grad_(has_metric)).logits
                for i in layers:
                    for group in groups[i]:
                        _add_rows(found[i], group, seen, is_whole=has_metric)
                if has_metric:
                    differentiate_samples(logits, generator)
            for i in layers if has_metric else ():
                for group in groups[i]:
                    parts = [seen.gradients[name].flatten(0, -2) for name in group.names]
                    found[i].add_gradients(group.title, torch.cat(parts, dim=1))
                gradients = seen.gradients[self._blocks[i]].flatten(0, -2)
                if i not in made:
                    made[i] = GradientSum(stream_name(i), torch.eye(gradients.shape[1]))
                made[i].add(gradients)
        count = sum(map(len, self._batches))
        self.metrics |= {stream_name(i): made[i].total(count) for i in made}
        return {i: found[i].total(count) for i in layers}

    def factored(self, layer: int) -> Iterator[Linear]:
        """Run a block of both."""
        self._plain.enter(layer)
        if self._compressed is not None:
            self._compressed.enter(layer)
        other = self._compressed if self.config.fits_drift else None
        for group in self._groups[self._blocks[layer]]:
            yield self._linear(group, partial(self._inputs, layer, group, other))
        self._targets = self._plain.leave(layer)

    def _matrix(self, group: Group) -> tuple[str, Tensor]:
        """Return its kind, and the matrices of its linears as one."""
        modules = [self._original.get_submodule(name) for name in group.names]
        weights = [m.weight for m in modules if isinstance(m, nn.Linear)]
        assert len(weights) == len(modules)
        return group.kind, torch.cat(weights).detach().float()

    def _linear(self, group: Group, inputs: Callable[[], Inputs]) -> Linear:
        return Linear(
            group.title, *self._matrix(group), inputs,
            lambda pair: self._put(group, *pair, is_int8=False),
        )  # fmt: skip

    def _put(self, group: Group, left: Matrix, right: Matrix, *, is_int8: bool) -> None:
        linears = factor_linears(self._model, group.names, right.shape[0], is_int8=is_int8)
        put_factors(linears, left, right)

    def _put_final(self, title: str) -> None:
        is_int8 = self.config.form == "int8"
        self._put(self._titles[title], *self.factors[title], is_int8=is_int8)

    def _inputs(
        self, layer: int, group: Group, compressed: "BlockStream | None"
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
        return hidden_states(torch.func.functional_call(module, values, inputs, named))

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
            "error_planned": planned_error(groups),
            "options": config.as_fields(),
        }  # fmt: skip
        write_report(output, {**told, "model": model.name, "groups": groups})
        self.run.close()
        return result
