"""Finite automata over token ids: the state of a decoding strategy."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

MAX_STATES = 256


class Automaton:
    """A finite automaton whose input alphabet is a vocabulary.

    Token ids that act alike share a symbol, so that the transition table stays small. A host
    advances one sequence with `next_state`; a device advances many with `advance`.

    Attributes:
        num_states: states are 0 .. num_states - 1.
        symbols: (V,) int64, symbol of each token id.
        transitions: (num_states, num_symbols) int64, the next state.
    """

    def __init__(self, functions: Sequence[bytes], function_of_token: Sequence[int]) -> None:
        """Build the tables.

        Args:
            functions: byte s of a function is the state that follows state s; all of one length.
            function_of_token: index into `functions` for each token id.
        """
        distinct = sorted(set(functions))
        symbol_of = {function: symbol for symbol, function in enumerate(distinct)}
        symbol_of_function = [symbol_of[function] for function in functions]
        self.num_states = len(distinct[0])
        self.symbols = torch.tensor([symbol_of_function[index] for index in function_of_token])
        table = torch.tensor([list(function) for function in distinct])
        self.transitions = table.T.contiguous()
        self._function_of_token = [functions[index] for index in function_of_token]

    def next_state(self, state: int, token_id: int) -> int:
        """Return the state after one token."""
        return self._function_of_token[token_id][state]

    def run(self, state: int, token_ids: Iterable[int]) -> int:
        """Return the state after several tokens."""
        for token_id in token_ids:
            state = self._function_of_token[token_id][state]
        return state

    def advance(self, states: Tensor, token_ids: Tensor) -> Tensor:
        """Advance many rows at once, without a host synchronisation.

        Args:
            states: (B,) int64.
            token_ids: (B,) int64, one new token of each row.

        Returns:
            (B,) int64, the next states.
        """
        return self.transitions[states, self.symbols[token_ids]]


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
