"""What a server tries out: experiments, their arms, and who gets which."""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Unit = Literal["user", "conversation", "request", "paired"]
UNITS: tuple[Unit, ...] = ("user", "conversation", "request", "paired")
MAX_EXPERIMENTS, MAX_ARMS = 100, 16

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
_OWN = ("label", "model", "weight")


class PlanError(ValueError):
    """An experiment is not what it must be; the message names it, the field and the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExperimentArm:
    """One of the things that are tried.

    Attributes:
        label: of it, unique in its experiment.
        model: model id.
        fields: of requests, which win over a request's own.
        weight: share of the units that get it is this by the sum of all.
    """

    label: str
    model: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """Arms that are tried against each other on what clients ask.

    Attributes:
        name: the model id that clients ask for.
        arms: at least two; the first is what the others are held against.
        unit: what keeps its arm: a user, a conversation, or nothing (each request is its own);
            `paired`: everybody gets all arms, through /v1/compare.
    """

    name: str
    arms: tuple[ExperimentArm, ...]
    unit: Unit = "user"

    def assign(self, unit: str) -> ExperimentArm:
        """Return the arm of a unit: always the same, and nobody else's business.

        Args:
            unit: what tells it from others.
        """
        digest = hashlib.sha256(f"{self.name}\0{unit}".encode(errors="surrogatepass")).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64 * sum(arm.weight for arm in self.arms)
        for arm in self.arms:
            place -= arm.weight
            if place < 0:
                return arm
        return next(arm for arm in reversed(self.arms) if arm.weight)


def parse_experiments(content: object) -> tuple[Experiment, ...]:
    """Return the experiments of a configuration.

    Args:
        content: a list of objects with `name`, `arms` and perhaps `unit`; an arm has `model` and
            perhaps `label`, `weight` and any fields of requests.

    Raises:
        PlanError: something is missing, unknown, out of range, or there twice.
    """
    if not isinstance(content, list) or not content:
        raise PlanError("experiments must be a list of at least one")
    if len(content) > MAX_EXPERIMENTS:
        raise PlanError(f"experiments must be at most {MAX_EXPERIMENTS}, got {len(content)}")
    found = tuple(_parse(entry, f"experiments[{index}]") for index, entry in enumerate(content))
    names = [experiment.name for experiment in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise PlanError(f"experiments: two are named {twice[0]!r}")
    return found


def _parse(entry: object, place: str) -> Experiment:
    if not isinstance(entry, dict):
        raise PlanError(f"{place} must be an object, got {entry!r}")
    if unknown := sorted(map(str, entry.keys() - {"name", "arms", "unit"})):
        raise PlanError(f"{place}.{unknown[0]} is unknown; it has name, unit and arms")
    name, unit, arms = entry.get("name"), entry.get("unit", "user"), entry.get("arms")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise PlanError(f"{place}.name must be letters, digits, '.', '_' and '-', got {name!r}")
    if unit not in UNITS:
        raise PlanError(f"{place}.unit must be one of {', '.join(UNITS)}, got {unit!r}")
    if not isinstance(arms, list) or not 2 <= len(arms) <= MAX_ARMS:
        raise PlanError(f"{place}.arms must be a list of 2 to {MAX_ARMS}")
    parsed = tuple(_parse_arm(arm, f"{place}.arms[{i}]") for i, arm in enumerate(arms))
    labels = [arm.label for arm in parsed]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise PlanError(f"{place}.arms: two are labelled {twice[0]!r}; give labels")
    if not sum(arm.weight for arm in parsed):
        raise PlanError(f"{place}.arms: their weights sum to 0")
    return Experiment(name=name, arms=parsed, unit=unit)


def _parse_arm(entry: object, place: str) -> ExperimentArm:
    if not isinstance(entry, dict) or not all(isinstance(name, str) for name in entry):
        raise PlanError(f"{place} must be an object, got {entry!r}")
    model, label = entry.get("model"), entry.get("label", entry.get("model"))
    for name, value in (("model", model), ("label", label)):
        if not isinstance(value, str) or not 1 <= len(value) <= 128 or not value.isprintable():
            raise PlanError(f"{place}.{name} must be a text of 1 to 128 characters, got {value!r}")
    # It goes into a header.
    if not str(label).isascii():
        raise PlanError(f"{place}.label must be ASCII, got {label!r}")
    weight = entry.get("weight", 1.0)
    if (
        isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or not 0 <= weight <= 1e6
        or not math.isfinite(weight)
    ):
        raise PlanError(f"{place}.weight must be a number from 0 to 1e6, got {weight!r}")
    fields = {name: value for name, value in entry.items() if name not in _OWN}
    return ExperimentArm(label=str(label), model=str(model), fields=fields, weight=float(weight))
