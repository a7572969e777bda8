"""Fill-in-the-middle tokens by the names that model families give them."""

from collections.abc import Callable
from dataclasses import dataclass

# Prefix, suffix and middle markers; all families put them in this order.
FIM_SPELLINGS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),  # CodeLlama
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FimTokens:
    """Ids of the markers: prefix_id, text before, suffix_id, text after, middle_id."""

    prefix_id: int
    suffix_id: int
    middle_id: int


def find_fim_tokens(token_to_id: Callable[[str], int | None]) -> FimTokens | None:
    """Return the vocabulary's fill-in-the-middle tokens, or None where it has none."""
    for spelling in FIM_SPELLINGS:
        prefix_id, suffix_id, middle_id = map(token_to_id, spelling)
        if prefix_id is not None and suffix_id is not None and middle_id is not None:
            return FimTokens(prefix_id=prefix_id, suffix_id=suffix_id, middle_id=middle_id)
    return None
