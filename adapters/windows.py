"""A text as methods read it: windows drawn at random, and windows held out."""

import hashlib

import torch
from torch import Tensor

from adapters.training_state import TrainingError
from models.spec import DecoderSpec

_HELD_OUT_PART = 10


class Windows:
    """Stretches of `length` tokens and the one after them.

    Args:
        token_ids: (n,) the text.
        length: tokens of a window.
        held_out: most windows at the end of the text that are never drawn; they are at most a tenth
            of it.

    Raises:
        TrainingError: the text is shorter than one window, or is not of the decoder's tokens.
    """

    def __init__(self, token_ids: Tensor, length: int, *, held_out: int, spec: DecoderSpec) -> None:
        size = length + 1
        if length > spec.max_position_embeddings:
            raise TrainingError(
                f"length must be at most the model's {spec.max_position_embeddings} positions, "
                f"got {length}"
            )
        if len(token_ids) < size:
            raise TrainingError(
                f"the text must have at least length + 1 = {size} tokens, got {len(token_ids)}; "
                "give more text or a smaller length"
            )
        if not 0 <= int(token_ids.min()) <= int(token_ids.max()) < spec.vocab_size:
            raise TrainingError(f"the text must have token ids from 0 to {spec.vocab_size - 1}")
        count = min(held_out, len(token_ids) // (_HELD_OUT_PART * size))
        split = len(token_ids) - count * size
        self._text, self._size = token_ids[:split].long(), size
        # (count, length + 1) int64.
        self.held_out = token_ids[split:].long().view(count, size)
        self.digest = hashlib.sha256(token_ids.long().numpy().tobytes()).hexdigest()

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Return (count, length + 1) int64 tokens from random places."""
        places = len(self._text) - self._size + 1
        starts = torch.randint(0, places, (count,), generator=generator)
        return self._text[starts[:, None] + torch.arange(self._size)]


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the source of all chance of a step; nothing of it has to be kept to go on."""
    # Hashed, because a generator looks at 32 bits of its seed only.
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
