"""One training run for `benchmarks.qst_quality`: a side network or QLoRA; prints one JSON object.

    python -m benchmarks.qst_quality_worker SETTINGS

SETTINGS is a JSON object: see `Settings`.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from serve.environment import let_threads_sleep

let_threads_sleep(os.environ)  # before torch is imported

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from adapters.frozen_head import FrozenHead, head_weight  # noqa: E402
from adapters.qst.config import QstConfig  # noqa: E402
from adapters.qst.examples import DataOrder, Example  # noqa: E402
from adapters.qst.memory import PeakMemory  # noqa: E402
from adapters.qst.network import QstNetwork  # noqa: E402
from adapters.qst.trainer import Trainer  # noqa: E402
from adapters.qst.training_config import TrainingConfig  # noqa: E402
from benchmarks import qlora  # noqa: E402
from models.checkpoints import Checkpoint, load_checkpoint  # noqa: E402
from models.decoder import Decoder  # noqa: E402
from text.records import read_records  # noqa: E402
from text.tokenizer import Tokenizer  # noqa: E402
from text.training_data import Limit, build_examples, build_labelled  # noqa: E402

PARTS = ("validation", "held_out")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to train.

    Attributes:
        data: file of examples; one that ends in .tsv is a classification task.
        qst: fields of `QstConfig`; None: QLoRA.
        lora_rank: of QLoRA.
        quantization: "none": the weights as they are; "nf4".
        learning_rate, seed, steps, batch_size: as of `TrainingConfig`.
        num_evaluated: examples of each of the validation and the held-out part, which are the same
            whatever the seed.
        max_length: longer sequences are left out.
        eval_at: shares of the steps after which to evaluate; the end in any case.
        cache_dir: of the demo model.
    """

    data: str
    qst: Mapping[str, Any] | None
    learning_rate: float
    seed: int
    steps: int
    lora_rank: int = 8
    quantization: str = "none"
    batch_size: int = 8
    num_evaluated: int = 64
    max_length: int = 256
    eval_at: Sequence[float] = (0.5,)
    cache_dir: str | None = None


class Learner(Protocol):
    """Something that learns from batches of examples."""

    num_parameters: int

    def step(self, examples: Sequence[Example], rate_factor: float) -> None: ...

    def evaluate(self, examples: Sequence[Example]) -> dict[str, float]: ...


class SideLearner:
    """A side network, as `proa train qst` trains it."""

    def __init__(self, settings: Settings, checkpoint: Checkpoint, labels: Sequence[str]) -> None:
        decoder = Decoder(checkpoint.spec, checkpoint.weights)
        head = None
        if not labels:
            head = FrozenHead(decoder, head_weight(checkpoint), torch.device("cpu"))
            head.pull_back(torch.zeros(1, decoder.spec.vocab_size))  # brings it to memory
        qst = QstConfig(
            **(settings.qst or {}),
            task="sequence_classification" if labels else "causal_lm",
            num_labels=len(labels),
            labels=tuple(labels),
        )
        network = QstNetwork(decoder.spec, qst, seed=settings.seed)
        self.num_parameters = network.num_parameters
        self._trainer = Trainer(decoder, network, head, training_config(settings))

    def step(self, examples: Sequence[Example], rate_factor: float) -> None:
        self._trainer.step([examples], rate_factor)

    def evaluate(self, examples: Sequence[Example]) -> dict[str, float]:
        found = self._trainer.evaluate(examples)
        accuracy = {} if found.accuracy is None else {"accuracy": found.accuracy}
        return {"loss": found.loss, **accuracy}


