"""Blocks of the paged key/value cache: who holds them, and which finished ones can serve another prompt.

A block is live (held by sequences), cached (held by nobody, its content known by a hash) or free:
`live + cached + free == total` at all times. Plain Python: importing this needs no torch.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from hashlib import blake2b

BlockHash = bytes


def hash_blocks(tokens: Sequence[int], block_size: int, salt: str = "") -> list[BlockHash]:
    """One hash for each full block; it covers every token up to the block's end, and the salt."""
    hashes: list[BlockHash] = []
    parent = blake2b(salt.encode(), digest_size=16).digest()
    for end in range(block_size, len(tokens) + 1, block_size):
        words = b"".join(t.to_bytes(4, "little") for t in tokens[end - block_size : end])
        parent = blake2b(parent + words, digest_size=16).digest()
        hashes.append(parent)
    return hashes


class BlockPool:
    """Reference-counted blocks with least-recently-used reuse of cached ones."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free: deque[int] = deque(range(total))
        self._holders: dict[int, int] = {}  # live block -> sequences that hold it
        self._hash_of: dict[int, BlockHash] = {}  # live or cached block -> its content
        self._block_of: dict[BlockHash, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first

    @property
    def live(self) -> int:
        return len(self._holders)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give: free ones, and cached ones at the price of forgetting them."""
        return self.free + self.cached

    def is_live(self, block: int) -> bool:
        return block in self._holders

    def allocate(self, count: int) -> list[int]:
        """Take blocks of unknown content. Raises `MemoryError` when fewer are available; takes none then."""
        if count > self.available:
            raise MemoryError(f"{count} blocks wanted, {self.available} available")
        blocks = [self._free.popleft() if self._free else self._evict() for _ in range(count)]
        self._holders.update(dict.fromkeys(blocks, 1))
        return blocks

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._block_of[self._hash_of.pop(block)]
        return block

    def match(self, hashes: Iterable[BlockHash]) -> list[int]:
        """The longest run of blocks, from the first hash on, whose content is held. Changes nothing."""
        blocks: list[int] = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """Hold blocks that `match` found, with those who hold them already."""
        for block in blocks:
            self._cached.pop(block, None)
            self._holders[block] = self._holders.get(block, 0) + 1

    def publish(self, block: int, block_hash: BlockHash) -> None:
        """Make a live, full block findable. A second block of the same content stays private."""
        if block_hash not in self._block_of and block not in self._hash_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def release(self, blocks: Sequence[int]) -> None:
        """Let go. Tails are given up before heads, so that a common prefix outlives its continuations."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            del self._holders[block]
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def clear(self) -> None:
        """Forget every cached block."""
        while self._cached:
            self._free.append(self._evict())
