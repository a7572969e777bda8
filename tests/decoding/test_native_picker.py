"""The native picker takes the tokens that the torch one takes."""

import dataclasses
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding import LogitsError, Sampler, SamplingParams, build_token_tables
from decoding.strategies import Adapt, DynaTemp, Fixed
from models.kernels.native.executor import is_native_available
from models.kernels.native.library import native_library
from models.kernels.native.picker import NativePicker
from models.kernels.native.threads import ThreadPool

TEXTS = [b"x", b"\n", b"    ", b"\n    ", b" y:", None]
KERNELS = [
    pytest.param(name, marks=pytest.mark.skipif(not is_native_available(name), reason="no kernels"))
    for name in ("avx2", "avx512")
]
MANY_THREADS = 3

# What each row of a batch may ask; the last of each never matters.
TOP_K = [1, 2, 5, 40, 100, 900, 5000, 0]
SHARES = [5e-324, 1e-9, 0.1, 0.5, 0.9, 0.95, 0.999, 1.0 - 2.0**-53, 1.0]
MIN_P = [5e-324, 1e-9, 0.02, 0.5, 1.0, 0.0]
PENALTIES = [-1.1, 0.3, 2.0, 0.0]
REPETITION = [1e-46, 1e-9, 0.7, 1.3, 2.0, 1.0]
TEMPERATURES = [0.0, 1e-10, 0.3, 0.8, 1.0, 2.0]
STRATEGIES = [DynaTemp(range=0.4), DynaTemp(), Adapt(a=1.2, b=0.5), Fixed()]


def make_samplers(kernels, vocab_size, *, num_threads=MANY_THREADS):
    """Return a sampler with the torch picker and one with the native one."""
    tables = build_token_tables([TEXTS[i % len(TEXTS)] for i in range(vocab_size)])
    library = native_library()
    assert library is not None
    picker = NativePicker(library, ThreadPool(library, num_threads), kernels)
    return (
        Sampler(tables, eos_token_ids=(0,)),
        Sampler(tables, eos_token_ids=(0,), picker=picker),
    )


