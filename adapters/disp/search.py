"""Search for pruned variants of a base: shares in turn, and what is left on the disk."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from adapters.disp.budget import check_shares
from adapters.disp.config import removed_shares
from adapters.disp.masked import MaskedDecoder
from adapters.disp.search_config import SearchConfig
from adapters.disp.search_plots import plot_widths
from adapters.disp.searcher import Searcher, mean_loss
from adapters.disp.variant import save_disp
from adapters.frozen_head import perplexity
from adapters.precision import resolve_dtype
from adapters.run_log import RunLog
from adapters.run_loop import Run, StepRecord
from adapters.windows import Windows, step_generator
from models.checkpoints import Checkpoint
from models.pruning import count_fixed, count_linears

_HEAD_START_WINDOWS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """A variant that was found.

    Attributes:
        remove: share of the linears' parameters that was asked for.
        remove_linears, remove_total: shares that it removes of the linears and of the whole model.
        folder: of the variant.
        parameters: of the pruned model, embeddings included, biases not.
        loss: cross entropy on the held-out windows, in nats; None if there are none.
        dense_loss: that of the base, not pruned.
        ratio_error: kept over wanted parameters less 1, as the search left them, before the widths
            were rounded and brought to the target.
        seconds: that this share took.
    """

    remove: float
    remove_linears: float
    remove_total: float
    folder: Path
    parameters: int
    loss: float | None
    dense_loss: float | None
    ratio_error: float
    seconds: float


def search(
    checkpoint: Checkpoint,
    token_ids: Tensor | Sequence[int],
    output: Path,
    *,
    base_fingerprint: str,
    base_quantization: str,
    config: SearchConfig | None = None,
    device: str = "cpu",
    resume: bool = False,
    description: str = "",
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[[str], None] = lambda _: None,
) -> tuple[SearchResult, ...]:
    """Search for variants of a base and write each as an adapter.

    A run that is resumed computes the same bits as one that was not interrupted, with the same
    number of torch threads.

    Args:
        checkpoint: the base's weights, dense; if they are rounded as those that are served, the
            search knows what the rounding costs. Its fingerprint is that of the original ones.
        token_ids: (n,) the text to search on; its end is held out.
        output: folder for metrics, picture and checkpoints, new or empty, unless resuming. It is
            the variant's folder too if there is one share, else it holds `remove-20` and so on.
        base_fingerprint, base_quantization: of the base as it is served, see `AdapterConfig`.
        config: options; None: the defaults.
        device: where to compute.
        resume: go on from the newest checkpoint in `output`, or start if there is none.
        description: one line about the variants, for people.
        should_stop: asked after each step.
        report: told what happens, a line at a time.

    Returns:
        One for each share, in increasing order.

    Raises:
        BudgetError: a share cannot be removed.
        TrainingError: the text is too short, the run cannot be resumed or saved, or the loss is not
            finite.
        TrainingInterrupted: `should_stop` said so; a checkpoint is saved.
        AdapterError: a variant cannot be written.
    """
    config, spec = config or SearchConfig(), checkpoint.spec
    check_shares(spec, config.remove, config.align)
    windows = Windows(
        torch.as_tensor(token_ids), config.length, held_out=config.eval_windows, spec=spec
    )
    base = {
        "base_id": checkpoint.name, "base_fingerprint": base_fingerprint,
        "base_quantization": base_quantization, "dense_fingerprint": checkpoint.fingerprint,
    }  # fmt: skip
    run = Run(
        output,
        identity={**config.as_fields(), **base, "data": windows.digest},
        num_steps=config.num_steps,
        checkpoint_every=config.checkpoint_every,
        report=report,
        state={"seconds": 0.0, "results": []},
    )
    tensors = run.prepare(resume)
    masked = MaskedDecoder(
        spec, checkpoint.weights, device=device,
        dtype=resolve_dtype(config.compute_dtype, torch.device(device)),
        gradient_checkpointing=config.gradient_checkpointing,
    )  # fmt: skip
    searcher = Searcher(masked, config)
    if tensors is not None:
        searcher.load_state_tensors(tensors)
    else:
        searcher.give_head_start(windows.draw(_HEAD_START_WINDOWS, step_generator(config.seed, 0)))
        dense_loss = None
        if len(windows.held_out):
            dense_loss = mean_loss(masked, windows.held_out, config.batch_size)
            report(f"held-out loss of the base: {dense_loss:.4f}")
        run.keep(dense_loss=dense_loss)
    job = _SearchJob(run, searcher, config, windows, base, description)
    run.take_steps(job, should_stop)
    return job.finish()


class _SearchJob:
    """What a run computes: its shares in turn, their evaluations, their variants."""

    rates = "learning_rate"

    def __init__(
        self,
        run: Run,
        searcher: Searcher,
        config: SearchConfig,
        windows: Windows,
        base: Mapping[str, str],
        description: str,
    ) -> None:
        self._run, self._searcher, self._config = run, searcher, config
        self._windows, self._base, self._description = windows, base, description
        self._shares = sorted(config.remove)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return those of the searcher."""
        return self._searcher.state_tensors()

    def step(self, step: int) -> StepRecord:
        """Learn from windows drawn at random."""
        config = self._config
        number, place, num_steps = self._place(step)
        before = 1 - self._shares[number - 1] if number else 1.0
        target = config.target(place, num_steps, before=before, wanted=1 - self._shares[number])
        factor = config.rate_factor(place, num_steps)
        generator = step_generator(config.seed, step)
        drawn = self._windows.draw(config.batch_size, generator)
        result = self._searcher.step(drawn, generator, target=target, rate_factor=factor)
        fields = {
            "remove": self._shares[number],
            "target": target,
            "learning_rate": config.learning_rate * factor,
            **asdict(result),
        }
        status = f"loss {result.loss:.3f}, kept {result.kept:.3f} of {target:.3f}"
        return StepRecord(fields=fields, status=status, num_tokens=result.num_tokens)

    def end_step(self, step: int, elapsed_s: float, log: RunLog) -> bool:
        """Fix widths, evaluate or write a variant where that is due."""
        self._run.keep(seconds=self._run.progress.state["seconds"] + elapsed_s)
        number, place, num_steps = self._place(step)
        ends_share = place + 1 == num_steps
        if place + 1 == self._config.settles_after(num_steps):
            self._fix_widths(number)
        if ends_share:
            self._materialise(log, number)
        elif step % self._config.eval_every == 0:
            self._evaluate(log)
        return ends_share

    def finish(self) -> tuple[SearchResult, ...]:
        """Draw the picture and tell the results."""
        plot_widths(self._run.output, self._searcher.spec)
        self._run.close()
        return tuple(
            SearchResult(**fields | {"folder": self._folder(fields["remove"])})
            for fields in self._run.progress.state["results"]
        )

    def _folder(self, share: float) -> Path:
        if len(self._shares) == 1:
            return self._run.output
        return self._run.output / f"remove-{round(share * 100, 4):g}"

    def _place(self, step: int) -> tuple[int, int, int]:
        """Return which share a step is for, its place in it, counted from 0, and their number."""
        steps = self._config.share_steps
        ends = list(accumulate(steps))
        number = bisect_left(ends, step)
        return number, step - 1 - (ends[number] - steps[number]), steps[number]

    def _evaluate(self, log: RunLog) -> None:
        step, held_out = self._run.progress.step, self._windows.held_out
        if not len(held_out):
            return
        loss, kept = self._searcher.evaluate(held_out), self._searcher.kept()
        log.add({"event": "eval", "step": step, "loss": loss, "kept": kept})
        log.say(f"step {step}: held-out loss {loss:.4f} with {kept:.1%} of the linears kept")

    def _fix_widths(self, number: int) -> None:
        """Round the widths of a share; note how far from its target the search left them."""
        keep = 1 - self._shares[number]
        self._run.keep(ratio_error=self._searcher.kept() / keep - 1)
        self._searcher.fix_widths(keep)

    def _materialise(self, log: RunLog, number: int) -> None:
        """Write the variant of the share that ends here."""
        config, searcher, progress = self._config, self._searcher, self._run.progress
        spec, held_out, state = searcher.spec, self._windows.held_out, progress.state
        share, selections = self._shares[number], searcher.selections()
        widths = [selection.widths for selection in selections]
        linears, total = removed_shares(spec, widths)
        loss = searcher.evaluate(held_out, selections) if len(held_out) else None
        facts = {
            "remove": share, "remove_linears": linears, "remove_total": total,
            "parameters": count_linears(spec, widths) + count_fixed(spec), "loss": loss,
            "dense_loss": state["dense_loss"], "ratio_error": state["ratio_error"],
            "seconds": round(state["seconds"], 1),
        }  # fmt: skip
        folder = self._folder(share)
        save_disp(
            folder, selections, spec, **self._base, align=config.align,
            residual=config.residual, description=self._description,
            training={
                **facts, "steps": progress.step, "tokens": progress.num_tokens,
                "options": config.as_fields(),
            },
        )  # fmt: skip
        log.add({"event": "result", "step": progress.step, **facts, "widths": widths})
        line = (
            f"{folder}: {linears:.1%} of the linears' parameters removed, {total:.1%} of the model"
        )
        if loss is not None:
            line += f"; held-out loss {loss:.4f}, perplexity {perplexity(loss):.2f}"
        log.say(line)
        searcher.free_widths()
        self._run.keep(seconds=0.0, results=[*state["results"], facts])
