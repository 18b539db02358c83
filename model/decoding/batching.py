"""Many slots on one context: admits, feeds prompts in chunks, steps, evicts; nothing else.

Knows no text, no requests and no order of waiting: whoever holds a queue asks `admit` until it says no.

A prompt that begins like a text in the cache takes over its cells (`seq_cp` copies no data): those of a finished text
where these are kept, of a running one, or of a prompt that is being fed beside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import numpy.typing as npt

from model.decoding.planning import Plan
from model.decoding.slot import Slot
from model.decoding.step import Base, step

LEAST_CHUNK = 16  # prompt tokens at once, however slow they are
IDLE = 5  # times the stall that a prompt may make where nobody waits for a pass: commands wait all the same
# Steps of other texts, each of which looks at all cells, that have cost what reading a kept text again would: 700 for
# the bundled model (0.33 ms to read a token, 0.5 us to look at a cell), 1,700 at the cost of 1 B parameters.
PATIENCE = 1000
Look = Callable[[npt.NDArray[np.float32]], None]
MUCH = 0.5  # of a kept text that a prompt shares: then it may have that text's place, else it copies


@dataclass(eq=False)
class _Place:
    """Sequence ids, and what they hold: a running text, a prompt that is being fed, or a finished text that is kept."""

    lanes: range
    slot: Slot | None = None
    tokens: list[int] = field(default_factory=list)  # in the cache, and those to come; of a slot, its own list
    done: int = 0  # how many of them are in the cache while the slot does not run; in the first lane at least
    running: bool = False
    fresh: bool = False  # its slot reads its whole prompt
    look: Look | None = None
    used: int = 0  # when, in steps of texts

    @property
    def cached(self) -> int:
        return len(self.tokens) - 1 if self.running else self.done


class Batch:
    """The slots that share the passes of one context.

    places: slots at a time, each with sequence ids of its own. cells: tokens that the cache holds for all of them.
    chunk: the most prompt tokens between two passes, so that a long prompt doesn't hold up the running texts; stall_s:
    the most seconds that they may take, going by those before (0: whatever they take).
    keep: leave finished texts in the cache until room is needed or nobody has come back to them for long, and let
    prompts that begin alike share cells.
    """

    def __init__(
        self,
        base: Base,
        plan: Plan,
        *,
        places: int,
        cells: int,
        chunk: int = 512,
        stall_s: float = 0.0,
        keep: bool = False,
    ) -> None:
        lanes = plan.lanes
        assert places * lanes <= base.n_seq_max, f"{places} slots of {lanes} lanes, {base.n_seq_max} sequences"
        self._base, self._plan, self._cells, self._chunk, self._keep = base, plan, cells, chunk, keep
        self._beside = plan.max_nodes - 1  # cells that a draft takes beside its slot's text
        self._places = [_Place(range(i * lanes, (i + 1) * lanes)) for i in range(places)]
        self._feeding: deque[_Place] = deque()
        self._running: list[_Place] = []
        self._rows = 0  # texts' steps so far
        self._stall_s, self._token_s = stall_s, 0.0  # seconds of one prompt token among many

    def __len__(self) -> int:
        """How many slots there are, fed or running."""
        return len(self._feeding) + len(self._running)

    @property
    def running(self) -> int:
        """How many slots are past their prompts."""
        return len(self._running)

    @property
    def cached(self) -> int:
        """Tokens in the cache; those that texts share are counted for each of them."""
        return sum(place.cached for place in self._places)

    @property
    def reserved(self) -> int:
        """Cells that are in use or promised."""
        return sum(self._held(place) for place in self._places)

    def _held(self, place: _Place) -> int:
        return place.done if place.slot is None else place.slot.limit + self._beside

    def admit(self, slot: Slot, *, fresh: bool = False, look: Look | None = None) -> bool:
        """Take a slot in, giving it its lanes; False where there is no place, or no room for all it may come to hold.

        So no pass ever finds the cache full. Cells that texts share are counted for each of them. A slot that wouldn't
        fit into an empty cache is refused for ever. fresh: read the whole prompt, whatever is in the cache. look: is
        shown the logits behind each prompt token but the last, a view of some rows at a time; implies fresh.
        A slot whose limit is its prompt wins nothing: it is finished once the prompt is read.
        """
        needed = slot.limit + self._beside
        free = [place for place in self._places if place.slot is None]
        kept = sum(place.done for place in free)
        if not free or needed > self._cells - self.reserved + kept:
            return False
        place, fresh = self._choose(free, slot), fresh or look is not None
        shared = 0 if fresh else _common(place.tokens, slot.tokens, min(place.done, len(slot.tokens) - 1))
        if place.done > shared:
            for lane in place.lanes:
                self._base.seq_rm(lane, shared, -1)
        slot.lanes, slot.reused = place.lanes, shared
        place.slot, place.tokens, place.done, place.used = slot, slot.tokens, shared, self._rows
        place.fresh, place.look = fresh, look
        self._borrow(place)
        for other in sorted(free, key=lambda place: place.used):
            if other is not place and other.done and self.reserved > self._cells:
                self._empty(other)
        self._feeding.append(place)
        return True

    def _choose(self, free: list[_Place], slot: Slot) -> _Place:
        """Return the place whose text the slot goes on with, else an empty one, else the one used longest ago."""

        def shared(place: _Place) -> int:
            return _common(place.tokens, slot.tokens, min(place.done, len(slot.tokens) - 1))

        best = max(free, key=shared)
        if best.done and shared(best) > MUCH * best.done:
            return best
        return min(free, key=lambda place: (place.done > 0, place.used))

    def _borrow(self, place: _Place) -> None:
        """Let a slot whose prompt is not in the cache have the cells of any text that begins as it does."""
        if not self._keep or place.fresh:
            return
        assert place.slot is not None
        most, donor, prompt = place.done, place, len(place.tokens) - 1
        for other in self._places:
            if other is not place and other.cached > most:
                shared = _common(other.tokens, place.tokens, min(other.cached, prompt))
                if shared > most:
                    most, donor = shared, other
        if donor is not place:
            self._base.seq_cp(donor.lanes.start, place.lanes.start, place.done, most)
            place.slot.reused += most - place.done
            place.done = most

    def step(self) -> list[Slot]:
        """Feed a chunk of prompts, take every running slot one pass further; return those that finished, evicted."""
        self._feed()
        slots = [place.slot for place in self._running if place.slot is not None]
        writing = [slot for slot in slots if len(slot.tokens) < slot.limit]
        if writing:
            self._rows += len(writing)
            step(self._base, writing, self._plan)
            self._forget()
        finished = [slot for slot in slots if slot.finished or len(slot.tokens) >= slot.limit]
        for slot in finished:
            slot.finished = True
            self.evict(slot)
        return finished

    def evict(self, slot: Slot) -> None:
        """Free the place of a slot, finished or not; its cells go too, or are kept until room is needed."""
        place = next(place for place in self._places if place.slot is slot)
        place.done, place.tokens = place.cached, slot.tokens[: place.cached]
        place.slot, place.running, place.used = None, False, self._rows
        self._running = [other for other in self._running if other is not place]
        self._feeding = deque(other for other in self._feeding if other is not place)
        if not self._keep:
            self._empty(place)

    def clear(self) -> None:
        """Empty the places that hold finished texts."""
        for place in self._places:
            if place.slot is None and place.done:
                self._empty(place)

    def _forget(self) -> None:
        """Empty the places whose texts, unused, have cost more time than reading them again takes."""
        for place in self._places:
            if place.slot is None and place.done and self._rows - place.used > PATIENCE:
                self._empty(place)

    def _empty(self, place: _Place) -> None:
        for lane in place.lanes:
            self._base.seq_rm(lane, 0, -1)
        place.tokens, place.done = [], 0

    def _feed(self) -> None:
        """Decode a chunk of prompts, but their last tokens, which root the first steps; long prompts take turns."""
        room, began = self._room(), perf_counter()
        while self._feeding and room:
            place = self._feeding.popleft()
            self._borrow(place)
            prompt = len(place.tokens) - 1
            piece = place.tokens[place.done : min(prompt, place.done + room)]
            if piece:
                self._read(place, np.array(piece, np.int32))
                if len(piece) >= LEAST_CHUNK:
                    self._token_s = (perf_counter() - began) / len(piece)
                room -= len(piece)
                began = perf_counter()
                place.done += len(piece)
            if place.done < prompt:
                self._feeding.append(place)
                return
            for lane in place.lanes[1:]:
                self._base.seq_cp(place.lanes.start, lane, 0, prompt)
            assert place.slot is not None
            place.slot.began, place.running = perf_counter(), True
            self._running.append(place)

    def _read(self, place: _Place, piece: npt.NDArray[np.int32]) -> None:
        if place.look is None:
            self._base.prefill(piece, place.done, place.lanes.start)
            return
        self._base.want_states(False)
        self._base.decode(piece, place.done, place.lanes.start, outputs=True)
        place.look(self._base.logits(len(piece)))

    def _room(self) -> int:
        """Return how many prompt tokens may be fed now."""
        if not self._stall_s:
            return self._chunk
        if not self._token_s:
            return min(self._chunk, 2 * LEAST_CHUNK)
        most = self._stall_s * (1 if self._running else IDLE) / self._token_s
        return min(self._chunk, max(LEAST_CHUNK, int(most)))


def _common(a: Sequence[int], b: Sequence[int], most: int) -> int:
    """Return how many of the first `most` tokens are the same in both, from the first on."""
    low, high = 0, most
    while low < high:  # slices compare at C speed
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
