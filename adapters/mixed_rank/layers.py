"""What compressing a decoder and a model of modules have in common: two passes over layers.

The method knows named matrices, what they read and the gradients of what they make, layer by layer.
First every matrix is measured, from the last layer to the first, as gradients come: what would be
lost at each rank. Then ranks are planned for all, and the layers are factored in order, each to
make up for what those before it have lost.
"""

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapters.mixed_rank.compress_config import GROUP, CompressConfig
from adapters.mixed_rank.factors import compensate_at, fit
from adapters.mixed_rank.moments import (
    GradientSum,
    Moments,
    MomentsError,
    MomentSum,
    RepresentativeSum,
    SplitMoments,
    aimed_at,
    output_error,
)
from adapters.mixed_rank.quantize import KINDS, quantize_factors
from adapters.mixed_rank.ranks import plan_groups
from adapters.mixed_rank.recovery import recover
from adapters.run_log import RunLog
from adapters.run_loop import Run, StepRecord
from adapters.training_state import TrainingError
from adapters.windows import step_generator
from models.weights import Matrix, QuantizedBlocks, dense

Pair = tuple[Tensor, Tensor]
"""(m, R) left and (R, n) right factor, float32."""
Inputs = Iterable[tuple[Tensor, Tensor | None]]
"""(T, n) rows of each observation, and what is read in the compressed model if that is known."""
_HELD_OUT = 4  # observations, at most a quarter, that a layer's training is stopped by


@dataclass(frozen=True, slots=True)
class Linear:
    """Linears of one layer that read the same, as one matrix.

    Attributes:
        name: of them, such as "layers.3.q+k+v".
        kind: what of it does not tell the layer: "q+k+v".
        weight: (m, n) float32, their outputs one below the other.
        inputs: asked for once.
        put: gives the compressed model factors in its place.
    """

    name: str
    kind: str
    weight: Tensor
    inputs: Callable[[], Inputs]
    put: Callable[[Pair], None]


@dataclass(frozen=True, slots=True)
class Measured:
    """What the first pass has found of a matrix.

    Attributes:
        kind, weight: as of `Linear`.
        moments: of its inputs.
        metric: what its outputs' errors weigh in the loss; None: nobody asked.
    """

    kind: str
    weight: Tensor
    moments: Moments
    metric: Tensor | None


class Measurement:
    """Adds up what the first pass sees of some matrices.

    Args:
        matrices: kind and weight, by name.
        config: options.
    """

    def __init__(self, matrices: Mapping[str, tuple[str, Tensor]], config: CompressConfig) -> None:
        self._matrices = matrices
        self._inputs = {
            name: make_sum(name, weight, config) for name, (_, weight) in matrices.items()
        }
        self._outputs = (
            {name: GradientSum(name, weight) for name, (_, weight) in matrices.items()}
            if config.metric == "loss"
            else {}
        )

    def add_rows(self, name: str, rows: Tensor) -> None:
        """Add the (T, n) rows of an observation that a matrix reads.

        Raises:
            MomentsError: a value is no finite number.
        """
        self._inputs[name].add(rows)

    def add_gradients(self, name: str, gradients: Tensor) -> None:
        """Add the (T, m) gradients of an observation's loss in what a matrix makes."""
        self._outputs[name].add(gradients)

    def total(self, num_targets: int) -> dict[str, Measured]:
        """Return what was found.

        Args:
            num_targets: losses of all observations.

        Raises:
            MomentsError: there was no observation.
        """
        return {
            name: Measured(
                kind, weight, self._inputs[name].total(),
                self._outputs[name].total(num_targets) if self._outputs else None,
            )
            for name, (kind, weight) in self._matrices.items()
        }  # fmt: skip


