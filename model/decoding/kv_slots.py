"""The KV cache divided into slots: sequence ids, prefix cache, eviction.

Knows no queue, no drafts and no logits. A slot is a range of llama.cpp's sequence ids. It belongs
to a sequence while that runs; afterwards it may keep the sequence's cells, so that a prompt that
begins alike need not be read again. Taking over cells copies no data.
"""

from __future__ import annotations

import collections.abc as abc
from dataclasses import dataclass, field

from model.decoding.sequence import Sequence
from model.decoding.tree_cache import Cache

# Steps of other sequences, each of which looks at all cells, that have cost what reading a kept
# prefix again would: 700 for the bundled model (0.33 ms to read a token, 0.5 us to look at a cell),
# 1,700 at the cost of 1 B parameters.
CACHE_TTL_STEPS = 1000
# of a kept prefix: a prompt that shares less takes a copy, and the prefix keeps its slot
MIN_SHARED_TO_REUSE = 0.5


@dataclass(eq=False, kw_only=True)
class KVSlot:
    """Some sequence ids and what they hold.

    tokens: in the cache, and those still to come; while a sequence has the slot, its own list.
    n_prefilled: how many of them are in the cache while no sequence runs here, in the first id at
    least. running: its prompt is in the cache. last_used: in steps of sequences.
    """

    seq_ids: range
    sequence: Sequence | None = None
    tokens: list[int] = field(default_factory=list)
    n_prefilled: int = 0
    running: bool = False
    last_used: int = 0

    @property
    def n_cached(self) -> int:
        """How many of its tokens are in the cache."""
        return len(self.tokens) - 1 if self.running else self.n_prefilled


