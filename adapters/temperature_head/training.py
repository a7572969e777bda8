"""Train a temperature head on programs that passed their tests and programs that failed.

The programs were drawn at one fixed temperature. What a head gives changes how likely each of their
tokens would have been; training makes those of programs that did better than others of their task
more likely, those of the others less (a clipped policy gradient, as in PPO). A task counts by what
one more right program changes in its pass@k: k (1 - p) ** (k - 1) of the share p that passed. The
model is frozen and read once.

Sources: Schulman et al., "Proximal policy optimization algorithms" (2017), equation 7; Dhuliawala
et al., "Adaptive decoding via latent preference optimization" (2024), for temperatures learned from
preferences.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from adapters.format import AdapterError
from adapters.temperature_head.head import HeadConfig, TemperatureHead
from models.batch import PackedBatch
from models.decoder import Decoder

_GRID = 9
_BLOCK = 16
_PREFILL_TOKENS = 512
_LARGEST = 8.0  # of a centred and scaled state


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A program that was drawn.

    Attributes:
        task: what it is for; programs of one task share their prompt.
        prompt_token_ids: at least one.
        token_ids: what was drawn, at least one.
        passed: its tests.
    """

    task: str
    prompt_token_ids: Sequence[int]
    token_ids: Sequence[int]
    passed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadTraining:
    """How a head is trained.

    Attributes:
        drawn_at: the programs' temperature; within the head's bounds.
        k: of the pass@k that is to rise, 1 .. 100.
        epochs: passes over all programs, >= 1; the best by held-out tasks is kept.
        learning_rate: of Adam, > 0.
        weight_decay: of the matrices, >= 0.
        clip: how far from 1 a token's ratio of probabilities counts, 0 .. 1.
        held_out: share of the tasks that choose the epoch, 0 .. 0.5.
        batch_rows: rows of logits computed at once.
        seed: of initial weights and held-out tasks.

    Raises:
        AdapterError: a value is not allowed.
    """

    drawn_at: float
    k: int = 10
    epochs: int = 200
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    clip: float = 0.5
    held_out: float = 0.25
    batch_rows: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "drawn_at": (0, 2), "k": (1, 100), "epochs": (1, 10**6), "learning_rate": (0, 1),
            "weight_decay": (0, 1), "clip": (0, 1), "held_out": (0, 0.5), "batch_rows": (1, 2**16),
            "seed": (0, 2**63 - 1),
        }  # fmt: skip
        for field in fields(self):
            low, high = ranges[field.name]
            value = getattr(self, field.name)
            if not low <= value <= high or (
                field.name in ("drawn_at", "learning_rate") and not value
            ):
                raise AdapterError(f"{field.name} must be from {low} to {high}, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Readings:
    """What a model says of the tokens of programs.

    Attributes:
        states: (T, D) float16, the final state before each token, after its norm.
        logprobs: (T, G) float32, of each token at each temperature of `grid`.
        grid: (G,) float32, rising.
        owner: (T,) int64, number of the program.
    """

    states: Tensor
    logprobs: Tensor
    grid: Tensor
    owner: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadResult:
    """What came of a training.

    Attributes:
        head: the one of the best epoch.
        epoch: its number; 0 is the fixed temperature itself.
        gain, held_out_gain: by how much the objective rose over the fixed temperature's, on the
            tasks trained on and on the others; in standard deviations of a program's advantage,
            a token.
        temperatures: (T,) what it gives all tokens.
        num_tasks: that tell anything: some of their programs passed, some failed.
    """

    head: TemperatureHead
    epoch: int
    gain: float
    held_out_gain: float
    temperatures: Tensor
    num_tasks: int


def read_programs(
    decoder: Decoder,
    programs: Sequence[Program],
    config: HeadConfig,
    training: HeadTraining,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> Readings:
    """Run a model over programs; the prompt of a task is computed once.

    Args:
        decoder: the model.
        programs: those of a task one after the other.
        config: bounds of the temperatures.
        training: the temperature that they were drawn at, and the size of a batch.
        progress: told how many more programs are done.
    """
    grid = torch.linspace(config.least, config.most, _GRID).clamp_min(1e-2)
    grid = torch.cat([grid, torch.tensor([training.drawn_at])]).unique()
    states, logprobs, owner = [], [], []
    for numbers in _by_task(programs):
        prompt = list(programs[numbers[0]].prompt_token_ids)
        longest = max(len(programs[number].token_ids) for number in numbers)
        shared = (len(prompt) - 1) // _BLOCK  # full blocks before the last token of the prompt
        own = -(-(len(prompt) + longest - shared * _BLOCK) // _BLOCK)
        most = max(1, training.batch_rows // longest)
        cache = decoder.make_cache(num_blocks=shared + own * most)
        for start in range(0, shared * _BLOCK, _PREFILL_TOKENS):
            end = min(start + _PREFILL_TOKENS, shared * _BLOCK)
            decoder.forward(_pack([prompt[start:end]], [range(shared)], start, []), cache)
        for first in range(0, len(numbers), most):
            chosen = numbers[first : first + most]
            tails: list[list[int]] = []
            tables: list[list[int]] = []
            rows: list[int] = []
            at = 0
            for i, number in enumerate(chosen):
                drawn = list(programs[number].token_ids)
                tail = prompt[shared * _BLOCK :] + drawn[:-1]
                at += len(tail)
                rows += range(at - len(drawn), at)
                tails.append(tail)
                tables.append([*range(shared), *range(shared + own * i, shared + own * (i + 1))])
                owner += [number] * len(drawn)
            read = torch.empty(len(rows), decoder.spec.hidden_size)
            batch = _pack(tails, tables, shared * _BLOCK, rows)
            logits = decoder.forward(batch, cache, states=read).float().cpu()
            drawn_ids = torch.tensor([t for number in chosen for t in programs[number].token_ids])
            found = [(logits / t).log_softmax(-1).gather(1, drawn_ids[:, None])[:, 0] for t in grid]
            states.append(read.half())
            logprobs.append(torch.stack(found, 1))
            progress(len(chosen))
    return Readings(
        states=torch.cat(states), logprobs=torch.cat(logprobs), grid=grid,
        owner=torch.tensor(owner),
    )  # fmt: skip


def _by_task(programs: Sequence[Program]) -> Iterator[list[int]]:
    """Yield the numbers of the programs of each task."""
    found: dict[str, list[int]] = {}
    for number, program in enumerate(programs):
        found.setdefault(program.task, []).append(number)
    yield from found.values()


def _pack(
    parts: Sequence[Sequence[int]], tables: Sequence[Sequence[int]], start: int, rows: Sequence[int]
) -> PackedBatch:
    """Lay out sequences that all begin at one position."""

    def ints(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    lengths = [len(part) for part in parts]
    return PackedBatch(
        token_ids=ints([token_id for part in parts for token_id in part]),
        positions=ints([start + i for length in lengths for i in range(length)]),
        query_starts=ints([0, *torch.tensor(lengths).cumsum(0).tolist()]),
        context_lens=ints([start + length for length in lengths]),
        block_tables=torch.tensor([list(table) for table in tables], dtype=torch.int32),
        output_rows=ints(rows),
    )


def advantages(programs: Sequence[Program], k: int) -> Tensor:
    """Return (N,) how much better each program did than the others of its task.

    Weighted by k (1 - p) ** (k - 1), divided by the standard deviation over the programs of tasks
    that tell anything; 0 for programs of the other tasks.

    Raises:
        AdapterError: no task has programs that passed and programs that failed.
    """
    found = torch.zeros(len(programs))
    for numbers in _by_task(programs):
        passed = [programs[number].passed for number in numbers]
        total, right = len(passed), sum(passed)
        if 0 < right < total:
            weight = k * (1 - right / total) ** (k - 1)
            for number, is_right in zip(numbers, passed, strict=True):
                others = (right - is_right) / (total - 1)
                found[number] = weight * (is_right - others)
    telling = found[found != 0]
    if not len(telling):
        raise AdapterError(
            "no task has programs that passed and programs that failed: nothing can be learned"
        )
    return found / telling.square().mean().sqrt()


def train_head(
    programs: Sequence[Program],
    readings: Readings,
    config: HeadConfig,
    training: HeadTraining,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> HeadResult:
    """Train a head on what a model says of programs.

    Raises:
        AdapterError: the programs tell nothing, or were drawn outside of the head's bounds.
    """
    if not config.least < training.drawn_at < config.most:
        raise AdapterError(
            f"the programs were drawn at {training.drawn_at:g}, which must be between the least "
            f"and the largest temperature, {config.least:g} and {config.most:g}"
        )
    worth = advantages(programs, training.k)
    generator = torch.Generator().manual_seed(training.seed)
    is_held = _hold_out(programs, worth, training, generator)
    telling = worth[readings.owner] != 0
    states = readings.states[telling].float()
    owner, logprobs = readings.owner[telling], readings.logprobs[telling]
    worth_of_token, held = worth[owner], is_held[owner]
    centre, scale = states.mean(0), states.std(0).clamp_min(1e-6)
    inputs = ((states - centre) / scale).clamp(-_LARGEST, _LARGEST)
    width = states.shape[1]
    first = (
        torch.randn(config.width, width, generator=generator) / math.sqrt(width)
    ).requires_grad_()
    bias = torch.zeros(config.width, requires_grad=True)
    second = torch.zeros(config.width, requires_grad=True)
    share = (training.drawn_at - config.least) / (config.most - config.least)
    offset = torch.tensor(math.log(share / (1 - share)), requires_grad=True)
    old = _at(readings.grid, logprobs, torch.full((len(logprobs),), training.drawn_at))

    def objective(temperatures: Tensor) -> Tensor:
        ratio = (_at(readings.grid, logprobs, temperatures) - old).exp()
        clipped = ratio.clamp(1 - training.clip, 1 + training.clip)
        return torch.minimum(ratio * worth_of_token, clipped * worth_of_token) - worth_of_token

    def folded() -> TemperatureHead:
        with torch.no_grad():
            matrix = first / scale
            return TemperatureHead(
                config=config, first=matrix.clone(), bias=bias - matrix @ centre,
                second=second.clone(), offset=offset.clone(),
            )  # fmt: skip

    optimiser = torch.optim.AdamW(
        [
            {"params": [first, second], "weight_decay": training.weight_decay},
            {"params": [bias, offset], "weight_decay": 0.0},
        ],
        lr=training.learning_rate,
    )
    plain = TemperatureHead(config=config, first=first, bias=bias, second=second, offset=offset)
    best = (0.0, 0, 0.0, folded())
    for epoch in range(1, training.epochs + 1):
        optimiser.zero_grad()
        gains = objective(plain.temperatures(inputs))
        (-gains[~held].mean()).backward()
        optimiser.step()
        with torch.no_grad():
            gains = objective(plain.temperatures(inputs))
            seen = float(gains[~held].mean())
            unseen = float(gains[held].mean()) if held.any() else seen
        if unseen > best[0]:
            best = (unseen, epoch, seen, folded())
        progress(1)
    held_out_gain, epoch, gain, head = best
    return HeadResult(
        head=head, epoch=epoch, gain=gain, held_out_gain=held_out_gain,
        temperatures=head.temperatures(readings.states.float()),
        num_tasks=len({programs[i].task for i in range(len(programs)) if worth[i]}),
    )  # fmt: skip


def _hold_out(
    programs: Sequence[Program], worth: Tensor, training: HeadTraining, generator: torch.Generator
) -> Tensor:
    """Return (N,) whether each program's task is held out: a share of those that tell anything."""
    tasks = list(
        dict.fromkeys(p.task for p, of in zip(programs, worth.tolist(), strict=True) if of)
    )
    count = int(len(tasks) * training.held_out)
    order = torch.randperm(len(tasks), generator=generator).tolist()
    held = {tasks[i] for i in order[:count]}
    return torch.tensor([program.task in held for program in programs])


def _at(grid: Tensor, table: Tensor, temperatures: Tensor) -> Tensor:
    """Return (T,) the values of a (T, G) table at temperatures between those of the grid."""
    upper = torch.searchsorted(grid, temperatures.detach().contiguous()).clamp(1, len(grid) - 1)
    low, high = grid[upper - 1], grid[upper]
    share = ((temperatures - low) / (high - low)).clamp(0, 1)
    before = table.gather(1, (upper - 1)[:, None])[:, 0]
    after = table.gather(1, upper[:, None])[:, 0]
    return before + share * (after - before)
