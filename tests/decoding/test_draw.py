import pytest
import torch

from decoding import derive_seed
from decoding.draw import uniforms

WORD = 2**64
GAMMA = 0x9E3779B97F4A7C15


def mix(word):
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % WORD
    return word ^ (word >> 31)


def uniform(seed, position):
    start = mix((seed % WORD) ^ GAMMA)
    return (mix((start + (position + 1) * GAMMA) % WORD) >> 12) / 2**52


@pytest.mark.parametrize("seed", [0, 1, -1, 42, 2**63 - 1, -(2**63)])
def test_uniforms_equal_unbounded_integer_arithmetic(seed):
    positions = torch.tensor([0, 1, 2, 1000, 2**31, 2**40])
    found = uniforms(torch.tensor(seed), positions).tolist()
    assert found == [uniform(seed, position) for position in positions.tolist()]


def test_uniforms_broadcast_and_do_not_depend_on_their_neighbours():
    seeds, positions = torch.arange(7)[:, None], torch.arange(5)
    table = uniforms(seeds, positions)
    assert table.shape == (7, 5)
    assert table[3, 2].item() == uniforms(torch.tensor(3), torch.tensor(2)).item()


@pytest.mark.parametrize("axis", ["positions", "seeds"])
def test_uniforms_are_uniform(axis):
    """Fails by chance with probability 1e-6."""
    many = torch.arange(200_000)
    one = torch.tensor(3)
    values = uniforms(one, many) if axis == "positions" else uniforms(many, one)
    assert values.min() >= 0.0
    assert values.max() < 1.0
    counts = torch.histc(values, 256, 0.0, 1.0)
    expected = len(many) / 256
    assert chi_square_p((counts - expected).square().sum() / expected, 255) > 1e-6
    pairs = (values[:-1] * 16).long() * 16 + (values[1:] * 16).long()
    expected = len(pairs) / 256
    statistic = (torch.bincount(pairs, minlength=256) - expected).square().sum() / expected
    assert chi_square_p(statistic, 255) > 1e-6


def chi_square_p(statistic, degrees):
    half = torch.tensor(degrees / 2.0, dtype=torch.float64)
    return torch.special.gammaincc(half, torch.as_tensor(statistic).double() / 2.0).item()


@pytest.mark.parametrize("seed", [0, 5, -5, 2**63 - 1, -(2**63)])
def test_derive_seed_keeps_the_first_and_gives_distinct_int64_others(seed):
    seeds = [derive_seed(seed, index) for index in range(200)]
    assert seeds[0] == seed
    assert len(set(seeds)) == 200
    assert all(-(2**63) <= value < 2**63 for value in seeds)


def test_derive_seed_of_neighbouring_seeds_does_not_collide():
    seeds = {derive_seed(seed, index) for seed in range(100) for index in range(1, 100)}
    assert len(seeds) == 100 * 99
