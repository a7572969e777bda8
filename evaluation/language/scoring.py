"""Log-likelihoods over the completions endpoint, which echoes a prompt with its tokens' own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from evaluation.errors import RunError
from evaluation.server import Arm, Servers

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Likelihood:
    """How likely a continuation is after a context.

    Attributes:
        logprob: natural, of all its tokens.
        num_tokens: it has, by the server's tokenizer.
        is_greedy: each token is the likeliest.
    """

    logprob: float
    num_tokens: int
    is_greedy: bool


async def score_continuations(
    arm: Arm, pairs: Sequence[tuple[str, str]], servers: Servers
) -> list[Likelihood]:
    """Return how likely each continuation is after its context, all in one request.

    A token counts for the continuation if it reaches beyond the context.

    Args:
        arm: who is asked.
        pairs: (context, continuation), at least one.
        servers: of the arm.

    Raises:
        RunError: the server refuses, is gone, or echoes no log probabilities.
    """
    prompts = [context + continuation for context, continuation in pairs]

    def read(choices: list[dict[str, Any]]) -> list[Likelihood]:
        choices = sorted(choices, key=lambda choice: int(choice["index"]))
        return [
            _read(choice["logprobs"], len(context), len(context + continuation))
            for choice, (context, continuation) in zip(choices, pairs, strict=True)
        ]

    return await read_echo(arm, prompts, servers, read)


async def read_echo(
    arm: Arm, prompt: object, servers: Servers, read: Callable[[list[dict[str, Any]]], Result]
) -> Result:
    """Return what is read of a prompt that comes back with the log probabilities of its tokens.

    Args:
        arm: who is asked.
        prompt: of the completions endpoint, of any of its forms.
        servers: of the arm.
        read: of the answer's choices; it may raise where something is not there.

    Raises:
        RunError: the server refuses, is gone, or echoes no log probabilities.
    """
    body = {
        "prompt": prompt,
        "echo": True,
        "logprobs": 1,
        # Not all servers take 0.
        "max_tokens": 1,
        "temperature": 0.0,
    }
    answer = await servers.ask(arm, "/v1/completions", body)
    try:
        return read(answer["choices"])
    except (KeyError, TypeError, ValueError, IndexError):
        raise RunError(
            f"arm {arm.label!r}: the server at {arm.url} echoes no log probabilities of prompts"
        ) from None


def _read(logprobs: dict[str, list[object]], start: int, end: int) -> Likelihood:
    """Return the likelihood of the tokens between two places of an echoed text."""
    offsets = [int(str(offset)) for offset in logprobs["text_offset"]]
    values, tops = logprobs["token_logprobs"], logprobs["top_logprobs"]
    total, count, is_greedy = 0.0, 0, True
    for index, offset in enumerate(offsets):
        next_offset = offsets[index + 1] if index + 1 < len(offsets) else end + 1
        # The first token of a text has nothing before it that it could follow.
        if next_offset <= start or offset >= end or values[index] is None:
            continue
        value = float(str(values[index]))
        total, count = total + value, count + 1
        top = tops[index]
        if not isinstance(top, dict):
            raise TypeError("no alternatives")
        is_greedy = is_greedy and value >= max(top.values())
    if not count:
        raise ValueError("no token of the continuation")
    return Likelihood(logprob=total, num_tokens=count, is_greedy=is_greedy)


async def score_tokens(arm: Arm, token_ids: Sequence[int], servers: Servers) -> list[float]:
    """Return the log-likelihood of each token but the first after those before it.

    Args:
        arm: who is asked.
        token_ids: at least two.
        servers: of the arm.

    Raises:
        RunError: the server refuses, is gone, or echoes no log probabilities.
    """

    def read(choices: list[dict[str, Any]]) -> list[float]:
        values = choices[0]["logprobs"]["token_logprobs"]
        return [float(values[index]) for index in range(1, len(token_ids))]

    return await read_echo(arm, list(token_ids), servers, read)


async def tokenize(arm: Arm, text: str, servers: Servers) -> list[int]:
    """Return the tokens of a text without special ones.

    Raises:
        RunError: the server refuses, is gone, or has no /tokenize.
    """
    answer = await servers.retry(
        lambda: servers.client(arm.url).request(
            "POST",
            "/tokenize",
            key=arm.key,
            body={"model": arm.model, "prompt": text, "add_special_tokens": False},
        )
    )
    try:
        return [int(token) for token in answer["tokens"]]
    except (KeyError, TypeError, ValueError):
        raise RunError(f"arm {arm.label!r}: the server at {arm.url} does not tokenize") from None
