"""Who runs in the next step: first come, first served, within the blocks and the token budget.

Plain Python: importing this needs no torch.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush

from nybble.engine.block_pool import BlockPool, hash_blocks
from nybble.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prompt positions `[start, stop)` of one sequence."""

    sequence: Sequence
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: every decoding sequence moves by one token, and some prompts by a chunk."""

    decode: list[Sequence] = field(default_factory=list)
    prefill: list[Chunk] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return len(self.decode) + sum(c.stop - c.start for c in self.prefill)


class Scheduler:
    """Sequences wait, run, and are taken back when blocks run out (the youngest first)."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        max_sequences: int,
        max_tokens: int,
        prefix_cache: bool = True,
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self.max_sequences = max_sequences
        self.max_tokens = max_tokens
        self.prefix_cache = prefix_cache
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self._slots = list(range(max_sequences))  # free ones, a heap: one sequence alone always has slot 0
        self.preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0

    def add(self, sequence: Sequence) -> None:
        shared = self.prefix_cache and not sequence.request.params.prompt_logprobs
        if shared:
            prompt = sequence.tokens[: sequence.prefill_end]
            sequence.hashes = hash_blocks(prompt, self.block_size, sequence.request.cache_salt)
        self.waiting.append(sequence)

    def plan(self) -> Plan:
        """Choose the next step and reserve its blocks."""
        decode = self._plan_decode()
        budget = self.max_tokens - len(decode)
        chunks: list[Chunk] = []
        for sequence in self.running:
            budget = self._plan_chunk(sequence, budget, chunks)
        while budget > 0 and (admitted := self._admit()) is not None:
            if admitted.prefilling:
                budget = self._plan_chunk(admitted, budget, chunks)
            else:
                decode.append(admitted)
                budget -= 1
        return Plan(decode, chunks)

    def _plan_decode(self) -> list[Sequence]:
        decode: list[Sequence] = []
        for sequence in list(self.running):
            if sequence.prefilling or sequence.complete or sequence not in self.running:
                continue
            if self._make_room(sequence):
                decode.append(sequence)
        return decode

    def _make_room(self, sequence: Sequence) -> bool:
        """Give the sequence a block for its next position, taking back younger ones if need be."""
        while sequence.computed >= len(sequence.blocks) * self.block_size:
            if self.pool.available:
                sequence.blocks += self.pool.allocate(1)
                continue
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(sequence)

    def _plan_chunk(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        size = min(budget, sequence.prefill_end - sequence.computed)
        if size > 0:
            chunks.append(Chunk(sequence, sequence.computed, sequence.computed + size))
            return budget - size
        return budget

    def _admit(self) -> Sequence | None:
        """Start the first waiting sequence if its tokens fit, with the cached blocks it can share.

        One that was preempted with a token in flight waits for that token: it is replayed like the others.
        """
        if not self.waiting or len(self.running) >= self.max_sequences or self.waiting[0].in_flight:
            return None
        sequence = self.waiting[0]
        shared = self.pool.match(sequence.hashes)
        wanted = -(-len(sequence.tokens) // self.block_size) - len(shared)
        reused = sum(1 for block in shared if not self.pool.is_live(block))
        if wanted > self.pool.available - reused:
            return None
        self.waiting.popleft()
        self.pool.acquire(shared)
        sequence.blocks = shared + self.pool.allocate(wanted)
        sequence.computed = len(shared) * self.block_size
        sequence.published = len(shared)
        sequence.slot = heappop(self._slots)
        if not sequence.started_at:
            sequence.started_at = time.monotonic()
            sequence.cached_tokens = sequence.computed
            self.prefix_query_tokens += len(sequence.hashes) * self.block_size
            self.prefix_hit_tokens += sequence.computed
        self.running.append(sequence)
        return sequence

    def commit(self, sequence: Sequence, computed: int) -> None:
        """Note that positions up to `computed` hold keys and values; full prompt blocks become findable."""
        sequence.computed = computed
        full = min(computed // self.block_size, len(sequence.hashes))
        for index in range(sequence.published, full):
            self.pool.publish(sequence.blocks[index], sequence.hashes[index])
        sequence.published = max(sequence.published, full)

    def remove(self, sequence: Sequence) -> None:
        """Finished, failed or aborted: free what it holds."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = sequence.published = 0
        if sequence.slot >= 0:
            heappush(self._slots, sequence.slot)
        sequence.slot, sequence.opened = -1, False
