"""The sampling benchmark times every case on every sampler."""

from benchmarks.sampling import CASES, SCALES, measure_sampler, table
from decoding import Sampler, build_token_tables


def test_every_case_is_timed_and_laid_out() -> None:
    samplers = {name: Sampler(build_token_tables([b"x"] * 100)) for name in ("one", "other")}
    found = {rows: measure_sampler(samplers, 100, rows, 1) for rows in (1, 2)}
    names = {f"{case}, {kind}" for case in CASES for kind in SCALES}
    for times in found.values():
        assert set(times) == names
        assert all(set(ms) == set(samplers) and min(ms.values()) > 0.0 for ms in times.values())
    lines = table(found).splitlines()
    assert len(lines) == 1 + len(names)
    assert [line.count(".") for line in lines[1:]] == [4] * len(names)
