"""The line state of a text: where in a line, in what block, inside a Markdown fence or not.

A state packs five facts:

- place: just after a newline (L0), after a newline and blanks (L1), or the line has text (IN);
- is_opened: the last non-blank character of the line so far opens a block;
- was_opened: the same of the last line that had text;
- ticks: backticks that begin the line, 0 to 2, or `TICKS_OVER` when the line can no longer toggle
  a fence (blanks may come before the backticks);
- in_fence: an odd number of lines so far began with three backticks.

The start of a text counts as the start of a line. In the automaton, state s + len(LINE_STATES) is
state s before the first generated token.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from decoding.automaton import MAX_STATES, compose


class Place(IntEnum):
    """Where in its line the next character goes."""

    IN = 0
    L0 = 1
    L1 = 2


TICKS_OVER = 3


class LineState(NamedTuple):
    """One state of the line automaton, see the module's docstring."""

    place: Place = Place.L0
    is_opened: bool = False
    was_opened: bool = False
    ticks: int = 0
    in_fence: bool = False


LINE_STATES = tuple(
    LineState(place, is_opened, was_opened, ticks, in_fence)
    for place in Place
    for is_opened in (False, True)
    for was_opened in (False, True)
    for ticks in range(TICKS_OVER + 1)
    for in_fence in (False, True)
)
STATE_INDEX = {state: index for index, state in enumerate(LINE_STATES)}


def step(state: LineState, letter: str, *, is_bracket_opener: bool) -> LineState:
    """Return the state after one letter of a shape (see `decoding.tables`)."""
    if letter == "n":
        has_text = state.place is Place.IN
        was_opened = state.is_opened if has_text else state.was_opened
        return LineState(Place.L0, False, was_opened, 0, state.in_fence)
    if letter == "b":
        place = Place.IN if state.place is Place.IN else Place.L1
        ticks = 0 if state.ticks == 0 else TICKS_OVER
        return state._replace(place=place, ticks=ticks)
    if letter == "t":
        ticks = min(state.ticks + 1, TICKS_OVER)
        in_fence = state.in_fence != (state.ticks == TICKS_OVER - 1)
        return LineState(Place.IN, False, state.was_opened, ticks, in_fence)
    is_opened = letter == "o" or (letter == "p" and is_bracket_opener)
    return LineState(Place.IN, is_opened, state.was_opened, TICKS_OVER, state.in_fence)


def build_shape_functions(shapes: Sequence[bytes], *, is_bracket_opener: bool) -> list[bytes]:
    """Return what each shape does to a state.

    Returns:
        one function for each shape, of 2 * len(LINE_STATES) bytes: byte s is the state after s.
    """
    letters: dict[int, bytes] = {}
    padding = bytes(range(len(LINE_STATES), MAX_STATES))
    for letter in "nbtopx":
        after = [step(s, letter, is_bracket_opener=is_bracket_opener) for s in LINE_STATES]
        letters[ord(letter)] = bytes(STATE_INDEX[state] for state in after) + padding
    size = len(LINE_STATES)
    return [compose((letters[code] for code in shape), size) * 2 for shape in shapes]
