"""Train a side network: data order, evaluation, and what is left on the disk."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.frozen_head import FrozenHead, head_weight, perplexity
from adapters.qst.adapter import save_qst
from adapters.qst.config import QstConfig
from adapters.qst.examples import DataOrder, Example, digest_examples, hold_out
from adapters.qst.memory import MemoryBreakdown, PeakMemory, measure
from adapters.qst.network import QstNetwork
from adapters.qst.trainer import Evaluation, Trainer
from adapters.qst.training_config import TrainingConfig
from adapters.qst.training_plot import plot_losses
from adapters.run_log import RunLog
from adapters.run_loop import Run, StepRecord
from adapters.training_state import Progress, TrainingError
from models.checkpoints import Checkpoint
from models.decoder import Decoder

_BEST = "best."


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """What came of a run.

    Attributes:
        steps: optimiser steps of the whole run.
        loss: of the last step's batch; nan if a finished run was resumed.
        evaluation: on the held-out examples, or None if there are none; of the weights that were
            kept. `base_loss` is that of the base alone.
        memory: what this process took.
        num_parameters: of the side network.
    """

    steps: int
    loss: float
    evaluation: Evaluation | None
    memory: MemoryBreakdown
    num_parameters: int


def train(
    decoder: Decoder,
    checkpoint: Checkpoint,
    examples: Sequence[Example],
    output: Path,
    *,
    qst: QstConfig | None = None,
    config: TrainingConfig | None = None,
    eval_examples: Sequence[Example] | None = None,
    device: str = "cpu",
    resume: bool = False,
    state_folder: Path | None = None,
    description: str = "",
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[[str], None] = lambda _: None,
) -> TrainingResult:
    """Train a side network on a frozen base and write it as an adapter.

    A run that is resumed computes the same bits as one that was not interrupted, with the same
    kernels and number of torch threads.

    Args:
        decoder: the base, made of `checkpoint`.
        checkpoint: the base's weights.
        examples: to train on; some are held out if there are no `eval_examples`.
        output: folder for adapter, metrics, plot and checkpoints; new or empty, unless resuming.
        qst: the side network; None: the defaults.
        config: options of the training; None: the defaults.
        eval_examples: to evaluate on.
        device: where the decoder computes.
        resume: go on from the newest checkpoint in `output`, or start if there is none.
        state_folder: keeps the base's states of each sequence; see `BaseStates`.
        description: one line about the adapter, for people.
        should_stop: asked after each step.
        report: told what happens, a line at a time.

    Raises:
        TrainingError: the data does not suit the task, the run cannot be resumed or saved, or the
            loss is not finite.
        TrainingInterrupted: `should_stop` said so; a checkpoint is saved.
        AdapterError: the side network does not fit the base, or cannot be written.
    """
    qst, config = qst or QstConfig(), config or TrainingConfig()
    if eval_examples is None:
        examples, eval_examples = hold_out(
            examples, config.eval_fraction, config.eval_limit, config.seed
        )
    check_examples(examples, qst, decoder.spec.vocab_size)
    check_examples(eval_examples, qst, decoder.spec.vocab_size, may_be_empty=True)
    network = QstNetwork(decoder.spec, qst, seed=config.seed, device=device)
    head = None
    if qst.task == "causal_lm":
        head = FrozenHead(decoder, head_weight(checkpoint), torch.device(device))
        # Brings weights that are mapped from a file to memory, where they are no activations.
        head.pull_back(torch.zeros(1, decoder.spec.vocab_size, device=device))
    run = Run(
        output,
        identity={
            **config.as_fields(),
            **network.config.to_fields(),
            "data": digest_examples(examples),
            "eval_data": digest_examples(eval_examples),
            "base": checkpoint.fingerprint,
            "chain": list(checkpoint.chain),
            "has_kept_states": state_folder is not None,
        },
        num_steps=config.num_steps(len(examples)),
        checkpoint_every=config.checkpoint_every,
        report=report,
    )
    base = " ".join((checkpoint.fingerprint, *checkpoint.chain))
    trainer = Trainer(decoder, network, head, config, state_folder=state_folder, base=base)
    size = trainer.states.check_room([*examples, *eval_examples])
    if state_folder is not None:
        report(f"states of the base: {size / 1e6:,.0f} MB to come in {state_folder}")
    job = _TrainingJob(run, trainer, checkpoint, config, examples, eval_examples)
    tensors = run.prepare(resume)
    if tensors is not None:
        job.load_state_tensors(tensors)
    run.take_steps(job, should_stop)
    return job.finish(description)


def check_examples(
    examples: Sequence[Example], qst: QstConfig, vocab_size: int, *, may_be_empty: bool = False
) -> None:
    """Refuse examples that do not suit the task.

    Raises:
        TrainingError: names the first that does not, counted from 1.
    """
    if not examples and not may_be_empty:
        raise TrainingError("there are no examples to train on")
    is_classifier = qst.task == "sequence_classification"
    for number, example in enumerate(examples, 1):
        problem = None
        if (
            not example.token_ids
            or not 0 <= min(example.token_ids) <= max(example.token_ids) < vocab_size
        ):
            problem = f"needs token ids from 0 to {vocab_size - 1}"
        elif is_classifier != (example.label is not None):
            problem = f"the task {qst.task} takes examples with{'out' * (not is_classifier)} labels"
        elif example.label is not None and not 0 <= example.label < qst.num_labels:
            problem = f"label {example.label} is not below num_labels {qst.num_labels}"
        elif not is_classifier and len(example.is_target) != len(example.token_ids):
            problem = "is_target must have one entry for each token"
        elif not example.num_targets:
            problem = "has no token to predict"
        if problem:
            raise TrainingError(f"example {number}: {problem}")


class _TrainingJob:
    """What a run computes: its place in the data, its evaluations, the best weights."""

    rates = "learning_rate or alpha_learning_rate"

    def __init__(
        self,
        run: Run,
        trainer: Trainer,
        checkpoint: Checkpoint,
        config: TrainingConfig,
        examples: Sequence[Example],
        eval_examples: Sequence[Example],
    ) -> None:
        self._run, self._trainer, self._checkpoint, self._config = run, trainer, checkpoint, config
        self._examples, self._eval_examples = examples, eval_examples
        self._num_steps = config.num_steps(len(examples))
        self._best: dict[str, Tensor] = {}
        self._order = DataOrder(len(examples), config.seed)
        self._loss = math.nan
        self._evaluation: Evaluation | None = None
        self._memory = PeakMemory(trainer.device)
        self._has_told_memory = False

    def state_tensors(self) -> dict[str, Tensor]:
        """Return those of the trainer, and the best weights."""
        return {**self._trainer.state_tensors(), **self._best}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state_tensors` returned."""
        self._best = {n: t for n, t in tensors.items() if n.startswith(_BEST)}
        self._trainer.load_state_tensors(
            {n: t for n, t in tensors.items() if not n.startswith(_BEST)}
        )

    def step(self, step: int) -> StepRecord:
        """Learn from the examples whose turn it is."""
        config = self._config
        size = config.batch_size * config.accumulate
        start = (step - 1) * size
        if config.steps is None:  # the last step of the last epoch may be smaller
            size = min(size, max(1, round(config.epochs * len(self._examples)) - start))
        chosen = [self._examples[i] for i in self._order.take(start, size)]
        batches = [
            chosen[i : i + config.batch_size] for i in range(0, len(chosen), config.batch_size)
        ]
        factor = config.rate_factor(step - 1, self._num_steps)
        result = self._trainer.step(batches, factor)
        self._loss = result.loss
        fields = {
            "loss": result.loss,
            "learning_rate": config.learning_rate * factor,
            "gradient_norm": result.gradient_norm,
            "tokens": result.num_tokens,
        }
        if not self._trainer.network.is_fork:
            alpha = self._trainer.network.get_parameter("alpha").detach()
            fields["alpha"] = float(alpha.mean())
        return StepRecord(
            fields=fields, status=f"loss {result.loss:.4f}", num_tokens=result.num_tokens
        )

    def end_step(self, step: int, elapsed_s: float, log: RunLog) -> bool:
        """Evaluate if it is time to."""
        if not self._has_told_memory:
            log.say(self._breakdown().describe())
            self._has_told_memory = True
        if step % self._config.eval_every == 0 or step == self._num_steps:
            self._evaluate(log)
        return False

    def finish(self, description: str) -> TrainingResult:
        """Write adapter and plot."""
        trainer, progress, memory = self._trainer, self._run.progress, self._breakdown()
        if self._best and self._config.keep == "best":
            trainer.load_state_tensors({n.removeprefix(_BEST): t for n, t in self._best.items()})
            self._evaluation = None
        if self._eval_examples and self._evaluation is None:
            self._evaluation = trainer.evaluate(self._eval_examples)
        evaluation = self._evaluation
        if evaluation is not None:
            evaluation = replace(evaluation, base_loss=progress.state["base_loss"])
        facts = summarize(progress, evaluation)
        with self._run.open_log() as log:
            log.add({"event": "summary", **facts, "memory": memory.as_fields()})
        base, output = self._checkpoint, self._run.output
        save_qst(
            output, trainer.network, base_id=base.name, base_fingerprint=base.fingerprint,
            base_quantization=base.quantization, chain=base.chain, description=description,
            training={**facts, "options": self._config.as_fields()},
        )  # fmt: skip
        plot_losses(output)
        self._run.close()
        return TrainingResult(
            steps=progress.step, loss=self._loss, evaluation=evaluation, memory=memory,
            num_parameters=trainer.network.num_parameters,
        )  # fmt: skip

    def _breakdown(self) -> MemoryBreakdown:
        trainer = self._trainer
        return measure(
            self._memory, self._checkpoint.weights.values(), trainer.network.parameters(),
            trainer.optimizer_bytes,
        )  # fmt: skip

    def _evaluate(self, log: RunLog) -> None:
        if not self._eval_examples:
            return
        state, step = dict(self._run.progress.state), self._run.progress.step
        found = self._trainer.evaluate(self._eval_examples, with_base="base_loss" not in state)
        self._evaluation = found
        base_loss = state.setdefault("base_loss", found.base_loss)
        if "best_loss" not in state or found.loss < state["best_loss"]:
            state |= {"best_step": step, "best_loss": found.loss}
            if self._config.keep == "best":
                self._best = {
                    f"{_BEST}parameter.{name}": parameter.detach().clone()
                    for name, parameter in self._trainer.network.named_parameters()
                }
        self._run.keep(**state)
        log.add(
            {"event": "eval", "step": step, "loss": found.loss, "base_loss": base_loss,
             "perplexity": found.perplexity, "accuracy": found.accuracy}
        )  # fmt: skip
        accuracy = "" if found.accuracy is None else f", accuracy {found.accuracy:.1%}"
        base = "" if base_loss is None else f" (base {base_loss:.4f})"
        log.say(f"step {step}: held-out loss {found.loss:.4f}{base}{accuracy}")


def summarize(progress: Progress, evaluation: Evaluation | None) -> dict[str, Any]:
    """Return the facts of a finished run as JSON values."""
    facts: dict[str, Any] = {"steps": progress.step, "tokens": progress.num_tokens}
    if evaluation is not None:
        facts |= {"held_out_loss": evaluation.loss, "best_step": progress.state["best_step"]}
        facts["held_out_perplexity"] = evaluation.perplexity
        if evaluation.accuracy is not None:
            facts["held_out_accuracy"] = evaluation.accuracy
        if evaluation.base_loss is not None:
            facts["base_held_out_loss"] = evaluation.base_loss
            facts["base_held_out_perplexity"] = perplexity(evaluation.base_loss)
    return facts
