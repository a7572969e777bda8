"""What is known of a comparison that was answered: its arms. No prompts and no answers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

TIE: Literal["tie"] = "tie"
BOTH_BAD: Literal["both_bad"] = "both_bad"

# The index of the arm that is better, or a word.
Vote = int | Literal["tie", "both_bad"]


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class ArmIdentity:
    """An arm as votes know it; equal ones are counted together.

    Attributes:
        label: what the client called it.
        model: model id.
        fields: the sampling fields that were set for it, as canonical JSON of an object.
    """

    label: str
    model: str
    fields: str = "{}"

    def describe(self) -> dict[str, Any]:
        """Return label, model and fields as one object."""
        return {"label": self.label, "model": self.model, **json.loads(self.fields)}


def build_identity(label: str, model: str, *, fields: Mapping[str, Any]) -> ArmIdentity:
    """Return the identity of an arm.

    Args:
        label: what the client called it.
        model: model id.
        fields: sampling fields. Those that are None or empty count as not set, and a whole number
            is the same with and without a fraction of zero.
    """
    return ArmIdentity(label=label, model=model, fields=encode_canonical(_simplify(fields)))


def encode_canonical(value: object) -> str:
    """Return JSON that is equal for equal values."""
    return json.dumps(
        value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")
    )


def _simplify(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list | tuple):
        return [_simplify(item) for item in value]
    if isinstance(value, Mapping):
        simple = {str(key): _simplify(item) for key, item in value.items()}
        return {key: item for key, item in simple.items() if item not in (None, [], {})}
    return value


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A comparison that was answered.

    Attributes:
        id: as the client got it.
        created: Unix time, in seconds.
        arms: in the order of their indices.
    """

    id: str
    created: int
    arms: tuple[ArmIdentity, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ballots:
    """Equal votes on comparisons of equal arms.

    Attributes:
        arms: of each of the comparisons.
        vote: on each of them.
        count: how many there are, at least 1.
    """

    arms: tuple[ArmIdentity, ...]
    vote: Vote
    count: int
