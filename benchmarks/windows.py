"""Windows of a text, which perplexities are measured on."""

import hashlib
from array import array
from collections.abc import Sequence


def cut_windows(token_ids: Sequence[int], length: int, limit: int | None = None) -> list[list[int]]:
    """Cut a text into whole windows; a shorter rest is left out.

    Args:
        token_ids: of the text.
        length: tokens of a window, at least 2.
        limit: the first so many windows; None: all.

    Raises:
        ValueError: the text is shorter than one window, or an argument is too small.
    """
    if length < 2 or (limit is not None and limit < 1):
        raise ValueError(f"length must be at least 2 and windows at least 1, got {length}, {limit}")
    if len(token_ids) < length:
        raise ValueError(f"the text has {len(token_ids)} tokens, a window {length}")
    count = min(len(token_ids) // length, limit or len(token_ids))
    return [list(token_ids[i * length : (i + 1) * length]) for i in range(count)]


def digest_windows(windows: Sequence[Sequence[int]]) -> str:
    """Return the SHA-256 of the tokens of all windows."""
    return hashlib.sha256(b"".join(array("q", window).tobytes() for window in windows)).hexdigest()
