"""Samples and their states in, batches of training positions out.

A head reads one state only (and the tokens after it), so a batch is a row of positions, whichever
samples they come from: packed to the brim, without padding; positions that no head learns from (a
prompt's) are left out. Knows neither files nor heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.training.data.samples import Sample
from model.training.states.extraction import States


@dataclass(frozen=True)
class Batch:
    """Positions to train on: what heads read, and what they should draft.

    tokens: (N, K) int64, the text after each position, the next token first. targets: (N, K) int64,
    what the heads should draft, one place further on; -1 where there is nothing to learn. around:
    (P, D), the positions' states, in the type they are stored in, and those of the positions after
    them that decide the targets. places: (N,) int64, where in `around` the positions are: what
    decides targets[n, k] is around[places[n] + 1 + k].
    """

    around: Tensor
    places: Tensor
    tokens: Tensor
    targets: Tensor

    @property
    def states(self) -> Tensor:
        """Return the states (N, D) that heads read."""
        return self.around[self.places]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, rows: slice) -> Batch:
        """Return some rows, neighbours all, with no more around them than they need."""
        places = self.places[rows]
        targets = self.targets[rows]
        if not len(places):
            return Batch(self.around[:0], places, self.tokens[rows], targets)
        first = int(places[0])
        behind = int(places[-1]) + targets.shape[1] + 1
        return Batch(self.around[first:behind], places - first, self.tokens[rows], targets)

    @classmethod
    def join(cls, parts: Sequence[Batch]) -> Batch:
        """Put batches one after another."""
        starts = np.cumsum([0, *(len(part.around) for part in parts)]).tolist()
        return cls(
            around=torch.cat([part.around for part in parts]),
            places=torch.cat([p.places + start for p, start in zip(parts, starts, strict=False)]),
            tokens=torch.cat([part.tokens for part in parts]),
            targets=torch.cat([part.targets for part in parts]),
        )


def head_targets(sample: Sample, k_heads: int) -> npt.NDArray[np.int64]:
    """Return the targets (T, K) of one sample: head i (from 1) at position t drafts token t+1+i."""
    wanted = np.where(sample.mask, sample.tokens, -1).astype(np.int64)
    return _windows(wanted[2:], k_heads, -1)[: len(wanted)]


def next_tokens(sample: Sample, k_heads: int) -> npt.NDArray[np.int64]:
    """Return the tokens (T, K) after each position of one sample; 0 beyond its end."""
    return _windows(sample.tokens[1:].astype(np.int64), k_heads, 0)[: len(sample.tokens)]


def _windows(row: npt.NDArray[np.int64], width: int, beyond: int) -> npt.NDArray[np.int64]:
    padded = np.concatenate([row, np.full(width + 1, beyond)])
    return np.lib.stride_tricks.sliding_window_view(padded, width)


class Batches:
    """The positions of some samples, in batches of at most `size`, all about as large."""

    def __init__(self, states: States, indices: Sequence[int], k_heads: int, size: int) -> None:
        self._states = states
        self._k_heads = k_heads
        self._indices = np.array(indices, np.int64)
        self._counts = np.zeros(len(states.samples), np.int64)  # positions to learn, by sample
        for i in indices:
            targets = head_targets(states.samples[i], k_heads)
            self._counts[i] = (targets >= 0).any(axis=1).sum()
        self.n_positions = int(self._counts.sum())
        self._n_batches = -(-self.n_positions // size)
        # All as large: a last batch of a few positions would shake the weights.
        self._size = -(-self.n_positions // max(1, self._n_batches))

    def __len__(self) -> int:
        return self._n_batches

    def epoch(self, seed: Sequence[int] | None = None, since: int = 0) -> Iterator[Batch]:
        """Yield the batches number `since` and later, samples mixed by the seed (None: not)."""
        order = self._indices
        if seed is not None:
            order = np.random.default_rng(seed).permutation(order)
        # The sample in which the batch `since` begins, and how many of its positions are over.
        ends = np.cumsum(self._counts[order])
        first = int(np.searchsorted(ends, since * self._size, side="right"))
        skip = since * self._size
        if first:
            skip -= int(ends[first - 1])

        parts: list[Batch] = []
        held = -skip
        for rows in self._rows(order.tolist(), first):
            parts.append(rows)
            held += len(rows)
            if held >= self._size:
                whole = Batch.join(parts)[skip:]
                skip = 0
                full = len(whole) - len(whole) % self._size
                for start in range(0, full, self._size):
                    yield whole[start : start + self._size]
                parts = [whole[full:]]
                held = len(whole) - full
        if held > 0:
            yield Batch.join(parts)[skip:]

    def _rows(self, order: list[int], first: int) -> Iterator[Batch]:
        """Yield each sample's positions that teach something."""
        dim = 0
        missing = (
            0  # positions without states before the first states: their width is not known yet
        )
        for i, states in zip(order[first:], self._states.read(order, first), strict=True):
            targets = head_targets(self._states.samples[i], self._k_heads)
            learnt = np.flatnonzero((targets >= 0).any(axis=1))
            if states is None:
                missing += len(learnt)
                continue
            dim = states.shape[1]
            if missing:
                yield self._nothing(missing, dim, states.dtype)
                missing = 0
            read = learnt[:, None] + np.arange(self._k_heads + 1)
            needed = np.unique(np.minimum(read, len(targets) - 1))
            tokens = next_tokens(self._states.samples[i], self._k_heads)
            yield Batch(
                around=states[torch.from_numpy(needed)],
                places=torch.from_numpy(np.searchsorted(needed, learnt)),
                tokens=torch.from_numpy(tokens[learnt]),
                targets=torch.from_numpy(targets[learnt]),
            )
        if missing and dim:
            yield self._nothing(missing, dim, torch.float16)

    def _nothing(self, n: int, dim: int, dtype: torch.dtype) -> Batch:
        """Return rows that keep the place of a sample whose states cannot be used."""
        tokens = torch.zeros((n, self._k_heads), dtype=torch.int64)
        return Batch(
            around=torch.zeros((n, dim), dtype=dtype),
            places=torch.arange(n),
            tokens=tokens,
            targets=torch.full_like(tokens, -1),
        )
