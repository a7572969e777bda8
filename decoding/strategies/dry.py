"""DRY: don't repeat yourself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from decoding.options import option
from decoding.strategies.base import CheckedStrategy, PlainController
from decoding.strategies.shaping import Shape, ShapedText
from decoding.tables import TokenTables

# As llama.cpp has it: the largest exponent whose power is a float32.
_MAX_LOG = 88.7228391


@dataclass(frozen=True, kw_only=True, slots=True)
class Dry(CheckedStrategy):
    """Make a token less likely that would go on with what the text repeats.

    Where the last L tokens stand earlier in prompt or answer, and L is at least the allowed length,
    multiplier * base ** (L - allowed_length) is taken from the logit of the token that followed
    there; of several places the longest counts. A repetition does not reach over a token with one
    of the breakers in it. It holds at temperature 0, too.

    Source: p-e-w, "DRY: a modern repetition penalty that reliably prevents looping" (2024);
    llama.cpp, `llama_sampler_dry_apply` (MIT), followed as a definition.
    """

    name: ClassVar[str] = "dry"

    multiplier: float = option(
        0.8, "How strong it is; 0 has no effect.", "number", minimum=0.0, maximum=100.0
    )
    base: float = option(
        1.75,
        "How fast it grows with the length of the repetition.",
        "number",
        minimum=1.0,
        maximum=100.0,
    )
    allowed_length: int = option(
        2,
        "Tokens that may be repeated freely.",
        "integer",
        minimum=1,
        maximum=2**20,
    )
    last_n: int = option(
        -1, "How many tokens are looked at; -1 is all.", "integer", minimum=-1, maximum=2**31 - 1
    )
    breakers: tuple[str, ...] = option(
        ("\n", ":", '"', "*"),
        "Texts that end a repetition.",
        "strings",
        max_items=64,
        max_chars=64,
    )

    def bind(self, tables: TokenTables) -> PlainController:
        """Return the controller for a vocabulary."""
        breakers = tables.tokens_with([text.encode() for text in self.breakers])
        return PlainController(shaper=_Shaper(self, breakers))


class _Shaper:
    shapes_greedy = True
    learn = None

    def __init__(self, strategy: Dry, breakers: frozenset[int]) -> None:
        self._strategy = strategy
        self._breakers = breakers

    def shape(self, logits: Tensor, text: ShapedText, temperature: float) -> Shape:
        asked = self._strategy
        history = _last(text, asked.last_n)
        longest = self._longest(history)
        if asked.multiplier == 0.0 or longest < asked.allowed_length:
            return Shape()
        lengths = find_repeats(history, longest, asked.allowed_length)
        if not lengths:
            return Shape()
        most = int(_MAX_LOG / math.log(asked.base)) if asked.base > 1.000001 else 0
        ids, penalties = [], []
        for token_id, length in lengths.items():
            exponent = length - asked.allowed_length
            exponent = min(exponent, most) if most else exponent
            ids.append(token_id)
            penalties.append(-asked.multiplier * asked.base**exponent)
        bias = torch.tensor(penalties, dtype=torch.float64).clamp_min(torch.finfo().min / 4)
        return Shape(bias=(torch.tensor(ids), bias.float()))

    def _longest(self, history: Sequence[int]) -> int:
        """Return how many of the last tokens there are after the last breaker."""
        for distance in range(len(history)):
            if history[-1 - distance] in self._breakers:
                return distance
        return len(history)


def _last(text: ShapedText, count: int) -> list[int]:
    if count < 0:
        return [*text.prompt_token_ids, *text.token_ids]
    made = len(text.token_ids)
    from_prompt = max(0, count - made)
    start = max(0, len(text.prompt_token_ids) - from_prompt)
    return [*text.prompt_token_ids[start:], *text.token_ids[max(0, made - count) :]]


def find_repeats(history: Sequence[int], longest: int, shortest: int) -> dict[int, int]:
    """Return the tokens that followed where the last tokens stood before.

    Args:
        history: of the text, the last token last.
        longest: of the last tokens, so many are looked for.
        shortest: repetition that counts, at least 1.

    Returns:
        For each such token, the length of the longest repetition that it followed.
    """
    tokens = torch.tensor(history)
    # Ends of repetitions: places of the last token but its own.
    ends = torch.nonzero(tokens[:-1] == tokens[-1])[:, 0] if len(history) > 1 else tokens[:0]
    found: dict[int, int] = {}
    length = 1
    while len(ends):
        if length >= shortest:
            for token_id in tokens[ends + 1].tolist():
                found[token_id] = length
        if length == longest:
            break
        ends = ends[ends >= length]
        ends = ends[tokens[ends - length] == tokens[-1 - length]] if len(ends) else ends
        length += 1
    return found