class LoraLearner:
    """QLoRA with PEFT; a classifier's head is trained with it, as beside a side network."""

    def __init__(self, settings: Settings, checkpoint: Checkpoint, labels: Sequence[str]) -> None:
        torch.manual_seed(settings.seed)
        self._model: Any = qlora.build_model(
            checkpoint.folder, settings.lora_rank, dtype=torch.float32, checkpointing=False
        )
        self._head: torch.nn.Linear | None = None
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        if labels:
            self._head = torch.nn.Linear(checkpoint.spec.hidden_size, len(labels), bias=False)
            parameters += self._head.parameters()
        self.num_parameters = sum(p.numel() for p in parameters)
        self._parameters, self._config = parameters, training_config(settings)
        self._optimizer = torch.optim.AdamW(
            parameters, lr=settings.learning_rate, weight_decay=self._config.weight_decay,
            fused=True,
        )  # fmt: skip

    def step(self, examples: Sequence[Example], rate_factor: float) -> None:
        loss, num_targets, _ = self._sum_loss(examples)
        self._optimizer.zero_grad()
        (loss / num_targets).backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._config.clip)
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.learning_rate * rate_factor
        self._optimizer.step()

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example]) -> dict[str, float]:
        size = self._config.batch_size
        batches = [examples[i : i + size] for i in range(0, len(examples), size)]
        sums = [(float(a), b, c) for a, b, c in map(self._sum_loss, batches)]
        total = sum(targets for _, targets, _ in sums)
        found = {"loss": sum(loss for loss, _, _ in sums) / total}
        if self._head is not None:
            found["accuracy"] = sum(right for *_, right in sums) / total
        return found

    def _sum_loss(self, examples: Sequence[Example]) -> tuple[torch.Tensor, int, int]:
        if self._head is None:
            num_targets = sum(example.num_targets for example in examples)
            return qlora.sum_loss(self._model, examples), num_targets, 0
        ids = [torch.tensor(list(example.token_ids)) for example in examples]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        lengths = torch.tensor([len(row) for row in ids])
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        inner = self._model.get_base_model().model
        states = inner(input_ids=padded, attention_mask=mask.long()).last_hidden_state
        scores = self._head(states[torch.arange(len(ids)), lengths - 1])
        targets = torch.tensor([example.label for example in examples])
        right = int((scores.argmax(1) == targets).sum())
        return F.cross_entropy(scores, targets, reduction="sum"), len(ids), right


def training_config(settings: Settings) -> TrainingConfig:
    """Return the options that both kinds of runs are trained with."""
    return TrainingConfig(
        steps=settings.steps, batch_size=settings.batch_size, seed=settings.seed,
        learning_rate=settings.learning_rate, alpha_learning_rate=2 * settings.learning_rate,
    )  # fmt: skip


def read_parts(
    settings: Settings, folder: Path
) -> tuple[list[Example], dict[str, list[Example]], tuple[str, ...]]:
    """Return the examples to train on, those of each part, and a classifier's labels."""
    path = Path(settings.data)
    tokenizer = Tokenizer.from_folder(folder)
    limit = Limit(max_tokens=settings.max_length, policy="skip", reason="max_length")
    records, labels = read_records(path), ()
    if path.suffix == ".tsv":
        examples, labels = build_labelled(records, tokenizer, limit)  # type: ignore[assignment]
    else:
        examples = build_examples(records, tokenizer, limit)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    size, shuffled = settings.num_evaluated, [examples[i] for i in order]
    parts = {name: shuffled[i * size : (i + 1) * size] for i, name in enumerate(PARTS)}
    return shuffled[size * len(PARTS) :], parts, labels


def train(
    learner: Learner,
    examples: Sequence[Example],
    parts: Mapping[str, Sequence[Example]],
    settings: Settings,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train; return losses against examples and seconds, and memory above the start."""
    config, memory = training_config(settings), PeakMemory(torch.device("cpu"))
    order, size = DataOrder(len(examples), settings.seed), settings.batch_size
    eval_steps = {max(1, round(share * settings.steps)) for share in settings.eval_at}
    curve: list[dict[str, Any]] = []
    spent_s, times = 0.0, []

    def evaluate(step: int) -> None:
        point = {name: learner.evaluate(part) for name, part in parts.items()}
        curve.append({"examples": step * size, "seconds": round(spent_s, 2), **point})
        say(f"{step * size} examples, {spent_s:.0f} s: held-out {point['held_out']}")

    evaluate(0)
    for step in range(settings.steps):
        batch = [examples[i] for i in order.take(step * size, size)]
        start_s = time.perf_counter()
        learner.step(batch, config.rate_factor(step, settings.steps))
        times.append(time.perf_counter() - start_s)
        spent_s += times[-1]
        if step == 0:
            peak = memory.read()[1]
        if step + 1 in eval_steps | {settings.steps}:
            evaluate(step + 1)
    return {
        "curve": curve,
        "median_step_s": sorted(times)[len(times) // 2],
        "memory_above_start_bytes": max(peak, memory.read()[1]),
        "trainable_parameters": learner.num_parameters,
    }


def main() -> None:
    """Train as the argument says and print the figures."""
    settings = Settings(**json.loads(sys.argv[1]))
    checkpoint = load_checkpoint(
        None,
        quantization=settings.quantization,
        cache_dir=None if settings.cache_dir is None else Path(settings.cache_dir),
    )
    examples, parts, labels = read_parts(settings, checkpoint.folder)
    learner = (LoraLearner if settings.qst is None else SideLearner)(settings, checkpoint, labels)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    print(json.dumps(train(learner, examples, parts, settings, say)))


if __name__ == "__main__":
    main()
