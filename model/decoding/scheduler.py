"""The scheduler: waiting → chunked prefill → running.

One loop for one sequence and for many (continuous batching). Knows neither requests nor text. Which
cells a sequence gets is `kv_slots`' business, what a step does `step`'s.
"""

from __future__ import annotations

from collections import deque
from time import perf_counter

import numpy as np

from model.decoding.draft_policy import DraftPolicy
from model.decoding.kv_slots import KVSlot, KVSlots
from model.decoding.prompt_cache import PromptCache
from model.decoding.sequence import Sequence
from model.decoding.step import Base, step
from model.errors import ContextError

MIN_CHUNK = 16  # prompt tokens between two steps, however slow they are
# Times max_stall_s that a chunk may take where no sequence runs: then only new and aborted
# sequences wait for it.
IDLE_STALLS = 5


class Scheduler:
    """The sequences that share the steps of one context, first come, first served.

    max_running: sequences at a time, each with seq_ids of its own. n_cells: tokens that the KV
    cache holds for all of them. prefill_chunk: the most prompt tokens between two steps, so that a
    long prompt doesn't hold up the running sequences. max_stall_s: the most seconds that they may
    take, going by those before; 0: whatever they take. prompt_cache: see KVSlots.
    """

    def __init__(
        self,
        base: Base,
        policy: DraftPolicy,
        *,
        max_running: int,
        n_cells: int,
        prefill_chunk: int = 512,
        max_stall_s: float = 0.0,
        prompt_cache: PromptCache | None = None,
    ) -> None:
        self._base = base
        self._policy = policy
        self.kv_slots = KVSlots(
            base,
            max_running,
            ids_per_slot=policy.max_leaves,
            n_cells=n_cells,
            n_spare=policy.max_nodes - 1,
            prompt_cache=prompt_cache,
        )
        self._prefill_chunk = prefill_chunk
        self._max_stall_s = max_stall_s
        self._prompt_token_s = 0.0  # seconds of one prompt token among many, as last seen
        self._waiting: deque[Sequence] = deque()
        self._prefilling: deque[KVSlot] = deque()
        self._running: dict[Sequence, KVSlot] = {}

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences that have no slot yet, the next one first."""
        return list(self._waiting)

    @property
    def n_admitted(self) -> int:
        """Sequences that have a slot: in prefill or running."""
        return len(self._prefilling) + len(self._running)

    @property
    def n_running(self) -> int:
        """Sequences past their prefill."""
        return len(self._running)

    @property
    def has_unfinished(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._running or self._prefilling or self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises ContextError where the cache could not hold it even if it were empty.
        """
        if not self.kv_slots.may_ever_fit(sequence):
            raise ContextError(
                f"the KV cache has no room for a sequence of {sequence.max_length} tokens"
            )
        self._waiting.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Drop a sequence wherever it stands; one that is finished or unknown is no error."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence in self._running:
            self._release(sequence)
        else:
            for slot in [slot for slot in self._prefilling if slot.sequence is sequence]:
                self._prefilling.remove(slot)
                self.kv_slots.release(slot)

    def step(self) -> list[Sequence]:
        """Admit, prefill a chunk, step every running sequence; return those that finished.

        A sequence whose max_length is its prompt gets no token: it is
        finished once the prompt is read.
        """
        if self._waiting:
            self._admit()
        if self._prefilling:
            self._prefill()
        unfinished = [each for each in self._running if each.finish_reason is None]
        if unfinished:
            step(self._base, unfinished, self._policy)
        finished = [each for each in self._running if each.finish_reason is not None]
        for sequence in finished:
            self._release(sequence)
        return finished

    def _admit(self) -> None:
        """Give waiting sequences slots, in their order, as far as there are slots and cells."""
        while self._waiting:
            slot = self.kv_slots.acquire(self._waiting[0])
            if slot is None:
                return
            self._waiting.popleft().admitted_at = perf_counter()
            self._prefilling.append(slot)

    def _prefill(self) -> None:
        """Decode a chunk of prompts but their last tokens, which root the first steps.

        Long prompts take turns.
        """
        room = self._chunk()
        while self._prefilling and room:
            slot = self._prefilling.popleft()
            sequence = slot.sequence
            assert sequence is not None
            # another prompt that begins alike may have got further meanwhile
            self.kv_slots.share_prefix(slot)
            to_read = sequence.n_prompt - 1
            piece = slot.tokens[slot.n_prefilled : min(to_read, slot.n_prefilled + room)]
            if piece:
                self._read(sequence, piece, slot.n_prefilled)
                slot.n_prefilled += len(piece)
                room -= len(piece)
            if slot.n_prefilled < to_read:
                self._prefilling.append(slot)
                return
            self.kv_slots.start(slot)
            self._running[sequence] = slot
            sequence.prefilled_at = perf_counter()
            if len(sequence.tokens) >= sequence.max_length:
                sequence.finish_reason = "length"

    def _read(self, sequence: Sequence, piece: list[int], start: int) -> None:
        """Decode prompt tokens into the sequence's first id.

        Show their logits where they are wanted.
        """
        began = perf_counter()
        tokens = np.array(piece, np.int32)
        seq_id = sequence.seq_ids.start
        if sequence.wants_prompt_logits:
            self._base.want_states(False)
            self._base.decode(tokens, start, seq_id, outputs=True)
            sequence.add_prompt_logits(self._base.logits(len(piece)))
        else:
            self._base.prefill(tokens, start, seq_id)
        if len(piece) >= MIN_CHUNK:
            self._prompt_token_s = (perf_counter() - began) / len(piece)

    def _chunk(self) -> int:
        """Return how many prompt tokens may be read now."""
        if not self._max_stall_s:
            return self._prefill_chunk
        if not self._prompt_token_s:
            return min(self._prefill_chunk, 2 * MIN_CHUNK)
        stall_s = self._max_stall_s if self._running else IDLE_STALLS * self._max_stall_s
        return min(self._prefill_chunk, max(MIN_CHUNK, int(stall_s / self._prompt_token_s)))

    def _release(self, sequence: Sequence) -> None:
        self.kv_slots.release(self._running.pop(sequence))
