"""Where two backends part, and whether that means anything."""

from typing import Any

from serve.requests import TokenOutput

TOLERANCE = 2e-3
"""Largest difference of two log probabilities that float32 sums in other orders account for."""


def first_divergence(native: list[TokenOutput], other: list[TokenOutput]) -> str | None:
    """Say where two answers to a request differ, None: nowhere that matters.

    A token may differ where its probability and the other one's are within the tolerance; what
    follows on it has nothing in common any more.
    """
    for index in sorted({output.sequence_index for output in native}):
        ours, theirs = (
            [output for output in outputs if output.sequence_index == index]
            for outputs in (native, other)
        )
        for position, (a, b) in enumerate(zip(ours, theirs, strict=False)):
            where = f"sequence {index}, token {position}"
            if a.token_id != b.token_id:
                if _is_near_tie(a, b):
                    break
                return f"{where}: {a.token_id} natively, {b.token_id} in vLLM ({a.logprob})"
            if problem := _differ(a, b):
                return f"{where}: {problem}"
        else:
            if len(ours) != len(theirs):
                return f"sequence {index}: {len(ours)} outputs natively, {len(theirs)} in vLLM"
    return None


def _is_near_tie(a: TokenOutput, b: TokenOutput) -> bool:
    """Whether both tokens are as likely, by what the first backend reports."""
    if a.logprob is None or b.token_id is None:
        return False
    known = dict(a.logprob.top)
    return abs(known.get(b.token_id, -1e9) - a.logprob.logprob) < TOLERANCE


def _differ(a: TokenOutput, b: TokenOutput) -> str | None:
    if a.finish_reason != b.finish_reason:
        return f"ends with {a.finish_reason} natively, with {b.finish_reason} in vLLM"
    numbers: list[tuple[str, Any, Any]] = [
        ("logprob", a.logprob and a.logprob.logprob, b.logprob and b.logprob.logprob),
        ("temperature", a.trace and a.trace.temperature, b.trace and b.trace.temperature),
        ("entropy", a.trace and a.trace.entropy, b.trace and b.trace.entropy),
    ]
    for name, first, second in numbers:
        if (first is None) != (second is None):
            return f"{name} is {first} natively, {second} in vLLM"
        if first is not None and not abs(first - second) <= TOLERANCE * max(1.0, abs(first)):
            return f"{name} is {first} natively, {second} in vLLM"
    if a.trace and b.trace and a.trace[::3] != b.trace[::3]:
        return f"class and stage are {a.trace[::3]} natively, {b.trace[::3]} in vLLM"
    return None
