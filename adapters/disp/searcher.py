"""One step of a search, and its evaluation.

Masks are *drawn*, by chance, to learn from, or *chosen*, without it: the channels that would be
materialised now. What masks *keep* is a share of the parameters of the linears.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.disp.budget import kept_share, ratio_penalty
from adapters.disp.estimators import TEMPERATURE, draw_masks
from adapters.disp.hypernetwork import Hypernetwork, head_start
from adapters.disp.masked import MaskedDecoder, Masks
from adapters.disp.materialize import aligned_widths, choose_channels
from adapters.disp.search_config import SearchConfig
from adapters.disp.structures import Structures
from adapters.training_state import TrainingError, load_optimizer_tensors, optimizer_tensors
from models.pruning import MODULES, Selections, widths_of

_BETAS = (0.9, 0.999)
_LARGEST_SHIFT = 0.1  # a step; larger ones would drop channels before anything is known of them
_HALVINGS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step did.

    Attributes:
        loss: mean cross entropy of the masked base, in nats.
        penalty: what the distance from the target added to it.
        kept_drawn: what the drawn masks keep, on the average.
        kept: what the chosen masks keep.
        widths: share of its channels that each of `MODULES` keeps, on the average over layers.
        gradient_norm: before clipping.
        num_tokens: computed.
    """

    loss: float
    penalty: float
    kept_drawn: float
    kept: float
    widths: tuple[float, ...]
    gradient_norm: float
    num_tokens: int


