"""Plan first: a plan in words, then code."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from decoding.automaton import MAX_STATES, Automaton
from decoding.options import ParameterError, check_options, option
from decoding.spread import Spread
from decoding.strategies.base import CheckedStrategy, PlainController
from decoding.strategies.shaping import Shape, ShapedText
from decoding.tables import TOKEN_CLASSES, TokenTables

# Above any logit, and far from the largest float.
_FORCED = 1e9
# Tokens that a plan may go on for until its line ends.
_OVERTIME = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanFirst(CheckedStrategy):
    """Let the model write a plan in words before the code, each at a temperature of its own.

    The answer begins with the opening, whatever the model would say. The plan ends where the model
    opens a fence itself, or with the line in which its tokens run out; then the closing stands. The
    rest of the answer is drawn at the request's temperature. Both parts are in the answer and, by
    name, in its trace. A plan does not end the answer: special tokens are held back in it. At
    temperature 0 both parts are greedy.
    """

    name: ClassVar[str] = "plan_first"

    temperature: float = option(
        0.7,
        "Temperature of the plan.",
        "number",
        minimum=0.0,
        maximum=2.0,
        is_minimum_excluded=True,
    )
    tokens: int = option(
        96, "Tokens of the plan, the line that they end in left out.", "integer", minimum=1,
        maximum=128,
    )  # fmt: skip
    opening: tuple[str, ...] = option(
        ("Plan:\n1.",),
        "Texts that the answer begins with, one after the other.",
        "strings",
        max_items=8,
        max_chars=64,
    )
    closing: tuple[str, ...] = option(
        ("\n```python\n",),
        "Texts between plan and code, one after the other.",
        "strings",
        max_items=8,
        max_chars=64,
    )

    def __post_init__(self) -> None:
        check_options(self, prefix="decoding.")
        # A token has a byte at least, so there are states enough whatever the vocabulary.
        for name, others in (("opening", 0), ("closing", _size(self.opening))):
            most = MAX_STATES - 1 - _OVERTIME - self.tokens - others
            if _size(getattr(self, name)) > most:
                raise ParameterError(
                    f"decoding.{name} must be at most {most} bytes beside the other fields, got "
                    f"{_size(getattr(self, name))}",
                    param=f"decoding.{name}",
                )

    def bind(self, tables: TokenTables) -> "PlanController":
        """Return the controller for a vocabulary.

        Raises:
            ParameterError: the vocabulary cannot spell a text.
        """
        opening = _spell(tables, "".join(self.opening), "opening")
        closing = _spell(tables, "".join(self.closing), "closing")
        return PlanController(self, tables, opening, closing)


class PlanController(PlainController):
    """See `PlanFirst`. States: the opening's tokens, the plan's, the closing's, and the code."""

    def __init__(
        self,
        strategy: PlanFirst,
        tables: TokenTables,
        opening: Sequence[int],
        closing: Sequence[int],
    ) -> None:
        first = len(opening)
        self._last = first + strategy.tokens + _OVERTIME
        code = self._last + len(closing)
        forced = dict(enumerate(opening)) | dict(enumerate(closing, start=self._last))
        self._plan = range(first, self._last)
        specials = torch.nonzero(tables.classes == TOKEN_CLASSES.index("K"))[:, 0]
        self._temperature = strategy.temperature
        self.shaper = _Shaper(forced, self._plan, specials)
        self.stages = ["plan" if state < self._last else "code" for state in range(code + 1)]
        self.automaton = self._build(tables, first + strategy.tokens, code)

    def _build(self, tables: TokenTables, end: int, code: int) -> Automaton:
        """Return the automaton: every token counts; line ends and fences may end the plan."""
        on = [min(state + 1, code) for state in range(code + 1)]
        at_line_end = [
            self._last if state in self._plan and state + 1 >= end else following
            for state, following in enumerate(on)
        ]
        at_fence = [
            code if state in self._plan else following for state, following in enumerate(on)
        ]
        functions = [
            bytes(at_fence if b"ttt" in shape else at_line_end if b"n" in shape else on)
            for shape in tables.shapes
        ]
        return Automaton(functions, tables.shape_ids)

    def temperatures(self, states: Tensor | None, base: Tensor, spread: Spread | None) -> Tensor:
        """Return the temperature for the next token of each row, see `Controller`."""
        assert states is not None
        return torch.where(states < self._last, torch.full_like(base, self._temperature), base)


class _Shaper:
    shapes_greedy = True
    learn = None

    def __init__(self, forced: dict[int, int], plan: range, specials: Tensor) -> None:
        self._forced = forced
        self._plan = plan
        self._specials = specials

    def shape(self, logits: Tensor, text: ShapedText, temperature: float) -> Shape:
        forced = self._forced.get(text.state)
        if forced is not None:
            return Shape(bias=(torch.tensor([forced]), torch.tensor([_FORCED])))
        if text.state in self._plan:
            return Shape(banned=self._specials)
        return Shape()


def _size(texts: Sequence[str]) -> int:
    return len("".join(texts).encode())


def _spell(tables: TokenTables, text: str, field: str) -> list[int]:
    """Return tokens whose texts, one after the other, are a text: the longest first."""
    rest, found = text.encode(), []
    by_text: dict[bytes, int] = {}
    for token_id, of in enumerate(tables.texts):
        if of and of in rest:
            by_text.setdefault(of, token_id)
    while rest:
        token = max((of for of in by_text if rest.startswith(of)), key=len, default=None)
        if token is None:
            raise ParameterError(
                f"decoding.{field}: the model has no token for {text!r}", param=f"decoding.{field}"
            )
        found.append(by_text[token])
        rest = rest[len(token) :]
    return found
