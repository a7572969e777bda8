"""Search for pruned variants of a base: shares in turn, checkpoints, what is left on the disk."""

import shutil
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.disp.budget import check_shares
from adapters.disp.config import removed_shares
from adapters.disp.masked import MaskedDecoder
from adapters.disp.search_config import SearchConfig
from adapters.disp.search_plots import plot_widths
from adapters.disp.searcher import Searcher, StepResult, mean_loss
from adapters.disp.variant import save_disp
from adapters.disp.windows import Windows, step_generator
from adapters.frozen_head import perplexity
from adapters.precision import resolve_dtype
from adapters.run_log import RunLog, open_run
from adapters.training_state import (
    FOLDER,
    Progress,
    TrainingError,
    TrainingInterrupted,
    check_identity,
    save_progress,
)
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
    run = _Run(
        base={
            "base_id": checkpoint.name, "base_fingerprint": base_fingerprint,
            "base_quantization": base_quantization, "dense_fingerprint": checkpoint.fingerprint,
        },
        config=config, windows=windows, output=output, description=description, report=report,
    )  # fmt: skip
    run.prepare(resume)
    run.attach(
        MaskedDecoder(
            spec, checkpoint.weights, device=device,
            dtype=resolve_dtype(config.compute_dtype, torch.device(device)),
            gradient_checkpointing=config.gradient_checkpointing,
        )
    )  # fmt: skip
    run.steps(should_stop)
    return run.finish()


