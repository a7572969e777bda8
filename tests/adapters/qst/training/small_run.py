"""A short training run on a tiny base; as a program it hangs somewhere, for a test to kill it."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from adapters.qst.config import QstConfig
from adapters.qst.examples import Example
from adapters.qst.training import TrainingResult, train
from adapters.qst.training_config import TrainingConfig
from models.checkpoints import Checkpoint, load_checkpoint
from models.decoder import Decoder

OPTIONS: dict[str, object] = {
    "steps": 12, "batch_size": 3, "accumulate": 2, "learning_rate": 1e-2, "eval_fraction": 0.2,
    "eval_every": 4, "checkpoint_every": 3, "warmup": 0.2, "schedule": "cosine",
}  # fmt: skip
HANGING = {"step": "hangs after step 8", "save": "hangs while saving step 9"}


def make_examples() -> list[Example]:
    """Sequences of 4 to 30 tokens whose second half is the first again, and is to be predicted."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in torch.randint(2, 16, (24,), generator=generator).tolist():
        half = torch.randint(0, 250, (length,), generator=generator).tolist()
        made.append(Example(token_ids=half + half, is_target=[0] * length + [1] * length))
    return made


def build(folder: Path) -> tuple[Checkpoint, Decoder]:
    """Load the tiny base."""
    checkpoint = load_checkpoint(folder, quantization="none")
    return checkpoint, Decoder(
        checkpoint.spec, checkpoint.weights, kernels="reference", head="dense"
    )


def run(
    base: tuple[Checkpoint, Decoder],
    output: Path,
    examples: Sequence[Example] | None = None,
    qst: QstConfig | None = None,
    **options: object,
) -> TrainingResult:
    """Train with `OPTIONS`, changed by those of them and of `train` that are given."""
    rest = {k: options.pop(k) for k in list(options) if k not in TrainingConfig.__slots__}
    config = TrainingConfig(**{**OPTIONS, **options})  # type: ignore[arg-type]
    return train(
        base[1], base[0], make_examples() if examples is None else examples, output,
        qst=qst or QstConfig(reduction=4), config=config, **rest,  # type: ignore[arg-type]
    )  # fmt: skip


def hang(*_: object) -> bool:
    """Say so and wait to be killed."""
    print("hanging", flush=True)
    time.sleep(600)
    return False


def main(folder: str, output: str, where: str) -> None:
    """Run until the place to hang."""
    torch.set_num_threads(1)
    steps = iter(range(1, 100))
    if where == "save":
        rename = Path.rename
        Path.rename = lambda self, to: hang() if "09" in str(to) else rename(self, to)  # type: ignore[assignment,method-assign,return-value]
    should_stop = (lambda: next(steps) == 8 and hang()) if where == "step" else (lambda: False)
    run(build(Path(folder)), Path(output), should_stop=should_stop)


if __name__ == "__main__":
    main(*sys.argv[1:])
