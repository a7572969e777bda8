"""Finite automata over token ids: the state of a decoding strategy."""

from collections.abc import Iterable, Sequence

MAX_STATES = 256


class Automaton:
    """A finite automaton whose input alphabet is a vocabulary."""

    def __init__(self, functions: Sequence[bytes], function_of_token: Sequence[int]) -> None:
        """Build the table.

        Args:
            functions: byte s of a function is the state that follows state s.
            function_of_token: index into `functions` for each token id.
        """
        self._function_of_token = [functions[index] for index in function_of_token]

    def next_state(self, state: int, token_id: int) -> int:
        """Return the state after one token."""
        return self._function_of_token[token_id][state]

    def run(self, state: int, token_ids: Iterable[int]) -> int:
        """Return the state after several tokens."""
        for token_id in token_ids:
            state = self._function_of_token[token_id][state]
        return state


def compose(functions: Iterable[bytes], num_states: int) -> bytes:
    """Apply state functions one after the other.

    Args:
        functions: translation tables of `MAX_STATES` bytes, first applied first.
        num_states: length of the result.
    """
    states = bytes(range(num_states))
    for function in functions:
        states = states.translate(function)
    return states
