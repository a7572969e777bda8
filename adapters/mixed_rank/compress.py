"""Compress a decoder: spectra of all linears, a plan of ranks, then factors, layer by layer."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from adapters.format import Host
from adapters.mixed_rank.compress_config import CompressConfig
from adapters.mixed_rank.layers import (
    CompressJob,
    Linear,
    Measured,
    Measurement,
    Pair,
    planned_error,
    return_freed_memory,
    stream_name,
)
from adapters.mixed_rank.loss import LABELS, mean_loss, sampled_gradients
from adapters.mixed_rank.moments import GradientSum, MomentsError
from adapters.mixed_rank.report import write_report
from adapters.mixed_rank.variant import (
    MixedRankConfig,
    group_members,
    group_name,
    save_mixed_rank,
)
from adapters.mixed_rank.walk import (
    Product,
    Walk,
    Watch,
    layer_matrices,
    products_of,
    run_all,
    run_layer,
)
from adapters.run_loop import Run
from adapters.windows import Windows, step_generator
from models.checkpoints import Checkpoint
from models.program import LinearOp, Program, build_program
from models.pruning import count_fixed
from models.weights import LowRank, Matrix, QuantizedBlocks, Weight, dense

_PLANNED_ON = 16
"""Texts that ranks are planned on, or an eighth of all if that is more: what ranks lose needs fewer
than factors do, and each costs a walk through the decoder and back."""


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

    At no time is more held than one layer's matrices and moments, the metrics of all layers and the
    residual streams of all calibration texts at one layer; in the first pass those of texts that
    are planned on, at twice the root of the number of layers. A run that is resumed computes the
    same bits as one that was not interrupted, with the same number of torch threads.

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
    job = _DecoderJob(run, checkpoint, program, windows, config)
    if tensors is not None:
        job.load_state_tensors(tensors)
    run.take_steps(job, should_stop)
    return job.finish(host, description)


class _DecoderJob(CompressJob):
    """The layers of a decoder over texts."""

    def __init__(
        self, run: Run, checkpoint: Checkpoint, program: Program, windows: Windows,
        config: CompressConfig,
    ) -> None:  # fmt: skip
        super().__init__(run, config, program.num_layers, config.sequences * config.length)
        self._checkpoint, self._program, self._windows = checkpoint, program, windows
        drawn = windows.draw(config.sequences, step_generator(config.seed, 0))
        self._texts = list(drawn[:, :-1])
        self._planned = self._texts[: max(_PLANNED_ON, len(self._texts) // 8)]
        self._before_layers: dict[int, list[Tensor]] = {}
        self._gradients: list[Tensor] = []
        self._streams: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the factors and metrics, and the streams of both decoders or their gradients."""
        tensors = super().state_tensors()
        kept: dict[str, Sequence[Tensor]] = {"gradients": self._gradients}
        if self._streams is not None:
            plain, compressed = self._streams
            kept["streams.plain"] = plain
            # Until something is compressed the two are one.
            kept["streams.compressed"] = [] if compressed is plain else compressed
        # Each by itself: together they would take their memory once more.
        return tensors | {
            f"{name}.{number}": tensor
            for name, of in kept.items()
            for number, tensor in enumerate(of)
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state_tensors` returned."""
        super().load_state_tensors(tensors)
        self._gradients = _numbered(tensors, "gradients")
        if plain := _numbered(tensors, "streams.plain"):
            self._streams = plain, _numbered(tensors, "streams.compressed") or plain

    def measured(self, layer: int) -> dict[str, Measured]:
        """Walk a layer of the decoder as it was, forth and back."""
        program, has_metric = self._program, self.config.metric == "loss"
        products = layer_matrices(program, layer)
        ops = {group_name(op.names): op for op in _linears(program, layer)}
        found = Measurement({name: _matrix(name, op) for name, op in ops.items()}, self.config)
        before = self._streams_before(layer)
        width = before[0].shape[1]
        made = GradientSum(stream_name(layer), torch.eye(width))
        if has_metric and not self._gradients:
            self._gradients = self._last_gradients(run_all(program, layer, before, products))
        for number, stream in enumerate(before):
            watch = Watch()
            if has_metric:
                made.add(self._gradients[number])
                start = stream.clone().requires_grad_()
                run_layer(program, layer, start, products, watch).backward(self._gradients[number])
                assert start.grad is not None
                self._gradients[number] = start.grad
            else:
                run_layer(program, layer, stream, products, watch)
            for name, op in ops.items():
                found.add_rows(name, watch.rows[id(op)])
                if has_metric:
                    found.add_gradients(name, watch.gradients[id(op)])
        num_targets = sum(map(len, self._planned))
        if has_metric:
            self.metrics[stream_name(layer)] = made.total(num_targets)
        return found.total(num_targets)

    @torch.no_grad()
    def _streams_before(self, layer: int) -> list[Tensor]:
        """Return the residual streams before a layer, which is no later than that of the last call.

        Kept are those before every so many layers, from which the ones between are made again.
        """
        kept, program = self._before_layers, self._program
        if not kept:
            kept[0] = Walk(program, self._planned, has_drift=False).streams
            stride = math.isqrt(self._num_layers)
            streams = kept[0]
            for number in range(layer):
                streams = run_all(program, number, streams, layer_matrices(program, number))
                _check_finite(number, streams)
                if (number + 1) % stride == 0:
                    kept[number + 1] = streams
        for number in range(max(n for n in kept if n <= layer), layer):
            kept[number + 1] = run_all(
                program, number, kept[number], layer_matrices(program, number)
            )
        for number in [n for n in kept if n > layer]:
            del kept[number]
        return kept[layer]

    def _last_gradients(self, streams: Sequence[Tensor]) -> list[Tensor]:
        _check_finite(self._num_layers - 1, streams)
        generator = step_generator(self.config.seed, LABELS)
        return [sampled_gradients(self._program, stream, generator) for stream in streams]

    def begin(self) -> None:
        """Go to the embeddings."""
        self._before_layers, self._gradients, self._streams = {}, [], None

    def factored(self, layer: int) -> Iterator[Linear]:
        """Walk a layer of both."""
        # Held by the walk alone, which frees each as it goes on.
        streams, self._streams = self._streams, None
        self._walk = Walk(
            self._program, self._texts, has_drift=self.config.fits_drift, streams=streams
        )
        self._before = list(self._walk.streams if streams is None else streams[1])
        self._is_drifted = streams is not None and streams[0] is not streams[1]
        del streams
        self._products = layer_matrices(self._program, layer)
        self._ops: dict[str, LinearOp] = {}
        for op in self._walk.linears(layer, self._products):
            name = group_name(op.names)
            self._ops[name] = op
            yield Linear(
                name, *_matrix(name, op),
                partial(self._walk.inputs, op), partial(self._put, op),
            )  # fmt: skip

    def _put(self, op: LinearOp, pair: Pair) -> None:
        self._walk.replace(op, _pieces(op, *pair))

    def targets(self, layer: int) -> Sequence[Tensor]:
        """Return the residual streams after it."""
        return self._walk.streams

    def forward(self, layer: int, number: int, pairs: Mapping[str, Pair]) -> Tensor:
        """Return the residual stream of a text."""
        products = dict(self._products)
        for name, pair in pairs.items():
            op = self._ops[name]
            products |= products_of(op, _pieces(op, *pair))
        return run_layer(self._program, layer, self._before[number], products)

    def end_layer(self, layer: int, pairs: Mapping[str, Pair]) -> None:
        """Compute the streams of the compressed decoder."""
        plain = self._walk.streams
        compressed: Sequence[Tensor] = plain
        if self.config.compensate and (pairs or self._is_drifted):
            compressed = []
            for number in range(len(self._before)):
                compressed.append(self.forward(layer, number, pairs))
                self._before[number] = torch.empty(0)
        self._before = []
        self._streams = plain, compressed

    def finish(self, host: Host, description: str) -> CompressResult:
        """Write the variant, and what is told of it."""
        # All that the passes needed; the models are still to be tested.
        self.begin()
        for name in ("_walk", "_before", "_products"):
            vars(self).pop(name, None)
        self.metrics = {}
        return_freed_memory()
        config, checkpoint = self.config, self._checkpoint
        groups, removed, whole = self.finished_groups()
        factors = {name: _split(name, checkpoint, *pair) for name, pair in self.factors.items()}
        about = MixedRankConfig(
            ranks={name: facts["rank"] for name, facts in groups.items()},
            form=config.form, plan=config.plan, calibration=config.calibration,
            metric=config.metric, is_compensated=config.compensate, remove_linears=removed / whole,
            remove_total=removed / (whole + count_fixed(checkpoint.spec)),
        )  # fmt: skip
        loss, dense_loss = self._held_out_losses(factors)
        result = CompressResult(
            folder=self.run.output, remove_linears=about.remove_linears,
            remove_total=about.remove_total, loss=loss, dense_loss=dense_loss,
        )  # fmt: skip
        told = {
            "remove_linears": about.remove_linears, "remove_total": about.remove_total,
            "loss": loss, "dense_loss": dense_loss,
            "error_planned": planned_error(groups),
            "options": config.as_fields(),
        }  # fmt: skip
        save_mixed_rank(
            self.run.output, factors, about, host=host, description=description, training=told
        )
        write_report(self.run.output, {**told, "model": host.model_id, "groups": groups})
        self.run.close()
        return result

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


def _numbered(tensors: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """Return those called `name.0`, `name.1` and so on."""
    count = sum(other.startswith(f"{name}.") for other in tensors)
    return [tensors[f"{name}.{number}"] for number in range(count)]


def _check_finite(layer: int, streams: Sequence[Tensor]) -> None:
    if not all(bool(stream.isfinite().all()) for stream in streams):
        raise MomentsError(f"layers.{layer}: what it makes is not a finite number")


def _linears(program: Program, layer: int) -> list[LinearOp]:
    return [op for op in program.layers[layer] if isinstance(op, LinearOp)]


def _matrix(name: str, op: LinearOp) -> tuple[str, Tensor]:
    """Return its kind, and the matrices of its pieces as one."""
    return name.rpartition(".")[2], torch.cat([dense(piece.weight) for piece in op.pieces])


def _pieces(op: LinearOp, left: Tensor, right: Tensor) -> list[Product]:
    """Cut the left factor of all outputs into those of the linear's pieces."""
    return [(part, right) for part in left.split([piece.weight.shape[0] for piece in op.pieces])]


def _split(
    name: str, checkpoint: Checkpoint, left: Matrix, right: Matrix
) -> tuple[list[Matrix], Matrix]:
    """Cut it into those of the linears that a name stands for."""
    sizes = [checkpoint.weights[f"{member}.weight"].shape[0] for member in group_members(name)]
    if isinstance(left, QuantizedBlocks):
        parts = left.data.split(sizes)
        return [QuantizedBlocks(data=part, kind=left.kind) for part in parts], right
    assert isinstance(left, Tensor)
    return list(left.split(sizes)), right
