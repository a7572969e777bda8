"""Compress a decoder: spectra of all linears, a plan of ranks, then factors, layer by layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.format import Host
from adapters.mixed_rank.compress_config import CompressConfig
from adapters.mixed_rank.factors import compensate_at, fit
from adapters.mixed_rank.loss import mean_loss
from adapters.mixed_rank.moments import (
    Moments,
    MomentsError,
    MomentSum,
    SplitMoments,
    drop_drift,
    output_error,
    representative,
)
from adapters.mixed_rank.quantize import quantize_factors
from adapters.mixed_rank.ranks import plan_groups
from adapters.mixed_rank.recovery import recover
from adapters.mixed_rank.report import write_report
from adapters.mixed_rank.variant import (
    KINDS,
    MixedRankConfig,
    group_members,
    group_name,
    save_mixed_rank,
)
from adapters.mixed_rank.walk import Walk, layer_matrices, run_layer
from adapters.run_log import RunLog
from adapters.run_loop import Run, StepRecord
from adapters.training_state import TrainingError
from adapters.windows import Windows, step_generator
from models.checkpoints import Checkpoint
from models.program import LinearOp, Program, build_program
from models.pruning import count_fixed
from models.weights import LowRank, Matrix, QuantizedBlocks, Weight, dense

_HELD_OUT_TEXTS = 8  # of the calibration's own, at most a quarter, to stop a layer's training by


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressResult:
    """A variant that was made.

    Attributes:
        folder: of the variant.
        remove_linears, remove_total: shares of parameters that it removes, of the linears and of
            the whole model.
        loss, dense_loss: cross entropy on held-out text, in nats, of it and of the model as it was;
            None if no text was held out.
    """

    folder: Path
    remove_linears: float
    remove_total: float
    loss: float | None
    dense_loss: float | None


def compress(
    checkpoint: Checkpoint,
    token_ids: Tensor,
    output: Path,
    *,
    host: Host,
    config: CompressConfig | None = None,
    resume: bool = False,
    description: str = "",
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[[str], None] = lambda _: None,
) -> CompressResult:
    """Compress a model and write the variant as an adapter.

    At no time is more held than one layer's matrices and moments and the residual streams of all
    calibration texts. A run that is resumed computes the same bits as one that was not interrupted,
    with the same number of torch threads.

    Args:
        checkpoint: the weights to factor.
        token_ids: (n,) text to calibrate on; its end is held out.
        output: folder of the variant, metrics, report and checkpoints, new or empty, unless
            resuming.
        host: what the variant is for, as it is served.
        config: options; None: the defaults.
        resume: go on from the newest checkpoint in `output`, or start if there is none.
        description: one line about the variant, for people.
        should_stop: asked after each layer.
        report: told what happens, a line at a time.

    Raises:
        BudgetError: so much cannot be removed.
        TrainingError: the text is too short, an input is no number, or the run cannot be resumed or
            saved.
        TrainingInterrupted: `should_stop` said so; a checkpoint is saved.
        AdapterError: the variant cannot be written.
    """
    config = config or CompressConfig()
    windows = Windows(
        torch.as_tensor(token_ids), config.length, held_out=config.eval_sequences,
        spec=checkpoint.spec,
    )  # fmt: skip
    head = checkpoint.weights.get("head.weight", checkpoint.weights["embed.weight"])
    assert not isinstance(head, LowRank)
    program = build_program(checkpoint.spec, checkpoint.weights, head)
    run = Run(
        output,
        identity={
            **config.as_fields(), "data": windows.digest, "base_fingerprint": host.fingerprint,
            "weights": checkpoint.fingerprint, "chain": list(host.chain),
        },
        num_steps=2 * program.num_layers, checkpoint_every=config.checkpoint_every, report=report,
        state={"groups": {}, "plan": None},
    )  # fmt: skip
    tensors = run.prepare(resume)
    job = _CompressJob(run, checkpoint, program, windows, config)
    if tensors is not None:
        job.load_state_tensors(tensors)
    run.take_steps(job, should_stop)
    return job.finish(host, description)


class _CompressJob:
    """Two passes over the layers: what each would lose at every rank, then its factors."""

    rates = "learning_rate"

    def __init__(
        self, run: Run, checkpoint: Checkpoint, program: Program, windows: Windows,
        config: CompressConfig,
    ) -> None:  # fmt: skip
        self._run, self._checkpoint, self._program = run, checkpoint, program
        self._windows, self._config = windows, config
        drawn = windows.draw(config.sequences, step_generator(config.seed, 0))
        self._texts = list(drawn[:, :-1])
        self._streams: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None
        self._factors: dict[str, Tensor] = {}

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the factors so far, and the streams of both decoders."""
        tensors = {f"factors.{name}": tensor for name, tensor in self._factors.items()}
        if self._streams is not None:
            for name, streams in zip(("plain", "compressed"), self._streams, strict=True):
                tensors[f"streams.{name}"] = torch.stack(list(streams))
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state_tensors` returned."""
        self._factors = {
            name.removeprefix("factors."): tensor
            for name, tensor in tensors.items()
            if name.startswith("factors.")
        }
        if "streams.plain" in tensors:
            plain, compressed = (list(tensors[f"streams.{n}"]) for n in ("plain", "compressed"))
            # Until something is compressed the two are one.
            is_one = all(map(torch.equal, plain, compressed))
            self._streams = plain, plain if is_one else compressed

    def step(self, step: int) -> StepRecord:
        """Measure a layer, or factor it."""
        layer, is_second = (step - 1) % self._program.num_layers, step > self._program.num_layers
        if layer == 0:
            self._streams = None
        try:
            found = self._factor(layer, step) if is_second else self._measure(layer)
        except MomentsError as error:
            raise TrainingError(str(error)) from error
        groups = dict(self._run.progress.state["groups"])
        for name, facts in found.items():
            groups[name] = {**groups.get(name, {}), **facts}
        self._run.keep(groups=groups)
        if step == self._program.num_layers:
            self._plan()
        what = "factored" if is_second else "measured"
        num_tokens = len(self._texts) * self._config.length
        fields = {"layer": layer, "what": what, "groups": found}
        return StepRecord(fields=fields, status=f"layer {layer + 1} {what}", num_tokens=num_tokens)

    def end_step(self, step: int, elapsed_s: float, log: RunLog) -> bool:
        """Ask for a checkpoint between the passes."""
        return step == self._program.num_layers

    def _walk(self, *, has_drift: bool) -> Walk:
        return Walk(self._program, self._texts, has_drift=has_drift, streams=self._streams)

    def _measure(self, layer: int) -> dict[str, dict[str, Any]]:
        walk, found = self._walk(has_drift=False), {}
        for op in walk.linears(layer):
            weight = _stacked(op)
            moments = self._moments(op, weight, walk)
            factors = fit(weight, moments, self._config.calibration)
            found[group_name(op.names)] = {
                "outputs": weight.shape[0], "inputs": weight.shape[1],
                "errors": [round(float(e), 9) for e in factors.errors[:: self._config.rank_step]],
            }  # fmt: skip
        self._streams = walk.streams
        return found

    def _plan(self) -> None:
        groups, config = self._run.progress.state["groups"], self._config
        plan = plan_groups(
            groups, step=config.rank_step, remove=config.remove, is_uniform=config.plan == "uniform"
        )
        self._run.keep(plan=plan)

    def _factor(self, layer: int, step: int) -> dict[str, dict[str, Any]]:
        config, program = self._config, self._program
        plan = self._run.progress.state["plan"]
        walk = self._walk(has_drift=config.compensate)
        before = walk.streams[1]
        matrices = layer_matrices(program, layer)
        fitted: dict[str, tuple[LinearOp, Tensor, Moments, Tensor, Tensor]] = {}
        for op in walk.linears(layer):
            name = group_name(op.names)
            rank = plan[name]["rank"]
            if rank is None:
                continue
            weight = _stacked(op)
            if config.compensate:
                parts = self._split_moments(op, weight, walk)
                left, right = compensate_at(weight, *parts, rank)
                moments = parts[0] + parts[1]
            else:
                moments = self._moments(op, weight, walk)
                left, right = fit(weight, moments, config.calibration).at(rank)
            fitted[name] = op, weight, moments, left.float(), right.float()
            walk.replace(op, _pieces(op, left.float() @ right.float()))
        facts: dict[str, dict[str, Any]] = {
            name: {"error_fitted": output_error(left @ right, weight, moments)}
            for name, (_, weight, moments, left, right) in fitted.items()
        }
        trained = None
        if fitted and config.compensate and config.steps:
            trained = self._recover(layer, step, before, walk.streams[0], matrices, fitted, facts)
        for number, (name, (op, weight, moments, left, right)) in enumerate(fitted.items()):
            if trained is not None:
                left, right = trained[2 * number], trained[2 * number + 1]
                wanted, known = left @ right, drop_drift(moments)
            else:
                wanted, known = weight, moments
            rounded = quantize_factors(left, right, config.form, wanted, known)
            product = dense(rounded[0]) @ dense(rounded[1])
            facts[name]["error_stored"] = output_error(product, weight, moments)
            for piece, matrix in zip(op.pieces, _pieces(op, product), strict=True):
                matrices[id(piece.weight)] = matrix
            self._keep(op, *rounded)
        plain, compressed = walk.streams
        if config.compensate and (fitted or before is not plain):
            with torch.no_grad():
                compressed = [run_layer(program, layer, x, matrices) for x in before]
        self._streams = plain, compressed
        return facts

    def _recover(
        self,
        layer: int,
        step: int,
        before: Sequence[Tensor],
        targets: Sequence[Tensor],
        matrices: Mapping[int, Tensor],
        fitted: Mapping[str, tuple[LinearOp, Tensor, Moments, Tensor, Tensor]],
        facts: dict[str, dict[str, Any]],
    ) -> list[Tensor]:
        config = self._config
        parameters = [part for *_, left, right in fitted.values() for part in (left, right)]

        def forward(number: int, values: Sequence[Tensor]) -> Tensor:
            replaced = dict(matrices)
            for k, (op, *_) in enumerate(fitted.values()):
                product = values[2 * k] @ values[2 * k + 1]
                for piece, matrix in zip(op.pieces, _pieces(op, product), strict=True):
                    replaced[id(piece.weight)] = matrix
            return run_layer(self._program, layer, before[number], replaced)

        trained, recovery = recover(
            parameters, forward, targets,
            num_held_out=max(1, min(_HELD_OUT_TEXTS, len(targets) // 4)),
            steps=config.steps, learning_rate=config.learning_rate,
            generator=step_generator(config.seed, step),
        )  # fmt: skip
        for found in facts.values():
            found["layer_error_fitted"] = recovery.before
            found["layer_error_trained"] = recovery.after
        return trained

    def _moments(self, op: LinearOp, weight: Tensor, walk: Walk) -> Moments:
        name = group_name(op.names)
        if self._config.calibration == "representative":
            rows = torch.stack([plain for plain, _ in walk.inputs(op)])
            return representative(name, weight, rows)
        total = MomentSum(name, weight)
        for plain, drifted in walk.inputs(op):
            total.add(plain, drifted)
        return total.total()

    def _split_moments(self, op: LinearOp, weight: Tensor, walk: Walk) -> tuple[Moments, Moments]:
        total = SplitMoments(group_name(op.names), weight)
        for plain, drifted in walk.inputs(op):
            total.add(plain, drifted)
        return total.totals()

    def _keep(self, op: LinearOp, left: Matrix, right: Matrix) -> None:
        for name, part in zip(op.names, _split(op, left), strict=True):
            self._factors[f"{name}.left"] = part
        self._factors[f"{op.names[0]}.right"] = _data(right)

    def finish(self, host: Host, description: str) -> CompressResult:
        """Write the variant, and what is told of it."""
        config, checkpoint, state = self._config, self._checkpoint, self._run.progress.state
        groups: dict[str, dict[str, Any]] = {
            name: {**facts, **state["plan"][name]} for name, facts in state["groups"].items()
        }
        factors = {
            name: self._stored_factors(name, self._factors)
            for name, facts in groups.items()
            if facts["rank"] is not None
        }
        whole = sum(facts["outputs"] * facts["inputs"] for facts in groups.values())
        removed = sum(
            facts["outputs"] * facts["inputs"]
            - facts["rank"] * (facts["outputs"] + facts["inputs"])
            for facts in groups.values()
            if facts["rank"] is not None
        )
        about = MixedRankConfig(
            ranks={name: facts["rank"] for name, facts in groups.items()},
            form=config.form, plan=config.plan, calibration=config.calibration,
            is_compensated=config.compensate, remove_linears=removed / whole,
            remove_total=removed / (whole + count_fixed(checkpoint.spec)),
        )  # fmt: skip
        loss, dense_loss = self._held_out_losses(factors)
        result = CompressResult(
            folder=self._run.output, remove_linears=about.remove_linears,
            remove_total=about.remove_total, loss=loss, dense_loss=dense_loss,
        )  # fmt: skip
        told = {
            "remove_linears": about.remove_linears, "remove_total": about.remove_total,
            "loss": loss, "dense_loss": dense_loss,
            "error_planned": sum(facts["error"] for facts in state["plan"].values()),
            "options": config.as_fields(),
        }  # fmt: skip
        save_mixed_rank(
            self._run.output, factors, about, host=host, description=description, training=told
        )
        write_report(self._run.output, {**told, "model": host.model_id, "groups": groups})
        self._run.close()
        return result

    def _stored_factors(
        self, name: str, tensors: Mapping[str, Tensor]
    ) -> tuple[list[Matrix], Matrix]:
        left_kind, right_kind = KINDS[self._config.form]
        members = group_members(name)

        def read(part: str, kind: str | None) -> Matrix:
            tensor = tensors[part]
            return tensor if kind is None else QuantizedBlocks(data=tensor, kind=kind)

        lefts = [read(f"{member}.left", left_kind) for member in members]
        return lefts, read(f"{members[0]}.right", right_kind)

    @torch.no_grad()
    def _held_out_losses(
        self, factors: Mapping[str, tuple[Sequence[Matrix], Matrix]]
    ) -> tuple[float | None, float | None]:
        """Return the losses of the compressed model and of the one it was."""
        windows, checkpoint = self._windows.held_out, self._checkpoint
        if not len(windows):
            return None, None
        weights: dict[str, Weight] = dict(checkpoint.weights)
        for name, (lefts, right) in factors.items():
            for member, left in zip(group_members(name), lefts, strict=True):
                weights[f"{member}.weight"] = LowRank(left=left, right=right)
        head = self._program.head.pieces[0].weight
        compressed = build_program(checkpoint.spec, weights, head)
        return mean_loss(compressed, windows), mean_loss(self._program, windows)


def _stacked(op: LinearOp) -> Tensor:
    return torch.cat([dense(piece.weight) for piece in op.pieces])


def _pieces(op: LinearOp, matrix: Tensor) -> Sequence[Tensor]:
    """Cut a matrix of all outputs into those of the linear's pieces."""
    return matrix.split([piece.weight.shape[0] for piece in op.pieces])


def _data(matrix: Matrix) -> Tensor:
    return matrix.data if isinstance(matrix, QuantizedBlocks) else dense(matrix).half()


def _split(op: LinearOp, left: Matrix) -> Sequence[Tensor]:
    return _data(left).split([piece.weight.shape[0] for piece in op.pieces])