class KVSlots:
    """All slots of one context.

    ids_per_slot: sequence ids of each. n_cells: tokens that the cache holds for all of them.
    n_spare: cells that a draft takes beside its sequence's tokens. prefix_cache: keep what finished
    sequences leave until room is needed or nobody has come back to it for long, and let prompts
    that begin alike share cells.
    """

    def __init__(
        self,
        cache: Cache,
        n_slots: int,
        *,
        ids_per_slot: int,
        n_cells: int,
        n_spare: int,
        prefix_cache: bool,
    ) -> None:
        n_ids = n_slots * ids_per_slot
        assert n_ids <= cache.n_seq_max, (
            f"{n_slots} slots of {ids_per_slot} ids, {cache.n_seq_max} sequences"
        )
        self._cache = cache
        self._n_cells = n_cells
        self._n_spare = n_spare
        self._prefix_cache = prefix_cache
        self._slots = [
            KVSlot(seq_ids=range(first, first + ids_per_slot))
            for first in range(0, n_ids, ids_per_slot)
        ]
        self._now = 0  # steps of sequences so far

    @property
    def n_cached(self) -> int:
        """Tokens in the cache; those that slots share are counted for each of them."""
        return sum(slot.n_cached for slot in self._slots)

    @property
    def n_reserved(self) -> int:
        """Cells that are in use or promised to running sequences."""
        return sum(self._reserved(slot) for slot in self._slots)

    def _reserved(self, slot: KVSlot) -> int:
        return slot.n_prefilled if slot.sequence is None else self._needed(slot.sequence)

    def _needed(self, sequence: Sequence) -> int:
        return sequence.max_length + self._n_spare

    def may_ever_fit(self, sequence: Sequence) -> bool:
        """Say whether an empty cache has room for all that a sequence may come to."""
        return self._needed(sequence) <= self._n_cells

    def acquire(self, sequence: Sequence) -> KVSlot | None:
        """Give a sequence a slot and its ids, or None where there is no slot or not enough room.

        There is room for all that a sequence may come to, so no step finds the cache full. Cells
        that slots share are counted for each of them.
        """
        free = [slot for slot in self._slots if slot.sequence is None]
        evictable = sum(slot.n_prefilled for slot in free)
        if not free or self._needed(sequence) > self._n_cells - self.n_reserved + evictable:
            return None
        slot = self._choose(free, sequence)
        shared = _shared_prefix(slot, sequence) if sequence.use_prefix_cache else 0
        if slot.n_prefilled > shared:
            self._remove(slot, shared)
        slot.sequence = sequence
        slot.tokens = sequence.tokens
        slot.n_prefilled = shared
        slot.last_used = self._now
        sequence.seq_ids = slot.seq_ids
        sequence.n_reused = shared
        self.share_prefix(slot)
        # make room: the least recently used first
        for other in sorted(free, key=lambda kept: kept.last_used):
            if other is not slot and other.n_prefilled and self.n_reserved > self._n_cells:
                self._evict(other)
        return slot

    def _choose(self, free: abc.Sequence[KVSlot], sequence: Sequence) -> KVSlot:
        """Return the slot that the prompt goes on with, else an empty one, else the oldest one."""
        best = max(free, key=lambda slot: _shared_prefix(slot, sequence))
        shared = _shared_prefix(best, sequence)
        if best.n_prefilled and shared > MIN_SHARED_TO_REUSE * best.n_prefilled:
            return best
        return min(free, key=lambda slot: (slot.n_prefilled > 0, slot.last_used))

    def share_prefix(self, slot: KVSlot) -> None:
        """Take over the cells of the slot that shares the longest prefix with this one's prompt."""
        sequence = slot.sequence
        assert sequence is not None
        if not (self._prefix_cache and sequence.use_prefix_cache):
            return
        most = slot.n_prefilled
        donor = slot
        to_read = len(slot.tokens) - 1
        for other in self._slots:
            if other is not slot and other.n_cached > most:
                shared = common_prefix(other.tokens, slot.tokens, min(other.n_cached, to_read))
                if shared > most:
                    most = shared
                    donor = other
        if donor is not slot:
            self._cache.seq_cp(donor.seq_ids.start, slot.seq_ids.start, slot.n_prefilled, most)
            sequence.n_reused += most - slot.n_prefilled
            slot.n_prefilled = most

    def start(self, slot: KVSlot) -> None:
        """Give all ids of a slot the prompt that its first one holds: now it can be stepped."""
        first = slot.seq_ids.start
        for seq_id in slot.seq_ids[1:]:
            self._cache.seq_cp(first, seq_id, 0, slot.n_prefilled)
        slot.running = True

    def release(self, slot: KVSlot) -> None:
        """Take a slot from its sequence; its cells are kept for the prefix cache, or go too."""
        n_cached = slot.n_cached
        slot.tokens = slot.tokens[:n_cached]
        slot.n_prefilled = n_cached
        slot.sequence = None
        slot.running = False
        slot.last_used = self._now
        if not self._prefix_cache:
            self._evict(slot)

    def note_steps(self, n_sequences: int) -> None:
        """Count a step, and evict prefixes that have cost more than reading them again takes."""
        self._now += n_sequences
        for slot in self._slots:
            if (
                slot.sequence is None
                and slot.n_prefilled
                and self._now - slot.last_used > CACHE_TTL_STEPS
            ):
                self._evict(slot)

    def clear(self) -> None:
        """Evict everything that finished sequences have left."""
        for slot in self._slots:
            if slot.sequence is None and slot.n_prefilled:
                self._evict(slot)

    def _evict(self, slot: KVSlot) -> None:
        self._remove(slot, 0)
        slot.tokens = []
        slot.n_prefilled = 0

    def _remove(self, slot: KVSlot, start: int) -> None:
        for seq_id in slot.seq_ids:
            self._cache.seq_rm(seq_id, start, -1)


def _shared_prefix(slot: KVSlot, sequence: Sequence) -> int:
    """Return how many cached tokens of an unused slot a sequence begins with.

    Its last token is never one of them.
    """
    return common_prefix(
        slot.tokens, sequence.tokens, min(slot.n_prefilled, len(sequence.tokens) - 1)
    )


def common_prefix(a: list[int], b: list[int], most: int) -> int:
    """Return how many of the first `most` tokens are the same in both, from the first on."""
    low = 0
    high = most
    while low < high:  # slices compare at C speed
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
