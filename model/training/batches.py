"""Samples and their states in, batches of training positions out.

A head looks at one state only (and at the tokens behind it), so a batch is a row of positions, whichever samples they
come from: packed to the brim, without padding; positions that no head learns from (a prompt's) are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.training.extraction import States
from model.training.text import Sample


@dataclass(frozen=True)
class Batch:
    """tokens: (N, K) int64, the text behind each position, the next token first; targets: (N, K) int64, what the heads
    should draft, one place further; -1 where there is nothing to learn.

    around: (P, D), the positions' states, in the type they are stored in, and those of the positions behind them that
    decide the targets; places: (N,) int64, where the first stand among them. What decides targets[n, k] is
    around[places[n] + 1 + k].
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
        places, targets = self.places[rows], self.targets[rows]
        first, last = (int(places[0]), int(places[-1])) if len(places) else (0, -1 - targets.shape[1])
        return Batch(self.around[first : last + targets.shape[1] + 1], places - first, self.tokens[rows], targets)

    @classmethod
    def join(cls, parts: Sequence[Batch]) -> Batch:
        """Put batches behind each other."""
        starts = np.cumsum([0, *(len(p.around) for p in parts)]).tolist()
        places = [p.places + start for p, start in zip(parts, starts, strict=False)]
        columns = ([p.around for p in parts], places, [p.tokens for p in parts], [p.targets for p in parts])
        return cls(*(torch.cat(column) for column in columns))


def head_targets(sample: Sample, k_heads: int) -> npt.NDArray[np.int64]:
    """Return the targets (T, K) of one sample: head i (from 1) at position t drafts the token at t+1+i."""
    wanted = np.where(sample.mask, sample.tokens, -1).astype(np.int64)
    return _windows(wanted[2:], k_heads, -1)[: len(wanted)]


def following_tokens(sample: Sample, k_heads: int) -> npt.NDArray[np.int64]:
    """Return the tokens (T, K) behind each position of one sample; 0 beyond its end."""
    return _windows(sample.tokens[1:].astype(np.int64), k_heads, 0)[: len(sample.tokens)]


def _windows(row: npt.NDArray[np.int64], width: int, beyond: int) -> npt.NDArray[np.int64]:
    padded = np.concatenate([row, np.full(width + 1, beyond)])
    return np.lib.stride_tricks.sliding_window_view(padded, width)


class Batches:
    """The positions of some samples, in batches of at most `size`, all about as large."""

    def __init__(self, states: States, indices: Sequence[int], k_heads: int, size: int) -> None:
        self._states, self._k_heads = states, k_heads
        self._indices = np.array(indices, np.int64)
        self._counts = np.zeros(len(states.samples), np.int64)
        for i in indices:
            self._counts[i] = (head_targets(states.samples[i], k_heads) >= 0).any(axis=1).sum()
        self.n_positions = int(self._counts.sum())
        self._n_batches = -(-self.n_positions // size)
        self._size = -(-self.n_positions // max(1, self._n_batches))  # a last batch of a few would shake the weights

    def __len__(self) -> int:
        return self._n_batches

    def epoch(self, seed: Sequence[int] | None = None, since: int = 0) -> Iterator[Batch]:
        """Yield the batches number `since` and later, samples mixed by the seed (None: in their order)."""
        order = self._indices if seed is None else np.random.default_rng(seed).permutation(self._indices)
        ends = np.cumsum(self._counts[order])
        first = int(np.searchsorted(ends, since * self._size, side="right"))
        skip = since * self._size - (int(ends[first - 1]) if first else 0)
        parts: list[Batch] = []
        held = -skip
        for rows in self._rows(order.tolist(), first):
            parts.append(rows)
            held += len(rows)
            if held >= self._size:
                whole = Batch.join(parts)[skip:]
                skip = 0
                full = len(whole) - len(whole) % self._size
                for at in range(0, full, self._size):
                    yield whole[at : at + self._size]
                parts, held = [whole[full:]], len(whole) - full
        if held > 0:
            yield Batch.join(parts)[skip:]

    def _rows(self, order: list[int], first: int) -> Iterator[Batch]:
        """Yield each sample's positions that teach something."""
        dim = 0
        missing = 0  # positions without states before the first states: their width is not known yet
        for i, states in zip(order[first:], self._states.read(order, first), strict=True):
            targets = head_targets(self._states.samples[i], self._k_heads)
            at = np.flatnonzero((targets >= 0).any(axis=1))
            if states is None:
                missing += len(at)
                continue
            dim = states.shape[1]
            if missing:
                yield self._nothing(missing, dim, states.dtype)
                missing = 0
            needed = np.unique(np.minimum(at[:, None] + np.arange(self._k_heads + 1), len(targets) - 1))
            tokens = following_tokens(self._states.samples[i], self._k_heads)
            rows = (np.searchsorted(needed, at), tokens[at], targets[at])
            yield Batch(states[torch.from_numpy(needed)], *map(torch.from_numpy, rows))
        if missing and dim:
            yield self._nothing(missing, dim, torch.float16)

    def _nothing(self, n: int, dim: int, dtype: torch.dtype) -> Batch:
        """Return rows that keep the place of a sample whose states cannot be used."""
        tokens = torch.zeros((n, self._k_heads), dtype=torch.int64)
        return Batch(torch.zeros((n, dim), dtype=dtype), torch.arange(n), tokens, torch.full_like(tokens, -1))
