"""Count, share and recycle the blocks of a paged KV cache.

Only block numbers are handled here, never the keys and values themselves. A full block of computed
tokens is *published* under a key that stands for every token up to its end; a later sequence that
starts with the same tokens finds it there.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable

BASE_ROOT_KEY = hashlib.sha256(b"base").digest()
"""Parent key of the first block of a sequence whose cache depends on the base model alone."""


def chain_key(parent_key: bytes, token_ids: bytes) -> bytes:
    """Derive the key of a full block.

    Args:
        parent_key: key of the block before it, or the root key. Blocks whose content depends on
            more than the token ids (say, on an adapter) start from another root and so never meet.
        token_ids: the block's token ids as int32 bytes.

    Returns:
        32 bytes, a SHA-256 digest: two prefixes share a key only when they are equal.
    """
    return hashlib.sha256(parent_key + token_ids).digest()


def variant_root_key(digest: str) -> bytes:
    """Give the parent key of the first block of a sequence that runs on a variant of the base.

    Args:
        digest: of the files that the variant came from.
    """
    return hashlib.sha256(b"variant" + digest.encode()).digest()


def side_root_key(digest: str) -> bytes:
    """Give what stands for a side network in the keys of its blocks.

    Args:
        digest: of the files that it came from.
    """
    return hashlib.sha256(b"side" + digest.encode()).digest()


def side_key(root_key: bytes, base_key: bytes) -> bytes:
    """Derive the key of a full block of a side network's cache.

    Args:
        root_key: of the side network.
        base_key: of the block of the same tokens in the cache of the model that it reads; it stands
            for all of them, and for that model.
    """
    return hashlib.sha256(root_key + base_key).digest()


class CacheBlocks:
    """The blocks of one KV cache.

    A block is in exactly one state: free (content worthless), idle (published, nobody uses it,
    recycled least recently used first) or used by one or more sequences.
    """

    def __init__(self, num_blocks: int) -> None:
        """Start with every block free.

        Args:
            num_blocks: number of blocks, >= 1.

        Raises:
            ValueError: num_blocks is not positive.
        """
        if num_blocks < 1:
            raise ValueError(f"num_cache_blocks must be at least 1, got {num_blocks}")
        self._num_users = [0] * num_blocks
        self._keys_of: list[list[bytes]] = [[] for _ in range(num_blocks)]
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._published: dict[bytes, int] = {}

    @property
    def num_blocks(self) -> int:
        """All blocks of the cache."""
        return len(self._num_users)

    @property
    def num_available(self) -> int:
        """Blocks that nobody uses: free or idle."""
        return len(self._free) + len(self._idle)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Look up a chain of keys and stop at the first one that is not published.

        Args:
            keys: block keys in order; consumed lazily.

        Returns:
            The blocks found, in order. They are not referenced yet.
        """
        found: list[int] = []
        for key in keys:
            block = self._published.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def has_room(self, found: list[int], num_blocks: int, *, num_spare: int) -> bool:
        """Whether `take` can be called and leaves some blocks available.

        Args:
            found, num_blocks: as in `take`.
            num_spare: blocks to leave.
        """
        num_idle = sum(block in self._idle for block in found)
        return num_blocks - len(found) + num_idle + num_spare <= self.num_available

    def take(self, found: list[int], num_blocks: int) -> "array[int]":
        """Add a user to published blocks and hand out more.

        Args:
            found: from `find`, at most `num_blocks`.
            num_blocks: how many blocks in all.

        Returns:
            `found`, then new blocks.
        """
        for block in found:
            self.reference(block)
        return array("i", (*found, *(self.allocate() for _ in range(num_blocks - len(found)))))

    def reference(self, block: int) -> None:
        """Add a user to a published block."""
        if not self._num_users[block]:
            del self._idle[block]
        self._num_users[block] += 1

    def allocate(self) -> int:
        """Hand out a block with one user; the caller checks `num_available` first.

        When none is free, the least recently used idle block is recycled.
        """
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            assert self._keys_of[block], "an idle block has no key"
            for key in self._keys_of[block]:
                del self._published[key]
            self._keys_of[block].clear()
        self._num_users[block] = 1
        return block

    def publish(self, block: int, key: bytes) -> None:
        """Make a used and computed block findable, unless another one has its key.

        A prompt's last block has two keys once it is full: as the end of that prompt, and as what
        it holds then.
        """
        assert self._num_users[block], "only a used block can be published"
        if key not in self._published:
            self._published[key] = block
            self._keys_of[block].append(key)

    def release(self, blocks: Iterable[int]) -> None:
        """Take one user from each of a sequence's blocks.

        The last blocks of a chain are useless without the first, so they are recycled first.

        Args:
            blocks: the sequence's blocks, in order.
        """
        for block in reversed(list(blocks)):
            assert self._num_users[block], f"block {block} was released twice"
            self._num_users[block] -= 1
            if not self._num_users[block]:
                if self._keys_of[block]:
                    self._idle[block] = None
                else:
                    self._free.append(block)
