import random

import pytest

from serve.engine.cache_blocks import (
    BASE_ROOT_KEY,
    CacheBlocks,
    chain_key,
    side_key,
    side_root_key,
    variant_root_key,
)


def test_blocks_are_refused_when_there_is_none() -> None:
    with pytest.raises(ValueError, match="num_cache_blocks must be at least 1, got 0"):
        CacheBlocks(0)


def test_chain_key_depends_on_parent_and_tokens() -> None:
    key = chain_key(BASE_ROOT_KEY, b"abcd")
    assert len(key) == 32
    assert key == chain_key(BASE_ROOT_KEY, b"abcd")
    assert len({key, chain_key(key, b"abcd"), chain_key(BASE_ROOT_KEY, b"abce")}) == 3


def test_keys_differ_by_model_and_side_network() -> None:
    roots = [BASE_ROOT_KEY, *(variant_root_key(digest) for digest in ("a", "b", "base"))]
    keys = [chain_key(root, b"abcd") for root in roots]
    side_keys = [side_key(side_root_key(digest), key) for digest in ("a", "b") for key in keys]
    assert len({*roots, *keys, *side_keys}) == 4 + 4 + 8
    assert variant_root_key("a") == variant_root_key("a")


def test_allocate_hands_out_each_block_once() -> None:
    blocks = CacheBlocks(5)
    assert sorted(blocks.allocate() for _ in range(5)) == [0, 1, 2, 3, 4]
    assert blocks.num_available == 0


def test_released_block_is_found_under_its_key() -> None:
    blocks = CacheBlocks(3)
    block = blocks.allocate()
    blocks.publish(block, b"key")
    blocks.release([block])
    assert blocks.num_available == 3
    assert blocks.find([b"key", b"other", b"key"]) == [block]
    assert blocks.has_room([block], 3, num_spare=0)
    assert not blocks.has_room([block], 3, num_spare=1)
    assert blocks.take([block], 2)[0] == block
    assert blocks.num_available == 1
    assert blocks.has_room([block], 2, num_spare=0)
    assert not blocks.has_room([block], 3, num_spare=0)


def test_unpublished_block_is_free_after_release() -> None:
    blocks = CacheBlocks(1)
    blocks.release([blocks.allocate()])
    assert blocks.num_available == 1
    assert blocks.find([b"key"]) == []


def test_idle_blocks_are_recycled_least_recently_used_first() -> None:
    blocks = CacheBlocks(3)
    for name in (b"a", b"b", b"c"):
        block = blocks.allocate()
        blocks.publish(block, name)
    for name in (b"b", b"a", b"c"):
        blocks.release(blocks.find([name]))
    blocks.allocate()
    assert [len(blocks.find([name])) for name in (b"a", b"b", b"c")] == [1, 0, 1]
    blocks.allocate()
    assert [len(blocks.find([name])) for name in (b"a", b"b", b"c")] == [0, 0, 1]


def test_end_of_a_chain_is_recycled_before_its_start() -> None:
    blocks = CacheBlocks(2)
    chain = [blocks.allocate(), blocks.allocate()]
    for block, name in zip(chain, (b"first", b"second"), strict=True):
        blocks.publish(block, name)
    blocks.release(chain)
    blocks.allocate()
    assert blocks.find([b"first", b"second"]) == [chain[0]]


def test_second_block_under_a_key_stays_unpublished() -> None:
    blocks = CacheBlocks(2)
    first, second = blocks.allocate(), blocks.allocate()
    blocks.publish(first, b"key")
    blocks.publish(second, b"key")
    assert blocks.find([b"key"]) == [first]
    blocks.release([first, second])
    blocks.allocate()
    assert blocks.find([b"key"]) == [first]


def test_double_release_is_a_broken_invariant() -> None:
    blocks = CacheBlocks(1)
    block = blocks.allocate()
    blocks.release([block])
    with pytest.raises(AssertionError, match="released twice"):
        blocks.release([block])


@pytest.mark.parametrize("seed", range(20))
def test_accounting_balances_after_random_use(seed: int) -> None:
    rng = random.Random(seed)
    blocks = CacheBlocks(8)
    users: list[list[int]] = []
    names = [bytes([i]) for i in range(12)]
    for _ in range(400):
        used = {block for user in users for block in user}
        assert blocks.num_available == 8 - len(used)
        choice = rng.random()
        if choice < 0.4 and blocks.num_available:
            block = blocks.allocate()
            assert block not in used
            users.append([block])
            if rng.random() < 0.7:
                blocks.publish(block, rng.choice(names))
        elif choice < 0.7:
            for block in blocks.find([rng.choice(names)]):
                blocks.reference(block)
                users.append([block])
        elif users:
            blocks.release(users.pop(rng.randrange(len(users))))
    for user in users:
        blocks.release(user)
    assert blocks.num_available == 8
    assert sorted(blocks.allocate() for _ in range(8)) == list(range(8))
    assert not any(blocks.find([name]) for name in names)
