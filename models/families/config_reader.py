"""Typed reading of a parsed config.json, with the family's documented defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from models.families.errors import CheckpointError


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigReader:
    """A config.json over a family's defaults.

    Attributes:
        values: the parsed config.json.
        defaults: what the family documents for the fields that config.json leaves out.
    """

    values: Mapping[str, object]
    defaults: Mapping[str, object] = field(default_factory=dict)

    def get(self, name: str) -> object:
        """Return a field as stored; a missing one or null gives the default."""
        value = self.values.get(name)
        return self.defaults.get(name) if value is None else value

    def integer(self, name: str, *, minimum: int = 1) -> int:
        """Return a whole number that is at least `minimum`.

        Raises:
            CheckpointError: the field is missing, of another type or too small.
        """
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise CheckpointError(
                f"config.json: {name} must be an integer >= {minimum}, got {value!r}"
            )
        return value

    def number(self, name: str) -> float:
        """Return a positive finite number.

        Raises:
            CheckpointError: the field is missing, of another type, or not in (0, inf).
        """
        return positive_number(self.get(name), name)

    def flag(self, name: str) -> bool:
        """Return a boolean; a missing field without default is False.

        Raises:
            CheckpointError: the field has another type.
        """
        value = self.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {name} must be true or false, got {value!r}")
        return value


def positive_number(value: object, name: str) -> float:
    """Return `value` as a float in (0, inf).

    Raises:
        CheckpointError: it is none.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < float(value) < float("inf"):  # type: ignore[arg-type]
        raise CheckpointError(f"config.json: {name} must be a positive number, got {value!r}")
    return float(value)  # type: ignore[arg-type]