class Searcher:
    """A hypernetwork, its optimiser, and the base that its masks are tried on.

    The penalty looks at the T of the chosen masks, with the gradient of the drawn ones: the two
    differ by a few per cent while probabilities are not yet near 0 or 1. No weight of a penalty
    suits every share: T lags while channels still have far to go, then overshoots, and channels
    that are surely dropped have no gradient to come back by. So each step also moves the offset of
    all logits to where T meets the target, which is the bias that the penalty would have to learn.

    Once widths are fixed, each structure's own offset keeps its width, and steps only exchange
    channels: what rounding a width to a multiple of 64 costs is learnt away before the end.

    Args:
        base: frozen.
        config: options.

    Attributes:
        counts: how many channels each structure keeps; None: that is still free.
    """

    def __init__(self, base: MaskedDecoder, config: SearchConfig) -> None:
        self._base, self._config, self.spec = base, config, base.spec
        self.structures = Structures(base.spec, config.residual)
        self.network = Hypernetwork(self.structures.widths, seed=config.seed).to(base.device)
        self.counts: tuple[int, ...] | None = None
        self._parameters = list(self.network.parameters())
        self.optimizer = torch.optim.AdamW(
            self._parameters, lr=config.learning_rate, betas=_BETAS,
            weight_decay=config.weight_decay, fused=True,
        )  # fmt: skip

    def give_head_start(self, windows: Tensor) -> None:
        """Let channels that matter more, for the parameters they take, be dropped later.

        Without it, what is dropped first is dropped by chance: near 1, a mask's gradient is next to
        nothing, and the loss never quite recovers from the few channels that carry most. How much
        the loss depends on a channel is its Fisher information, taken token by token.

        Args:
            windows: (n, length + 1) int64, n > 0.
        """
        total = torch.zeros(sum(self.structures.widths), device=self._base.device)
        for part in windows.split(self._config.batch_size):
            total += self.structures.join(self._base.squared_gradients(part))
        costs = self.structures.costs(self.spec).to(self._base.device)
        self.network.head_start.copy_(head_start(total, costs))

    def step(
        self, windows: Tensor, generator: torch.Generator, *, target: float, rate_factor: float
    ) -> StepResult:
        """Learn from windows of text, with masks drawn for each stretch of each.

        Args:
            windows: (B, length + 1) int64.
            generator: draws the masks.
            target: share of the linears' parameters to keep.
            rate_factor: of the learning rate.

        Raises:
            TrainingError: the loss or the gradient is not finite; nothing was changed.
        """
        config = self._config
        logits = self.network()
        drawn, counted = draw_masks(
            logits, len(windows) * config.draws, config.estimator, generator
        )
        loss = self._base.loss(windows, self.structures.split(drawn))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(f"the loss is {value}")
        kept_drawn = kept_share(self.spec, self.structures.count(counted))
        chosen = self.structures.count(self._choose(logits))
        kept = kept_share(self.spec, chosen)
        pulled = kept_drawn + (kept - kept_drawn).detach()
        penalty = ratio_penalty(pulled, target, config.penalty).mean()
        self.optimizer.zero_grad()
        (loss + penalty).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, config.clip))
        if not math.isfinite(norm):
            raise TrainingError(f"the norm of the gradient is {norm}")
        self.optimizer.param_groups[0]["lr"] = config.learning_rate * rate_factor
        self.optimizer.step()
        if self.counts is None:
            self._shift(target)
        else:
            self._hold()
        counts = torch.stack([torch.stack(layer) for layer in chosen]).cpu()
        shares = (counts / torch.tensor(widths_of(self.spec))).mean(0)
        return StepResult(
            loss=value, penalty=float(penalty.detach()),
            kept_drawn=float(kept_drawn.detach().mean()), kept=float(kept),
            widths=tuple(shares.tolist()), gradient_norm=norm, num_tokens=windows[:, 1:].numel(),
        )  # fmt: skip

    @torch.no_grad()
    def _shift(self, target: float) -> None:
        """Move the offset of all logits towards where T meets the target, a little at a time."""
        logits, low, high = self.network(), -_LARGEST_SHIFT, _LARGEST_SHIFT
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            kept = self._kept_by(self.structures.threshold(logits + middle / TEMPERATURE))
            low, high = (low, middle) if kept > target else (middle, high)
        self.network.offset += (low + high) / 2

    @torch.no_grad()
    def fix_widths(self, keep: float) -> None:
        """Keep as many channels as now from here on, in aligned widths that meet a share."""
        self.counts = aligned_widths(
            self.network(), self.spec, self.structures, keep=keep, align=self._config.align
        )
        self._hold()

    def free_widths(self) -> None:
        """Let the widths move again, from where they are."""
        self.counts = None

    @torch.no_grad()
    def _hold(self) -> None:
        """Move each structure's offset so that as many of its logits are above 0 as it keeps."""
        assert self.counts is not None
        parts = self.network().split(self.structures.widths)
        for i, (part, count) in enumerate(zip(parts, self.counts, strict=True)):
            ranked = part.sort(descending=True).values
            if count < len(part):
                self.network.offset[i] -= (ranked[count - 1] + ranked[count]) / 2 * TEMPERATURE
            elif ranked[-1] <= 0:
                self.network.offset[i] += _LARGEST_SHIFT - ranked[-1] * TEMPERATURE

    @torch.no_grad()
    def selections(self) -> Selections:
        """Return the channels to keep, in the widths that are fixed."""
        assert self.counts is not None
        return choose_channels(self.network(), self.structures, self.counts)

    @torch.no_grad()
    def kept(self) -> float:
        """Return what the chosen masks keep."""
        return self._kept_by(self._choose(self.network()))

    def _kept_by(self, masks: Tensor) -> float:
        return float(kept_share(self.spec, self.structures.count(masks)))

    def _choose(self, logits: Tensor) -> Tensor:
        """Return the (N,) chosen masks."""
        if self.counts is None:
            return self.structures.threshold(logits)
        return self.structures.best(logits.detach(), self.counts)

    @torch.no_grad()
    def evaluate(self, windows: Tensor, selections: Selections | None = None) -> float:
        """Return the mean cross entropy of (n, length + 1) windows, n > 0.

        Args:
            windows: of text.
            selections: channels to keep; None: the chosen masks.
        """
        masks: Masks
        if selections is None:
            masks = self.structures.split(self._choose(self.network()))
        else:
            masks = selection_masks(selections, widths_of(self.spec), self._base.device)
        return mean_loss(self._base, windows, self._config.batch_size, masks)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return parameters, fixed inputs and optimiser state by name; all are needed to go on."""
        tensors = {f"network.{name}": tensor for name, tensor in self.network.named_state()}
        if self.counts is not None:
            tensors["counts"] = torch.tensor(self.counts)
        return tensors | optimizer_tensors(self.optimizer, self.network)

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state_tensors` returned."""
        for name, tensor in self.network.named_state():
            tensor.copy_(tensors[f"network.{name}"])
        self.counts = tuple(tensors["counts"].tolist()) if "counts" in tensors else None
        load_optimizer_tensors(self.optimizer, self.network, tensors)


def mean_loss(
    base: MaskedDecoder, windows: Tensor, batch_size: int, masks: Masks | None = None
) -> float:
    """Return the mean cross entropy of (n, S + 1) windows, n > 0, some at a time."""
    with torch.no_grad():
        losses = [float(base.loss(part, masks)) * len(part) for part in windows.split(batch_size)]
    return sum(losses) / len(windows)


def selection_masks(
    selections: Selections, widths: tuple[tuple[int, ...], ...], device: torch.device
) -> Masks:
    """Return masks of ones at the selected channels, for each layer in the order of `MODULES`."""
    return [
        [
            torch.zeros(width, device=device).index_fill_(
                0, torch.tensor(getattr(layer, module), device=device), 1.0
            )
            for module, width in zip(MODULES, full, strict=True)
        ]
        for layer, full in zip(selections, widths, strict=True)
    ]
