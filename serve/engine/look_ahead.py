"""Looking ahead: what probes try for a sequence, what they find, and what is taken."""

import math

from decoding.logprobs import TopLogprobs
from decoding.options import ParameterError
from serve.engine.limits import EngineLimits
from serve.engine.sequence import Choice, Sequence
from serve.requests import Arm


def check_room(arm: Arm, num_prompt_tokens: int, limits: EngineLimits) -> None:
    """Refuse an arm whose probes would find no room even with nothing else there.

    Raises:
        ParameterError: says what there is no room for.
    """
    ahead = arm.params.strategy.look_ahead
    if ahead is None:
        return
    if not limits.max_probes:
        raise ParameterError(
            "decoding.strategy look_ahead needs prefix caching, and max_batch_tokens above "
            "max_running_sequences",
            param="decoding.strategy",
        )
    size = limits.block_size
    own = -(-(num_prompt_tokens + (arm.params.max_tokens or 0)) // size)
    # Of each candidate the begun block and those of its tokens, and one to grow by.
    needed = own + 1 + ahead.num_candidates * (2 - (-ahead.num_tokens // size))
    room = limits.num_cache_blocks
    if arm.adapter is not None:
        room = min(room, limits.num_side_blocks)
    if needed > room:
        raise ParameterError(
            f"looking ahead with {ahead.num_candidates} candidates takes {needed} blocks of the "
            f"cache for prompt and max_tokens of this length; it has {room}",
            param="decoding.candidates",
        )


def make_probes(sequence: Sequence, choice: Choice) -> list[Sequence]:
    """Return what tries the candidates of a choice; none where nothing could follow them."""
    ahead, max_tokens = sequence.params.strategy.look_ahead, sequence.params.max_tokens
    assert ahead is not None
    assert max_tokens is not None
    num_tokens = min(ahead.num_tokens, max_tokens - sequence.num_generated - 1)
    if num_tokens < 1 or len(choice.candidates) == 1:
        return []
    return [
        sequence.make_probe(number, token_id, num_tokens)
        for number, (token_id, _) in enumerate(choice.candidates)
    ]


def advance(probe: Sequence, token_id: int, logprob: float, *, is_end: bool) -> bool:
    """Add a token to a probe.

    Args:
        probe: that runs.
        token_id, logprob: what it drew.
        is_end: the token ends a text.

    Returns:
        Whether it has ended; its score is known then.
    """
    assert probe.parent is not None
    choice = probe.parent.choice
    assert choice is not None
    probe.token_ids.append(token_id)
    probe.logprobs.append(logprob)
    if not is_end and len(probe.logprobs) < (probe.params.max_tokens or 0):
        return False
    number = probe.order[-1]
    logprobs = [choice.candidates[number][1], *probe.logprobs]
    choice.scores[number] = math.fsum(logprobs) / len(logprobs)
    return True


def decide(choice: Choice) -> tuple[int, TopLogprobs]:
    """Return the token with the best score, the first of equals, and all with their scores.

    A candidate that nothing was tried after has its own log probability.
    """
    tried = tuple(
        (token_id, choice.scores.get(number, logprob))
        for number, (token_id, logprob) in enumerate(choice.candidates)
    )
    return max(tried, key=lambda of: of[1])[0], tried