class CompressJob(ABC):
    """Two passes over the layers: what each would lose at every rank, then its factors.

    Args:
        run: that takes the steps.
        config: options.
        num_layers: of the model.
        num_tokens: that a layer reads in all.

    Attributes:
        factors: those that are final, by the name of what they stand for.
        metrics: those of the matrices, and of what each layer makes by `stream_name`.
    """

    rates = ""

    def __init__(self, run: Run, config: CompressConfig, num_layers: int, num_tokens: int) -> None:
        self.run, self.config = run, config
        self._num_layers, self._num_tokens = num_layers, num_tokens
        self.factors: dict[str, tuple[Matrix, Matrix]] = {}
        self.metrics: dict[str, Tensor] = {}

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        """What is known of each matrix so far, by its name."""
        groups: dict[str, dict[str, Any]] = self.run.progress.state["groups"]
        return groups

    @abstractmethod
    def measured(self, layer: int) -> dict[str, Measured]:
        """Return what is found of a layer's matrices; layers are asked for last to first.

        With metrics it sets that of `stream_name`, too.
        """

    @abstractmethod
    def begin(self) -> None:
        """Go to the first layer of the second pass."""

    @abstractmethod
    def factored(self, layer: int) -> Iterator[Linear]:
        """Yield the linears of the next layer of the second pass, in the order of their use."""

    @abstractmethod
    def targets(self, layer: int) -> Sequence[Tensor]:
        """Return what the layer that was walked makes of each observation in the model as it was.

        The training's observations; each may be several of the moments'.
        """

    @abstractmethod
    def forward(self, layer: int, number: int, pairs: Mapping[str, Pair]) -> Tensor:
        """Return what it makes of an observation in the compressed model with given factors."""

    @abstractmethod
    def end_layer(self, layer: int, pairs: Mapping[str, Pair]) -> None:
        """Go on to the next layer, now that the factors of this one are final."""

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the factors so far, and the metrics."""
        factors = {
            f"factors.{name}.{part}": _stored(matrix)
            for name, pair in self.factors.items()
            for part, matrix in zip(("left", "right"), pair, strict=True)
        }
        return factors | {f"metric.{name}": metric for name, metric in self.metrics.items()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state_tensors` returned."""
        left_kind, right_kind = KINDS[self.config.form]
        for name in self.groups:
            if (left := tensors.get(f"factors.{name}.left")) is not None:
                right = tensors[f"factors.{name}.right"]
                self.factors[name] = _read(left, left_kind), _read(right, right_kind)
        self.metrics = {
            name.removeprefix("metric."): tensor
            for name, tensor in tensors.items()
            if name.startswith("metric.")
        }

    def step(self, step: int) -> StepRecord:
        """Measure a layer, or factor it."""
        return_freed_memory()
        is_second = step > self._num_layers
        layer = step - self._num_layers - 1 if is_second else self._num_layers - step
        if is_second and layer == 0:
            self.begin()
        try:
            found = self._factor(layer, step) if is_second else self._measure(layer)
        except MomentsError as error:
            raise TrainingError(str(error)) from error
        groups = dict(self.groups)
        for name, facts in found.items():
            groups[name] = {**groups.get(name, {}), **facts}
        self.run.keep(groups=groups)
        if step == self._num_layers:
            self._plan()
        what = "factored" if is_second else "measured"
        return StepRecord(
            fields={"layer": layer, "what": what, "groups": found},
            status=f"layer {layer + 1} {what}", num_tokens=self._num_tokens,
        )  # fmt: skip

    def end_step(self, step: int, elapsed_s: float, log: RunLog) -> bool:
        """Ask for a checkpoint between the passes."""
        return step == self._num_layers

    def finished_groups(self) -> tuple[dict[str, dict[str, Any]], int, int]:
        """Return what is known of each matrix, the plan included, and parameters removed and all.

        Those of the linears, of which each is counted once.
        """
        plan = self.run.progress.state["plan"]
        groups = {name: {**facts, **plan[name]} for name, facts in self.groups.items()}
        whole = sum(facts["outputs"] * facts["inputs"] for facts in groups.values())
        removed = sum(
            facts["outputs"] * facts["inputs"]
            - facts["rank"] * (facts["outputs"] + facts["inputs"])
            for facts in groups.values()
            if facts["rank"] is not None
        )
        return groups, removed, whole

    def _measure(self, layer: int) -> dict[str, dict[str, Any]]:
        config, found = self.config, {}
        for name, seen in self.measured(layer).items():
            outputs, inputs = seen.weight.shape
            if config.form != "float16" and inputs % GROUP:
                raise TrainingError(
                    f"{name}: its {inputs} inputs are no multiple of {GROUP}, as {config.form} "
                    "factors need; float16 ones can be had"
                )
            factors = fit(seen.weight, seen.moments, config.calibration, seen.metric)
            cost = 1.0
            if seen.metric is not None:
                self.metrics[name] = seen.metric
                cost = factors.energy / seen.moments.num_rows
            found[name] = {
                "layer": layer, "kind": seen.kind, "outputs": outputs, "inputs": inputs,
                "weight": cost,
                "errors": [round(float(e), 9) for e in factors.errors[:: config.rank_step]],
            }  # fmt: skip
        return found

    def _plan(self) -> None:
        config = self.config
        groups = dict(sorted(self.groups.items(), key=lambda item: item[1]["layer"]))
        plan = plan_groups(
            groups, step=config.rank_step, remove=config.remove,
            is_uniform=config.plan == "uniform",
        )  # fmt: skip
        self.run.keep(groups=groups, plan=plan)

    def _factor(self, layer: int, step: int) -> dict[str, dict[str, Any]]:
        config, plan = self.config, self.run.progress.state["plan"]
        fitted: dict[str, Pair] = {}
        moments: dict[str, Moments] = {}
        for linear in self.factored(layer):
            name = linear.name
            rank = plan[name]["rank"]
            if rank is None:
                continue
            if config.fits_drift:
                parts = _split_moments(linear)
                left, right = compensate_at(linear.weight, *parts, rank)
                moments[name] = parts[0] + parts[1]
            else:
                moments[name] = _moments(linear, config)
                metric = self.metrics.get(name)
                factors = fit(linear.weight, moments[name], config.calibration, metric)
                left, right = factors.at(rank)
            fitted[name] = left.float(), right.float()
            linear.put(fitted[name])
        facts: dict[str, dict[str, Any]] = {
            name: {"error_fitted": output_error(left @ right, moments[name])}
            for name, (left, right) in fitted.items()
        }
        trained = None
        if fitted and config.compensate and config.steps:
            trained = self._recover(layer, step, fitted, facts)
        final: dict[str, Pair] = {}
        for name, pair in fitted.items():
            left, right = pair if trained is None else trained[name]
            wanted = moments[name] if trained is None else aimed_at(left @ right, moments[name])
            self.factors[name] = quantize_factors(left, right, config.form, wanted)
            left, right = (dense(matrix) for matrix in self.factors[name])
            facts[name]["error_stored"] = output_error(left @ right, moments[name])
            final[name] = left, right
        with torch.no_grad():
            self.end_layer(layer, final)
        return facts

    def _recover(
        self, layer: int, step: int, fitted: Mapping[str, Pair], facts: dict[str, dict[str, Any]]
    ) -> dict[str, Pair]:
        config, targets = self.config, self.targets(layer)

        def paired(values: Sequence[Tensor]) -> dict[str, Pair]:
            return dict(zip(fitted, zip(values[::2], values[1::2], strict=True), strict=True))

        trained, recovery = recover(
            [part for pair in fitted.values() for part in pair],
            lambda number, values: self.forward(layer, number, paired(values)), targets,
            num_held_out=max(1, min(_HELD_OUT, len(targets) // 4)),
            steps=config.steps, learning_rate=config.learning_rate,
            generator=step_generator(config.seed, step),
            metric=self.metrics.get(stream_name(layer)),
        )  # fmt: skip
        for found in facts.values():
            found["layer_error_fitted"] = recovery.before
            found["layer_error_trained"] = recovery.after
        return paired(trained)


def return_freed_memory() -> None:
    """Give what was freed back to the system: GNU's C library keeps it for the next of its size.

    A layer frees as much as the streams of all observations, in pieces.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def planned_error(groups: Mapping[str, Mapping[str, Any]]) -> float:
    """Return what the plan minimised: the summed errors, by weight."""
    return float(sum(facts["error"] * facts["weight"] for facts in groups.values()))


def stream_name(layer: int) -> str:
    """Return the name of what a layer makes."""
    return f"streams.{layer}"


def make_sum(name: str, weight: Tensor, config: CompressConfig) -> MomentSum | RepresentativeSum:
    """Return what adds up the moments of a matrix's inputs as the options have it."""
    if config.calibration == "representative":
        return RepresentativeSum(name, weight)
    return MomentSum(name, weight, is_normalised=config.metric == "outputs")


def _moments(linear: Linear, config: CompressConfig) -> Moments:
    total = make_sum(linear.name, linear.weight, config)
    for plain, drifted in linear.inputs():
        total.add(plain, drifted)
    return total.total()


def _split_moments(linear: Linear) -> tuple[Moments, Moments]:
    total = SplitMoments(linear.name, linear.weight)
    for plain, drifted in linear.inputs():
        total.add(plain, drifted)
    return total.totals()


def _stored(matrix: Matrix) -> Tensor:
    return matrix.data if isinstance(matrix, QuantizedBlocks) else dense(matrix).half()


def _read(tensor: Tensor, kind: str | None) -> Matrix:
    return tensor if kind is None else QuantizedBlocks(data=tensor, kind=kind)
