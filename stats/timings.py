"""When the tokens of streams arrived, and the speeds that follow."""

from collections.abc import Sequence
from dataclasses import dataclass


class TimingError(ValueError):
    """The times say nothing about a speed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamTiming:
    """When the tokens of one stream arrived, on one monotonic clock.

    Attributes:
        sent_s: when the request was sent.
        arrivals_s: when output arrived, increasing.
        token_counts: tokens received up to and including each arrival. Over HTTP the last one is
            the server's own count and the others are in proportion.
    """

    sent_s: float
    arrivals_s: tuple[float, ...]
    token_counts: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.arrivals_s:
            raise TimingError("a stream ended without a token")

    @property
    def ttft_s(self) -> float:
        """Time to first token in seconds, from sending the request."""
        return self.arrivals_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per output token after the first, or None for a single token."""
        later = self.token_counts[-1] - 1
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / later if later > 0 else None

    def rate(self, start_s: float, end_s: float) -> float | None:
        """Give tokens per second between this stream's first and last arrival in a window of time.

        Returns:
            The rate, or None when no two arrivals at different times fall in the window.
        """
        inside = [i for i, at in enumerate(self.arrivals_s) if start_s <= at <= end_s]
        if not inside:
            return None
        seconds = self.arrivals_s[inside[-1]] - self.arrivals_s[inside[0]]
        tokens = self.token_counts[inside[-1]] - self.token_counts[inside[0]]
        return tokens / seconds if seconds > 0 else None


def decode_rate(timings: Sequence[StreamTiming]) -> float:
    """Give the decode tokens per second of all streams together while every one of them decodes.

    The window runs from the last stream's first token to the first stream's last one; the rate is
    the sum of the streams' own rates in it. Where streams finish before others have started, the
    window is the whole time from the last stream's first token to the end.

    Raises:
        TimingError: all tokens of a stream arrived at once.
    """
    start = max(timing.arrivals_s[0] for timing in timings)
    end = min(timing.arrivals_s[-1] for timing in timings)
    rates = [rate for timing in timings if (rate := timing.rate(start, end)) is not None]
    if len(rates) == len(timings):
        return sum(rates)
    end = max(timing.arrivals_s[-1] for timing in timings)
    if end <= start:
        raise TimingError("the tokens of a stream arrived all at once: it does not stream")
    tokens = sum(timing.token_counts[-1] - _count_until(timing, start) for timing in timings)
    return tokens / (end - start)


def prefill_rate(timings: Sequence[StreamTiming], prompt_tokens: int) -> float:
    """Give the prompt tokens per second until every stream has its first token."""
    start = min(timing.sent_s for timing in timings)
    return len(timings) * prompt_tokens / (max(t.arrivals_s[0] for t in timings) - start)


def output_rate(timings: Sequence[StreamTiming]) -> float:
    """Give the output tokens per second of a run as a whole, prefill included."""
    start = min(timing.sent_s for timing in timings)
    end = max(timing.arrivals_s[-1] for timing in timings)
    return sum(timing.token_counts[-1] for timing in timings) / (end - start)


def _count_until(timing: StreamTiming, at_s: float) -> float:
    pairs = zip(timing.arrivals_s, timing.token_counts, strict=True)
    return max((tokens for at, tokens in pairs if at <= at_s), default=0.0)