def make_logits(kind, num_rows, vocab_size, seed):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_rows, vocab_size, generator=generator)
    if kind == "impossible":
        noise[torch.rand(num_rows, vocab_size, generator=generator) < 0.95] = -torch.inf
        noise[:, vocab_size // 2] = 0.0
    if kind == "tied":
        return noise.mul_(2.0).round_()
    return noise * {"equal": 0.0, "flat": 0.3, "peaked": 6.0, "huge": 1e37}.get(kind, 3.0)


KINDS = ["equal", "flat", "usual", "peaked", "tied", "impossible", "huge"]


def make_params(chooser, vocab_size, *, chance):
    """Return parameters of which each is at work with this chance."""

    def choose(values):
        return chooser.choice(values[:-1]) if chooser.random() < chance else values[-1]

    biases = {chooser.randrange(vocab_size): chooser.uniform(-9.0, 9.0) for _ in range(5)}
    return SamplingParams(
        temperature=choose(TEMPERATURES),
        top_k=choose(TOP_K),
        top_p=choose(SHARES),
        typical_p=choose(SHARES),
        min_p=choose(MIN_P),
        presence_penalty=choose(PENALTIES),
        frequency_penalty=choose(PENALTIES),
        repetition_penalty=choose(REPETITION),
        logit_bias=choose([biases, {}]),
        min_tokens=choose([4, 0]),
        stop_token_ids=choose([(1, 2), ()]),
        strategy=choose(STRATEGIES),
        logprobs=choose([0, 3, None]),
    )


def make_rows(sampler, params, seed):
    chooser = random.Random(seed)
    rows = []
    for index, one in enumerate(params):
        row = sampler.start(
            one, [3, 1, 4, 1], seed=seed * 1000 + index, is_traced=chooser.random() < 0.2
        )
        for _ in range(chooser.randrange(8)):
            row.append(chooser.randrange(20))
        rows.append(row)
    return rows


def assert_equal(found, expected):
    assert found.token_ids == expected.token_ids
    assert found.temperatures == expected.temperatures
    for name in ("logprobs", "entropies"):
        one, other = getattr(found, name), getattr(expected, name)
        assert [value is None for value in one] == [value is None for value in other]
        numbers = [value for value in other if value is not None]
        assert [v for v in one if v is not None] == pytest.approx(numbers, rel=1e-9, abs=1e-9)
    for one, other in zip(found.top, expected.top, strict=True):
        assert [token_id for token_id, _ in one] == [token_id for token_id, _ in other]


@pytest.mark.parametrize("kernels", KERNELS)
@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    vocab_size=st.sampled_from([20, 255, 256, 257, 1003, 5000]),
    num_rows=st.integers(1, 6),
    chance=st.sampled_from([0.15, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_native_tokens_equal_torchs(kernels, kind, vocab_size, num_rows, chance, seed):
    reference, native = make_samplers(kernels, vocab_size)
    chooser = random.Random(seed)
    params = [make_params(chooser, vocab_size, chance=chance) for _ in range(num_rows)]
    rows = make_rows(reference, params, seed)
    logits = make_logits(kind, num_rows, vocab_size, seed)
    assert_equal(native.sample(logits, rows), reference.sample(logits, rows))


FILTERS = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.8},
    "top_k": {"top_k": 40},
    "top_k-many": {"top_k": 5000},
    "top_p": {"top_p": 0.95},
    "top_p-tiny": {"top_p": 1e-7},
    "min_p": {"min_p": 0.05},
    "typical_p": {"typical_p": 0.9},
    "typical_p-top_k": {"typical_p": 0.5, "top_k": 300},
    "all": {"top_k": 3000, "typical_p": 0.95, "top_p": 0.9, "min_p": 1e-4},
}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("case", FILTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_native_tokens_of_a_real_vocabulary_equal_torchs(kernels, kind, case):
    reference, native = make_samplers(kernels, 49152)
    logits = make_logits(kind, 2, 49152, 7).repeat_interleave(12, 0)
    params = SamplingParams(**FILTERS[case])
    rows = [reference.start(params, [], seed=seed) for seed in range(24)]
    expected = reference.sample(logits, rows)
    assert_equal(native.sample(logits, rows), expected)
    if case == "temperature" and kind != "huge":
        assert len(set(expected.token_ids)) > 4


@pytest.mark.parametrize("kernels", KERNELS)
def test_native_rows_do_not_depend_on_others_or_on_the_threads(kernels):
    vocab_size = 3001
    chooser = random.Random(5)
    params = [make_params(chooser, vocab_size, chance=0.4) for _ in range(30)]
    logits = torch.cat([make_logits(kind, 5, vocab_size, 3) for kind in KINDS[:6]])
    found = []
    for num_threads in (1, MANY_THREADS):
        native = make_samplers(kernels, vocab_size, num_threads=num_threads)[1]
        rows = make_rows(native, params, 11)
        found.append(native.sample(logits, rows))
        alone = [native.sample(logits[i, None], rows[i : i + 1]) for i in range(30)]
        for field in dataclasses.fields(found[0]):
            together = getattr(found[-1], field.name)
            assert together == [getattr(one, field.name)[0] for one in alone]
    assert found[0] == found[1]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("case", FILTERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "none"])
@pytest.mark.parametrize("column", [0, 255, 300])
def test_native_refuses_logits_that_are_not_numbers(kernels, case, bad, column):
    native = make_samplers(kernels, 301)[1]
    logits = make_logits("usual", 2, 301, 0)
    if bad == -math.inf:
        logits[1] = bad
    else:
        logits[1, column] = bad
    params = SamplingParams(**FILTERS[case], logit_bias={3: 1.0})
    rows = [native.start(params, [], seed=seed) for seed in range(2)]
    with pytest.raises(LogitsError, match="not numbers"):
        native.sample(logits, rows)
    assert 0 <= native.sample(logits[:1], rows[:1]).token_ids[0] < 301


@pytest.mark.parametrize("kernels", KERNELS)
def test_native_changes_no_logits(kernels):
    native = make_samplers(kernels, 1003)[1]
    logits = make_logits("usual", 9, 1003, 0)
    before = logits.clone()
    chooser = random.Random(0)
    params = [make_params(chooser, 1003, chance=0.8) for _ in range(9)]
    native.sample(logits, make_rows(native, params, 0))
    assert torch.equal(logits, before)
