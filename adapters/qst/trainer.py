"""One step of training a side network, and its evaluation."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.frozen_head import FrozenHead, head_loss, perplexity
from adapters.precision import resolve_dtype
from adapters.qst.base_states import BaseStates
from adapters.qst.examples import Example, TrainingBatch, pack_examples
from adapters.qst.forward import ForkForward, NarrowForward, States
from adapters.qst.network import FLOAT32_TENSORS, QstNetwork
from adapters.qst.training_config import TrainingConfig
from adapters.training_state import TrainingError, load_optimizer_tensors, optimizer_tensors
from models.decoder import Decoder

_BETAS = (0.9, 0.999)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step did.

    Attributes:
        loss: mean over the step's targets, in nats.
        gradient_norm: before clipping.
        num_tokens: computed.
    """

    loss: float
    gradient_norm: float
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Results on held-out examples.

    Attributes:
        loss: mean over targets, in nats.
        base_loss: the same of the base alone; None if it was not asked for or has none.
        accuracy: share of examples whose class is right; None for language models.
    """

    loss: float
    base_loss: float | None = None
    accuracy: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)


class Trainer:
    """A side network, its optimiser, and the base that it reads.

    Args:
        decoder: the base.
        network: what is trained, on the decoder's device.
        head: the base's LM head; None for classification.
        config: options.
        state_folder, base: of `BaseStates`.
    """

    def __init__(
        self,
        decoder: Decoder,
        network: QstNetwork,
        head: FrozenHead | None,
        config: TrainingConfig,
        *,
        state_folder: Path | None = None,
        base: str = "",
    ) -> None:
        self.network = network
        self._head, self._config = head, config
        self.device = next(network.parameters()).device
        self._dtype = resolve_dtype(config.compute_dtype, self.device)
        self._parameters = list(network.parameters())
        self.states = BaseStates(
            decoder, self.device, first=network.first_state, folder=state_folder, base=base
        )
        forward = ForkForward if network.is_fork else NarrowForward
        self._forward: ForkForward | NarrowForward = forward(
            decoder, self.states, network, self._precision
        )
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(network, config), betas=_BETAS, fused=True
        )
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    def step(self, batches: Sequence[Sequence[Example]], rate_factor: float) -> StepResult:
        """Learn from some batches together: the mean is over all their targets.

        Args:
            batches: sequences to compute together, at least one.
            rate_factor: of the learning rates.

        Raises:
            TrainingError: the loss or the gradient is not finite; nothing was changed.
        """
        num_targets = sum(example.num_targets for batch in batches for example in batch)
        total, num_tokens = 0.0, 0
        self.optimizer.zero_grad()
        for examples in batches:
            batch = pack_examples(examples)
            loss = self._loss(batch) / num_targets
            total += float(loss.detach())
            if not math.isfinite(total):
                raise TrainingError(f"the loss is {total}")
            loss.backward()
            num_tokens += len(batch.packed.token_ids)
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._config.clip))
        if not math.isfinite(norm):
            raise TrainingError(f"the norm of the gradient is {norm}")
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * rate_factor
        self.optimizer.step()
        return StepResult(loss=total, gradient_norm=norm, num_tokens=num_tokens)

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example], *, with_base: bool = False) -> Evaluation:
        """Compute the loss of held-out examples.

        Args:
            examples: at least one.
            with_base: that of the base too; the base runs once for both.
        """
        total = base_total = num_right = num_targets = 0.0
        has_base = with_base and self._head is not None
        for start in range(0, len(examples), self._config.batch_size):
            batch = pack_examples(examples[start : start + self._config.batch_size])
            states, targets = self._states(batch), batch.targets.to(self.device)
            num_targets += len(targets)
            if self._head is None:
                scores = self.network.classify(states.adapted)
                num_right += float((scores.argmax(1) == targets).sum())
                total += float(F.cross_entropy(scores, targets, reduction="sum"))
                continue
            total += float(head_loss(states.adapted, targets, self._head))
            if has_base:
                base_total += float(head_loss(states.base, targets, self._head))
        return Evaluation(
            loss=total / num_targets,
            base_loss=base_total / num_targets if has_base else None,
            accuracy=num_right / num_targets if self._head is None else None,
        )

    def _loss(self, batch: TrainingBatch) -> Tensor:
        states, targets = self._states(batch).adapted, batch.targets.to(self.device)
        if self._head is None:
            return F.cross_entropy(self.network.classify(states), targets, reduction="sum")
        return head_loss(states, targets, self._head)

    def _states(self, batch: TrainingBatch) -> States:
        return self._forward(batch, self.device)

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self._dtype == torch.bfloat16
        )

    def state_tensors(self) -> dict[str, Tensor]:
        """Return parameters and optimiser state by name; both are needed to go on."""
        parameters = {f"parameter.{n}": p.detach() for n, p in self.network.named_parameters()}
        return parameters | optimizer_tensors(self.optimizer, self.network)

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state_tensors` returned."""
        for name, parameter in self.network.named_parameters():
            parameter.copy_(tensors[f"parameter.{name}"])
        load_optimizer_tensors(self.optimizer, self.network, tensors)

    @property
    def optimizer_bytes(self) -> int:
        """Memory of the optimiser's state."""
        return sum(
            tensor.nbytes for state in self.optimizer.state.values() for tensor in state.values()
        )


def _parameter_groups(network: QstNetwork, config: TrainingConfig) -> list[dict[str, object]]:
    """Divide parameters into gates, matrices and vectors."""
    groups: dict[str, list[Tensor]] = {"gates": [], "matrices": [], "vectors": []}
    for name, parameter in network.named_parameters():
        kind = "matrices" if parameter.ndim > 1 else "vectors"
        groups["gates" if name in FLOAT32_TENSORS else kind].append(parameter)
    settings = {
        "gates": (config.alpha_learning_rate, 0.0),
        "matrices": (config.learning_rate, config.weight_decay),
        "vectors": (config.learning_rate, 0.0),
    }
    return [
        {"params": parameters, "lr": settings[kind][0], "weight_decay": settings[kind][1]}
        for kind, parameters in groups.items()
        if parameters
    ]
