"""The speeds that follow from arrival times."""

from collections.abc import Sequence

import pytest

from stats.timings import StreamTiming, TimingError, decode_rate, output_rate, prefill_rate


def timing(arrivals: Sequence[float], sent: float = 0.0) -> StreamTiming:
    counts = tuple(float(i + 1) for i in range(len(arrivals)))
    return StreamTiming(sent_s=sent, arrivals_s=tuple(arrivals), token_counts=counts)


def test_decode_rate_counts_while_every_stream_decodes() -> None:
    early = timing([1.0, 2.0, 2.5, 3.0, 3.5])
    late = timing([2.0, 2.5, 3.0, 3.5, 4.0])
    assert decode_rate([early, late]) == pytest.approx(4.0)


def test_decode_rate_of_one_stream_leaves_the_first_token_out() -> None:
    assert decode_rate([timing([5.0, 5.5, 6.0])]) == pytest.approx(2.0)


def test_decode_rate_without_a_common_window_counts_from_the_last_first_token() -> None:
    assert decode_rate([timing([1.0, 2.0]), timing([3.0, 4.0])]) == pytest.approx(1.0)


def test_decode_rate_refuses_tokens_that_arrive_at_once() -> None:
    with pytest.raises(TimingError, match="arrived all at once"):
        decode_rate([timing([1.0, 1.0])])


def test_rates_and_latencies_follow_their_definitions() -> None:
    streams = [timing([3.0, 4.0, 6.0], sent=1.0), timing([5.0, 7.0, 9.0], sent=1.0)]
    assert prefill_rate(streams, 10) == pytest.approx(2 * 10 / 4)
    assert output_rate(streams) == pytest.approx(6 / 8)
    assert streams[0].ttft_s == pytest.approx(2.0)
    assert streams[0].tpot_s == pytest.approx(1.5)
    assert timing([1.0]).tpot_s is None


def test_timing_refuses_a_stream_without_tokens() -> None:
    with pytest.raises(TimingError, match="ended without a token"):
        timing([])