class _Run:
    """One run: its shares, its log and its checkpoints."""

    def __init__(
        self,
        *,
        base: Mapping[str, str],
        config: SearchConfig,
        windows: Windows,
        output: Path,
        description: str,
        report: Callable[[str], None],
    ) -> None:
        self._base, self._config, self._windows = base, config, windows
        self._output, self._description, self._report = output, description, report
        self._shares = sorted(config.remove)
        identity = {**config.as_fields(), **base, "data": windows.digest}
        self._progress = Progress(step=0, identity=identity, state={"seconds": 0.0, "results": []})
        self._tensors: dict[str, Tensor] | None = None

    def prepare(self, resume: bool) -> None:
        """Make the folder, or load the newest checkpoint of it."""
        found = open_run(self._output, resume=resume)
        if found is None:
            return
        check_identity(found[0].identity, self._progress.identity)
        self._progress, self._tensors = found
        self._report(f"resuming after step {self._progress.step} of {self._config.num_steps}")

    def attach(self, base: MaskedDecoder) -> None:
        """Set up what computes, where the checkpoint was or from the start."""
        self._searcher = Searcher(base, self._config)
        if self._tensors is not None:
            self._searcher.load_state_tensors(self._tensors)
            self._tensors = None
            return
        drawn = self._windows.draw(_HEAD_START_WINDOWS, step_generator(self._config.seed, 0))
        self._searcher.give_head_start(drawn)
        held_out, state = self._windows.held_out, dict(self._progress.state)
        state["dense_loss"] = None
        if len(held_out):
            state["dense_loss"] = mean_loss(base, held_out, self._config.batch_size)
            self._report(f"held-out loss of the base: {state['dense_loss']:.4f}")
        self._progress = replace(self._progress, state=state)

    def steps(self, should_stop: Callable[[], bool]) -> None:
        """Do what is left of the steps."""
        config, first = self._config, self._progress.step
        with self._log() as log:
            if first == 0:
                self._save(log)
            for step in range(first + 1, config.num_steps + 1):
                start_s = time.monotonic()
                result, facts = self._step(step)
                elapsed_s = time.monotonic() - start_s
                log.add_step(
                    {"event": "step", "step": step, **facts, **asdict(result),
                     "tokens_per_s": round(result.num_tokens / elapsed_s, 1)},
                    f"loss {result.loss:.3f}, kept {result.kept:.3f} of {facts['target']:.3f}",
                )  # fmt: skip
                self._advance(
                    step, result.num_tokens, seconds=self._progress.state["seconds"] + elapsed_s,
                )  # fmt: skip
                number, place, num_steps = self._place(step)
                ends_share, is_last = place + 1 == num_steps, step == config.num_steps
                if place + 1 == config.settles_after(num_steps):
                    self._fix_widths(number)
                if step % config.eval_every == 0 and not ends_share:
                    self._evaluate(log)
                if ends_share:
                    self._materialise(log, number)
                is_stopping = should_stop() and not is_last
                if step % config.checkpoint_every == 0 or ends_share or is_stopping:
                    self._save(log)
                if is_stopping:
                    raise TrainingInterrupted(step, self._output / FOLDER)

    def finish(self) -> tuple[SearchResult, ...]:
        """Draw the picture; the checkpoints have served their purpose then."""
        plot_widths(self._output, self._searcher.spec)
        shutil.rmtree(self._output / FOLDER, ignore_errors=True)
        return tuple(
            SearchResult(**fields | {"folder": self._folder(fields["remove"])})
            for fields in self._progress.state["results"]
        )

    def _log(self) -> RunLog:
        return RunLog(
            self._output, num_steps=self._config.num_steps, step=self._progress.step,
            num_bytes=self._progress.metrics_bytes, report=self._report,
        )  # fmt: skip

    def _folder(self, share: float) -> Path:
        if len(self._shares) == 1:
            return self._output
        return self._output / f"remove-{round(share * 100, 4):g}"

    def _place(self, step: int) -> tuple[int, int, int]:
        """Return which share a step is for, its place in it, counted from 0, and their number."""
        steps = self._config.share_steps
        ends = list(accumulate(steps))
        number = bisect_left(ends, step)
        return number, step - 1 - (ends[number] - steps[number]), steps[number]

    def _step(self, step: int) -> tuple[StepResult, dict[str, Any]]:
        config = self._config
        number, place, num_steps = self._place(step)
        before = 1 - self._shares[number - 1] if number else 1.0
        target = config.target(place, num_steps, before=before, wanted=1 - self._shares[number])
        factor = config.rate_factor(place, num_steps)
        generator = step_generator(config.seed, step)
        drawn = self._windows.draw(config.batch_size, generator)
        try:
            result = self._searcher.step(drawn, generator, target=target, rate_factor=factor)
        except TrainingError as error:
            raise TrainingError(
                f"step {step}: {error}; the last checkpoint is kept in {self._output / FOLDER}; "
                "a lower learning_rate may help"
            ) from error
        facts = {
            "remove": self._shares[number],
            "target": target,
            "learning_rate": config.learning_rate * factor,
        }
        return result, facts

    def _advance(self, step: int, num_tokens: int, **state: Any) -> None:
        progress = self._progress
        self._progress = replace(
            progress, step=step, num_tokens=progress.num_tokens + num_tokens,
            state={**progress.state, **state},
        )  # fmt: skip

    def _evaluate(self, log: RunLog) -> None:
        step, held_out = self._progress.step, self._windows.held_out
        if not len(held_out):
            return
        loss, kept = self._searcher.evaluate(held_out), self._searcher.kept()
        log.add({"event": "eval", "step": step, "loss": loss, "kept": kept})
        log.say(f"step {step}: held-out loss {loss:.4f} with {kept:.1%} of the linears kept")

    def _fix_widths(self, number: int) -> None:
        """Round the widths of a share; note how far from its target the search left them."""
        keep = 1 - self._shares[number]
        state = {**self._progress.state, "ratio_error": self._searcher.kept() / keep - 1}
        self._searcher.fix_widths(keep)
        self._progress = replace(self._progress, state=state)

    def _materialise(self, log: RunLog, number: int) -> None:
        """Write the variant of the share that ends here."""
        config, searcher, progress = self._config, self._searcher, self._progress
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
        log.say(
            f"{folder}: {linears:.1%} of the linears' parameters removed, {total:.1%} of the model"
            + (
                ""
                if loss is None
                else f"; held-out loss {loss:.4f}, perplexity {perplexity(loss):.2f}"
            )
        )
        searcher.free_widths()
        self._advance(progress.step, 0, seconds=0.0, results=[*state["results"], facts])

    def _save(self, log: RunLog) -> None:
        self._progress = replace(self._progress, metrics_bytes=log.sync())
        save_progress(self._output / FOLDER, self._progress, self._searcher.state_tensors())
