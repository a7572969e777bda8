"""AdapT: a higher temperature where a line of code begins."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from decoding.automaton import Automaton
from decoding.lines import LINE_STATES, STATE_INDEX, LineState, Place
from decoding.options import ParameterError, check_options, option, options_of
from decoding.spread import Spread
from decoding.strategies.base import CheckedStrategy, PlainController
from decoding.tables import TokenTables

Policy = Literal["line_initial", "block_initial", "reference"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapt(CheckedStrategy):
    """Draw hard tokens, those that begin an indented line, at `a` and all others at `b`.

    The request's `temperature` has no part in it, except that 0 stays greedy, as in the authors'
    program. With a == b this is plain sampling at that temperature. The defaults are the pair that
    the authors' analysis of HumanEval uses.

    Source: Zhu et al., "Hot or Cold? Adaptive Temperature Sampling for Code Generation with Large
    Language Models", AAAI 2024, and the released program (policy `reference`).
    """

    name: ClassVar[str] = "adapt"

    policy: Policy = option(
        "line_initial",
        "Which tokens are hot: the first text of an indented line (line_initial), the same only "
        "after a line that opens a block (block_initial), or the authors' rule on token ids "
        "(reference).",
        "choice",
        choices=("line_initial", "block_initial", "reference"),
    )
    a: float = option(
        0.8,
        "Temperature of hot tokens, at least b.",
        "number",
        minimum=0.0,
        maximum=2.0,
        is_minimum_excluded=True,
    )
    b: float = option(
        0.3,
        "Temperature of all other tokens.",
        "number",
        minimum=0.0,
        maximum=2.0,
        is_minimum_excluded=True,
    )
    column0: bool = option(
        False, "The token right after a newline is hot too: indentation, top-level code.", "boolean"
    )
    first: bool = option(
        False,
        "The first generated token is hot too, and begins a line: for answers that are only code. "
        "With fences_only it is hot only inside a fence.",
        "boolean",
    )
    fences_only: bool = option(
        False,
        "Tokens are hot only inside Markdown fences (lines that begin with three backticks).",
        "boolean",
    )
    bracket_openers: bool = option(
        False, "With block_initial, '(' and '[' open a block like ':' and '{'.", "boolean"
    )
    newline_token_ids: tuple[int, ...] = option(
        (198,), "With reference, the ids that are a newline; default: CodeGeeX's.", "token_ids"
    )
    indent_token_ids: tuple[int, ...] = option(
        (197, 50268),
        "With reference, the ids that are one level of indent; default: CodeGeeX's.",
        "token_ids",
    )

    def __post_init__(self) -> None:
        check_options(self, prefix="decoding.")
        if self.b > self.a:
            raise ParameterError(
                f"decoding.b must be at most decoding.a ({self.a:g}), got {self.b:g}",
                param="decoding.b",
            )
        for field, policies in _POLICIES_OF.items():
            default = options_of(type(self))[field][1]
            if self.policy not in policies and getattr(self, field) != default:
                raise ParameterError(
                    f"decoding.{field} has no meaning with policy {self.policy!r}; it goes with "
                    + " and ".join(map(repr, policies)),
                    param=f"decoding.{field}",
                )

    def token_ids(self) -> Mapping[str, tuple[int, ...]]:
        """Return the token ids among the parameters, see `Strategy`."""
        if self.policy != "reference":
            return {}
        return {
            "newline_token_ids": self.newline_token_ids,
            "indent_token_ids": self.indent_token_ids,
        }

    def bind(self, tables: TokenTables) -> "AdaptController":
        """Return the controller for a vocabulary."""
        if self.policy == "reference":
            return _bind_reference(self, tables.vocab_size)
        return _bind_lines(self, tables)


_LINE_POLICIES = ("line_initial", "block_initial")
_POLICIES_OF: dict[str, tuple[str, ...]] = {
    "column0": _LINE_POLICIES,
    "first": _LINE_POLICIES,
    "fences_only": _LINE_POLICIES,
    "bracket_openers": ("block_initial",),
    "newline_token_ids": ("reference",),
    "indent_token_ids": ("reference",),
}


class AdaptController(PlainController):
    """See `Adapt`."""

    def __init__(
        self,
        automaton: Automaton,
        temperature_of_state: Sequence[float | None],
        *,
        template_state: int,
        prompt_state: int,
        max_prompt_tokens: int | None,
        first_states: Sequence[int] | None,
    ) -> None:
        """Hold the tables.

        Args:
            automaton: advances the state.
            temperature_of_state: temperature in each state; None is the request's own.
            template_state: state after a chat template.
            prompt_state: state before the part of another prompt that is read.
            max_prompt_tokens: how many tokens from the prompt's end are read; None reads all.
            first_states: state that replaces each state for the first generated token.
        """
        self.automaton = automaton
        self._has_base = any(value is None for value in temperature_of_state)
        table = [0.0 if value is None else value for value in temperature_of_state]
        self._table = torch.tensor(table, dtype=torch.float32)
        self._template_state = template_state
        self._prompt_state = prompt_state
        self._max_prompt_tokens = max_prompt_tokens
        self._first_states = first_states

    def start(self, prompt_token_ids: Sequence[int], *, prompt_is_template: bool) -> int:
        """Return the state for the first generated token, see `Controller`."""
        if prompt_is_template:
            state = self._template_state
        else:
            kept = self._max_prompt_tokens
            tail = prompt_token_ids if kept is None else prompt_token_ids[-kept:]
            assert self.automaton is not None
            state = self.automaton.run(self._prompt_state, tail)
        return state if self._first_states is None else self._first_states[state]

    def temperatures(self, states: Tensor | None, base: Tensor, spread: Spread | None) -> Tensor:
        assert states is not None
        values = self._table[states]
        return torch.where(values == 0.0, base, values) if self._has_base else values


def _bind_lines(strategy: Adapt, tables: TokenTables) -> AdaptController:
    automaton = tables.line_automaton(is_bracket_opener=strategy.bracket_openers)
    hot = [_is_hot(strategy, state) for state in LINE_STATES]
    first = [not strategy.fences_only or state.in_fence for state in LINE_STATES]
    text_start = Place.L0 if strategy.first else Place.IN
    return AdaptController(
        automaton,
        [strategy.a if is_hot else strategy.b for is_hot in hot + first],
        template_state=STATE_INDEX[LineState(place=text_start)],
        prompt_state=STATE_INDEX[LineState()],
        max_prompt_tokens=None,
        first_states=range(len(hot), 2 * len(hot)) if strategy.first else None,
    )


def _is_hot(strategy: Adapt, state: LineState) -> bool:
    if strategy.fences_only and not state.in_fence:
        return False
    if state.place is Place.L0:
        return strategy.column0
    is_block = strategy.policy != "block_initial" or state.was_opened
    return state.place is Place.L1 and is_block


# The authors' program keeps a counter and a temperature that an indent may leave as it was. Only
# "is the counter 1" is ever asked, so it saturates at 2.
_LEVELS = ("base", "b", "a")
_REFERENCE_STATES = [(level, position) for level in _LEVELS for position in range(3)]


def _bind_reference(strategy: Adapt, vocab_size: int) -> AdaptController:
    index_of = {state: index for index, state in enumerate(_REFERENCE_STATES)}

    def function(steps: Iterable[tuple[str, int]]) -> bytes:
        return bytes(index_of[state] for state in steps)

    functions = [
        function(("b", min(position + 1, 2)) for _, position in _REFERENCE_STATES),
        function(("b", 1) for _ in _REFERENCE_STATES),
        function(("a" if pos == 1 else level, pos) for level, pos in _REFERENCE_STATES),
    ]
    function_of_token = [0] * vocab_size
    for symbol, token_ids in ((2, strategy.indent_token_ids), (1, strategy.newline_token_ids)):
        for token_id in token_ids:
            function_of_token[token_id] = symbol
    temperatures = {"base": None, "b": strategy.b, "a": strategy.a}
    return AdaptController(
        Automaton(functions, function_of_token),
        [temperatures[level] for level, _ in _REFERENCE_STATES],
        template_state=index_of["b", 2],
        prompt_state=index_of["base", 0],
        max_prompt_tokens=1,
        first_states=None,
    )
