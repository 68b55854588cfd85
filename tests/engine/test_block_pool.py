"""The block pool under random use: nothing lost, nothing shared by accident."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nybble.engine.block_pool import BlockPool, hash_blocks


class PoolMachine(RuleBasedStateMachine):
    """Sequences of random prefixes come and go; a model of who holds what stands beside the pool."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)
        self.held: list[tuple[list[int], list[bytes]]] = []
        self.content: dict[int, bytes] = {}  # what each block was published as

    @rule(tokens=st.lists(st.integers(0, 1), min_size=4, max_size=20))
    def start(self, tokens: list[int]) -> None:
        hashes = hash_blocks(tokens, 4)
        shared = self.pool.match(hashes)
        assert [self.content[b] for b in shared] == hashes[: len(shared)]
        wanted = -(-len(tokens) // 4) - len(shared)
        idle = sum(1 for b in shared if not self.pool.is_live(b))
        if wanted > self.pool.available - idle:
            return
        self.pool.acquire(shared)
        blocks = shared + self.pool.allocate(wanted)
        self.held.append((blocks, hashes))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        blocks, hashes = data.draw(st.sampled_from(self.held))
        for block, block_hash in zip(blocks, hashes, strict=False):
            self.pool.publish(block, block_hash)
            if self.pool.match([block_hash]) == [block]:
                self.content[block] = block_hash

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        blocks, _ = self.held.pop(index)
        self.pool.release(blocks)

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        assert self.pool.cached == 0

    @invariant()
    def counts_add_up(self) -> None:
        assert self.pool.live + self.pool.cached + self.pool.free == self.pool.total

    @invariant()
    def live_blocks_are_those_held(self) -> None:
        holders = Counter(b for blocks, _ in self.held for b in blocks)
        assert self.pool.live == len(holders)

    @invariant()
    def blocks_are_shared_only_as_a_common_prefix(self) -> None:
        owners: dict[int, tuple[int, bytes]] = {}
        for blocks, hashes in self.held:
            for index, block in enumerate(blocks):
                key = hashes[index] if index < len(hashes) else b""
                assert owners.setdefault(block, (index, key)) == (index, key)
                owners[block] = (index, key)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_pool = PoolMachine.TestCase


def test_allocating_too_much_takes_nothing() -> None:
    pool = BlockPool(3)
    with pytest.raises(MemoryError, match="4 blocks wanted, 3 available"):
        pool.allocate(4)
    assert pool.free == 3


def test_the_least_recently_used_block_goes_first() -> None:
    pool = BlockPool(2)
    hashes = hash_blocks([1, 2], 1)
    for block_hash in hashes:
        (block,) = pool.allocate(1)
        pool.publish(block, block_hash)
        pool.release([block])
    pool.allocate(1)
    assert pool.match([hashes[0]]) == []
    assert pool.match([hashes[1]]) != []


def test_a_released_head_outlives_its_tail() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    hashes = hash_blocks(list(range(3)), 1)
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.publish(block, block_hash)
    pool.release(blocks)
    pool.allocate(1)
    assert pool.match(hashes) == blocks[:2]


def test_hashes_cover_the_whole_prefix_and_the_salt() -> None:
    first, second = hash_blocks([1, 2, 3, 4], 2), hash_blocks([9, 2, 3, 4], 2)
    assert len(first) == 2
    assert first[1] != second[1], "the second block has equal tokens and another past"
    assert hash_blocks([1, 2], 2, salt="a") != hash_blocks([1, 2], 2, salt="b")
    assert hash_blocks([1, 2, 3], 2) == first[:1], "a part of a block has no hash"
