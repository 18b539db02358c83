"""The KV cache divided into slots: sequence ids, room, shared prefixes.

Knows no queue, no drafts and no logits. A slot is a range of llama.cpp's sequence ids, and belongs
to a sequence while that runs. Sequences that run at the same time share the cells of what they
begin with; what a finished one leaves moves to host memory (`prompt_cache`), so that only running
sequences have cells.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.decoding.prompt_cache import PromptCache, common_prefix
from model.decoding.sequence import Sequence
from model.decoding.tree_cache import Cache

# A saved sequence so many times as long as what a prompt shares with it is not restored: reading a
# token takes as long as restoring 300 (bundled model) to 1,800 of them (SmolLM2-135M).
MAX_RESTORED = 64
# Fewer free cells between running sequences are left there: llama.cpp looks at them in blocks of
# so many.
MIN_GAP = 256


@dataclass(eq=False, kw_only=True)
class KVSlot:
    """Some sequence ids and what they hold.

    n_prefilled: how many of its sequence's tokens are in the first id while the prompt is read.
    running: its prompt is in the cache.
    """

    seq_ids: range
    sequence: Sequence | None = None
    n_prefilled: int = 0
    running: bool = False

    @property
    def tokens(self) -> list[int]:
        """Those in the cache, and those still to come: the list of its sequence."""
        return self.sequence.tokens if self.sequence else []

    @property
    def n_cached(self) -> int:
        """How many of its tokens are in the cache."""
        return len(self.tokens) - 1 if self.running else self.n_prefilled


class KVSlots:
    """All slots of one context.

    ids_per_slot: sequence ids of each. n_cells: tokens that the cache holds for all of them.
    n_spare: cells that a draft takes beside its sequence's tokens. prompt_cache: what finished
    sequences leave; None: nothing, and prompts that begin alike share no cells.
    """

    def __init__(
        self,
        cache: Cache,
        n_slots: int,
        *,
        ids_per_slot: int,
        n_cells: int,
        n_spare: int,
        prompt_cache: PromptCache | None,
    ) -> None:
        n_ids = n_slots * ids_per_slot
        assert n_ids <= cache.n_seq_max, (
            f"{n_slots} slots of {ids_per_slot} ids, {cache.n_seq_max} sequences"
        )
        self._cache = cache
        self._n_cells = n_cells
        self._n_spare = n_spare
        self._prompt_cache = prompt_cache
        self._slots = [
            KVSlot(seq_ids=range(first, first + ids_per_slot))
            for first in range(0, n_ids, ids_per_slot)
        ]

    @property
    def n_cached(self) -> int:
        """Tokens in the cache; those that slots share are counted for each of them."""
        return sum(slot.n_cached for slot in self._slots)

    @property
    def n_reserved(self) -> int:
        """Cells that are promised to running sequences."""
        return sum(self._needed(slot.sequence) for slot in self._slots if slot.sequence is not None)

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
        room = self._n_cells - self.n_reserved
        if not free or self._needed(sequence) > room:
            return None
        slot = free[0]
        slot.sequence = sequence
        slot.n_prefilled = 0
        sequence.seq_ids = slot.seq_ids
        sequence.n_reused = 0
        self._restore(slot, sequence, room)
        self.share_prefix(slot)
        return slot

    def _restore(self, slot: KVSlot, sequence: Sequence, room: int) -> None:
        """Bring back the saved prefix that a prompt begins with, if no running one shares more.

        room: cells that nobody else is promised; what is behind the prefix takes some for a moment.
        """
        if self._prompt_cache is None or not sequence.use_prefix_cache:
            return
        saved, shared = self._prompt_cache.longest(slot.tokens, len(slot.tokens) - 1)
        n_saved = len(saved.tokens) if saved else 0
        if saved is None or n_saved > min(room, MAX_RESTORED * shared):
            return
        if shared <= self._longest_running(slot)[1]:
            return
        self._prompt_cache.touch(saved)
        first = slot.seq_ids.start
        if self._cache.restore_state(first, saved.state):
            self._cache.seq_rm(first, shared, -1)
            slot.n_prefilled = shared
            sequence.n_reused = shared

    def share_prefix(self, slot: KVSlot) -> None:
        """Take over the cells of the slot that shares the longest prefix with this one's prompt."""
        sequence = slot.sequence
        assert sequence is not None
        if self._prompt_cache is None or not sequence.use_prefix_cache:
            return
        donor, most = self._longest_running(slot)
        if most > slot.n_prefilled:
            self._cache.seq_cp(donor.seq_ids.start, slot.seq_ids.start, slot.n_prefilled, most)
            sequence.n_reused += most - slot.n_prefilled
            slot.n_prefilled = most

    def _longest_running(self, slot: KVSlot) -> tuple[KVSlot, int]:
        """Return the other slot that shares the longest prefix with a prompt, and its length.

        The prompt's last token is never one of them.
        """
        donor = slot
        most = 0
        to_read = len(slot.tokens) - 1
        for other in self._slots:
            if other is not slot and other.n_cached > most:
                shared = common_prefix(other.tokens, slot.tokens, min(other.n_cached, to_read))
                if shared > most:
                    most = shared
                    donor = other
        return donor, most

    def start(self, slot: KVSlot) -> None:
        """Give all ids of a slot the prompt that its first one holds: now it can be stepped."""
        self._spread(slot)
        slot.running = True

    def _spread(self, slot: KVSlot) -> None:
        first = slot.seq_ids.start
        for seq_id in slot.seq_ids[1:]:
            self._cache.seq_cp(first, seq_id, 0, slot.n_cached)

    def release(self, slot: KVSlot) -> None:
        """Take a slot from its sequence; what it has in the cache is saved, and its cells go."""
        freed = slot.n_cached
        self._save(slot)
        self._remove(slot)
        slot.sequence = None
        slot.n_prefilled = 0
        slot.running = False
        if freed >= MIN_GAP and 0 < self.n_cached <= freed:
            self._move_down()

    def _save(self, slot: KVSlot) -> None:
        tokens = slot.tokens[: slot.n_cached]
        kept = self._prompt_cache
        if kept is None or kept.covers(tokens):
            return
        first = slot.seq_ids.start
        if kept.has_room_for(self._cache.state_bytes(first)):
            kept.add(tokens, self._cache.save_state(first))

    def _move_down(self) -> None:
        """Move what runs to the lowest cells.

        llama.cpp looks at all cells up to the highest one in use, so a sequence that sits behind
        the cells of one that has finished would pay for them as long as it runs.
        """
        moved = [slot for slot in self._slots if slot.n_cached]
        states = [self._cache.save_state(slot.seq_ids.start) for slot in moved]
        for slot in moved:
            self._remove(slot)
        for slot, state in zip(moved, states, strict=True):
            restored = self._cache.restore_state(slot.seq_ids.start, state)
            assert restored, "there was room before"
            if slot.running:
                self._spread(slot)

    def clear(self) -> None:
        """Drop everything that finished sequences have left."""
        if self._prompt_cache is not None:
            self._prompt_cache.clear()

    def _remove(self, slot: KVSlot) -> None:
        for seq_id in slot.seq_ids:
            self._cache.seq_rm(seq_id, 0, -1)
