"""Many slots on one context: admits, feeds prompts in chunks, steps, evicts; nothing else.

Knows no text, no requests and no order of waiting: whoever holds a queue asks `admit` until it says no.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from model.decoding.planning import Plan
from model.decoding.step import Base, Slot, step


class Batch:
    """The slots that share the passes of one context.

    places: slots at a time, each with as many sequence ids of its own as the plan has lanes; cells: tokens that the
    cache holds for all of them; chunk: the most prompt tokens that are fed between two passes, so that a long prompt
    doesn't hold up the running texts.
    """

    def __init__(self, base: Base, plan: Plan, *, places: int, cells: int, chunk: int = 512) -> None:
        lanes = plan.lanes
        assert places * lanes <= base.n_seq_max, f"{places} slots of {lanes} lanes, {base.n_seq_max} sequences"
        self._base, self._plan, self._chunk = base, plan, chunk
        self._beside = plan.max_nodes - 1  # cells that a draft takes beside its slot's text
        self._free_cells = cells
        self._free_lanes = [range(i * lanes, (i + 1) * lanes) for i in reversed(range(places))]
        self._feeding: deque[tuple[Slot, int]] = deque()  # slots with prompts, and how much of them is in the cache
        self._running: list[Slot] = []

    def __len__(self) -> int:
        """How many slots there are, fed or running."""
        return len(self._feeding) + len(self._running)

    @property
    def running(self) -> int:
        """How many slots the last pass left running."""
        return len(self._running)

    def admit(self, slot: Slot) -> bool:
        """Take a slot in, giving it its lanes; False where there is no place, or no room for all it may come to hold.

        So no pass ever finds the cache full. A slot that wouldn't fit into an empty cache is refused for ever.
        """
        needed = slot.limit + self._beside
        if not self._free_lanes or needed > self._free_cells:
            return False
        slot.lanes = self._free_lanes.pop()
        self._free_cells -= needed
        self._feeding.append((slot, 0))
        return True

    def step(self) -> list[Slot]:
        """Feed a chunk of prompts, take every running slot one pass further; return those that finished, evicted."""
        self._feed()
        if not self._running:
            return []
        step(self._base, self._running, self._plan)
        finished = [slot for slot in self._running if slot.finished]
        for slot in finished:
            self.evict(slot)
        return finished

    def evict(self, slot: Slot) -> None:
        """Free the place and the cells of a slot, finished or not."""
        self._running = [other for other in self._running if other is not slot]
        self._feeding = deque(pair for pair in self._feeding if pair[0] is not slot)
        for lane in slot.lanes:
            self._base.seq_rm(lane, 0, -1)
        self._free_lanes.append(slot.lanes)
        self._free_cells += slot.limit + self._beside

    def _feed(self) -> None:
        """Decode prompts, but their last tokens, which root the first steps: first come, first fed."""
        room = self._chunk
        while self._feeding and room:
            slot, done = self._feeding.popleft()
            prompt = len(slot.tokens) - 1
            piece = slot.tokens[done : min(prompt, done + room)]
            self._base.prefill(np.array(piece, np.int32), done, slot.lanes.start)
            room -= len(piece)
            done += len(piece)
            if done < prompt:
                self._feeding.appendleft((slot, done))
                return
            for lane in slot.lanes[1:]:
                self._base.seq_cp(slot.lanes.start, lane, 0, prompt)
            self._running.append(slot)
