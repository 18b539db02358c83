"""Hidden states that are never kept: extracted whenever they are read (`--cache off`).

Knows neither files nor heads.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import click
import numpy as np
import torch
from torch import Tensor

from model.training.data.samples import Sample
from model.training.states.extraction import Rows, StateBase, decode_states

GROUP = 8  # samples that are extracted together; a resumed run starts at a border between groups
AHEAD = 2  # groups that wait for the trainer at most


class StreamedStates:
    """States made anew in each epoch; close before the base.

    One thread, the only one that uses the base, extracts a few groups ahead of their reader.
    """

    def __init__(self, base: StateBase, samples: list[Sample]) -> None:
        self.samples = samples
        self._base = base
        self._reported: set[int] = set()  # samples whose states were found to be no numbers
        self._worker = ThreadPoolExecutor(1)
        self._stop = threading.Event()

    def read(self, order: Sequence[int], since: int = 0) -> Iterator[Tensor | None]:
        """See States.read. No more than AHEAD + 1 groups of samples are held at a time."""
        stop = self._stop = threading.Event()
        groups: collections.deque[Future[Rows]] = collections.deque()
        starts = range(since - since % GROUP, len(order), GROUP)
        try:
            for number, start in enumerate(starts):
                # Ask for the groups ahead, then wait for the one that is next.
                for ahead in starts[number + len(groups) : number + 1 + AHEAD]:
                    group = order[ahead : ahead + GROUP]
                    groups.append(self._worker.submit(self._extract, group, stop))
                rows = groups.popleft().result()
                first_row = 0
                for place, i in enumerate(order[start : start + GROUP], start):
                    states = rows[first_row : first_row + len(self.samples[i].tokens)]
                    first_row += len(states)
                    if place >= since:
                        yield self._checked(i, states)
        finally:
            stop.set()
            for waiting in groups:
                waiting.cancel()

    def close(self) -> None:
        """End the thread, within a batch."""
        self._stop.set()
        self._worker.shutdown(cancel_futures=True)

    def _extract(self, group: Sequence[int], stop: threading.Event) -> Rows:
        """Return a group's states, sample by sample; nobody needs them once `stop` is set."""
        blocks = []
        for block in decode_states(self._base, [self.samples[i] for i in group]):
            blocks.append(block.copy())
            if stop.is_set():
                break
        return np.concatenate(blocks)

    def _checked(self, i: int, states: Rows) -> Tensor | None:
        if np.isfinite(states).all():
            return torch.from_numpy(states)
        if i not in self._reported:
            self._reported.add(i)
            click.echo(
                f"sample {self.samples[i].name}: its states hold NaN or Inf; not trained on",
                err=True,
            )
        return None
