"""Hidden states from the base model: samples in, packed batches decoded, states out.

Knows neither files nor heads; in which order samples are wanted is decided elsewhere.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import click
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.base.llama import LlamaBase
from model.base.llama_model import LlamaModel
from model.training.text import Sample

Rows = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

N_BATCH = 512  # tokens per decode: llama.cpp keeps the logits of every one (262 MB at V=128k)
N_SEQ = 32  # sequences per decode at most; short samples share a batch
STREAM_GROUP = 8  # samples that are streamed together; a resumed run starts at a border between groups
AHEAD = 2  # groups that wait for the trainer at most


class States(Protocol):
    """Where the trainer gets hidden states from."""

    samples: list[Sample]

    def read(self, order: Sequence[int], since: int = 0) -> Iterator[Tensor | None]:
        """Yield the states (T, D) of the samples order[since:]; None for those that hold NaN or Inf."""


class StateBase(Protocol):
    """What is needed of a context to extract states; LlamaBase, or a fake in tests."""

    n_batch: int
    n_seq_max: int

    def decode(self, tokens: Ints, pos: Ints, seq: Ints, *, outputs: bool | None = None) -> None:
        """Decode one batch of several sequences."""

    def hidden(self, n: int) -> Rows:
        """Return the states (n, D) of the last batch."""

    def seq_rm(self, seq: int, start: int, end: int) -> None:
        """Take a sequence from the cache."""

    def clear(self) -> None:
        """Empty the cache."""


def open_base(
    model: LlamaModel,
    max_length: int,
    n_threads: int,
    *,
    flash_attn: bool | None = None,
    kv_type: str = "f16",
    embeddings: bool = True,
) -> LlamaBase:
    """Return the context that states are extracted in; without embeddings, for comparison only."""
    n_ctx = max_length + N_BATCH  # room for a full batch beside a sample that began in an earlier one
    return LlamaBase(
        model, n_ctx=n_ctx, n_threads=n_threads, n_seq_max=N_SEQ, n_batch=N_BATCH, embeddings=embeddings,
        flash_attn=flash_attn, kv_type=kv_type,
    )  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """One batch of several sequences: tokens, pos, seq: (n,) int32; finished: sequences that end in it."""

    tokens: Ints
    pos: Ints
    seq: Ints
    finished: list[int]


def pack(rows: Sequence[Ints], n_batch: int, n_seq: int) -> Iterator[Packed]:
    """Fill batches to the brim with the samples' tokens, in order; one that doesn't fit goes on in the next batch."""
    row, at = 0, 0
    while row < len(rows):
        pieces: list[tuple[int, int, int]] = []  # row, from, to
        room = n_batch
        while row < len(rows) and room and len(pieces) < n_seq:
            end = min(at + room, len(rows[row]))
            pieces.append((row, at, end))
            room -= end - at
            row, at = (row + 1, 0) if end == len(rows[row]) else (row, end)
        yield Packed(
            np.concatenate([rows[r][a:b] for r, a, b in pieces]),
            np.concatenate([np.arange(a, b, dtype=np.int32) for _, a, b in pieces]),
            np.repeat(np.array([r % n_seq for r, _, _ in pieces], np.int32), [b - a for _, a, b in pieces]),
            [r % n_seq for r, _, b in pieces if b == len(rows[r])],
        )


def decode_states(base: StateBase, samples: Sequence[Sample]) -> Iterator[Rows]:
    """Yield the states of all samples' tokens, in order, a block (n, D) per batch: views, valid until the next one.

    Begins with an empty cache, so that the same samples give the same bits whatever was decoded before.
    """
    base.clear()
    for batch in pack([sample.tokens for sample in samples], base.n_batch, base.n_seq_max):
        base.decode(batch.tokens, batch.pos, batch.seq, outputs=True)
        yield base.hidden(len(batch.tokens))
        for seq in batch.finished:
            base.seq_rm(seq, -1, -1)


class StreamedStates:
    """States that are never kept: extracted whenever they are read (`--cache off`).

    One thread, the only one that uses the base, extracts a few groups ahead of their reader. Close before the base.
    """

    def __init__(self, base: StateBase, samples: list[Sample]) -> None:
        self.base, self.samples = base, samples
        self._told: set[int] = set()
        self._worker = ThreadPoolExecutor(1)
        self._stop = threading.Event()

    def read(self, order: Sequence[int], since: int = 0) -> Iterator[Tensor | None]:
        """See States.read. No more than AHEAD + 1 groups of samples are held at a time."""
        stop = self._stop = threading.Event()
        groups: collections.deque[Future[Rows]] = collections.deque()
        starts = range(since - since % STREAM_GROUP, len(order), STREAM_GROUP)
        try:
            for number, start in enumerate(starts):
                for ahead in starts[number + len(groups) : number + 1 + AHEAD]:
                    groups.append(self._worker.submit(self._extract, order[ahead : ahead + STREAM_GROUP], stop))
                rows, at = groups.popleft().result(), 0
                for place, i in enumerate(order[start : start + STREAM_GROUP], start):
                    states = rows[at : at + len(self.samples[i].tokens)]
                    at += len(states)
                    if place >= since:
                        yield self._checked(i, states)
        finally:
            stop.set()
            for group in groups:
                group.cancel()

    def close(self) -> None:
        """End the thread, within a batch."""
        self._stop.set()
        self._worker.shutdown(cancel_futures=True)

    def _extract(self, group: Sequence[int], stop: threading.Event) -> Rows:
        """Return a group's states, one sample after the other; nobody waits for them once `stop` is set."""
        blocks = []
        for block in decode_states(self.base, [self.samples[i] for i in group]):
            blocks.append(block.copy())
            if stop.is_set():
                break
        return np.concatenate(blocks)

    def _checked(self, i: int, states: Rows) -> Tensor | None:
        if np.isfinite(states).all():
            return torch.from_numpy(states)
        if i not in self._told:
            self._told.add(i)
            click.echo(f"sample {self.samples[i].name}: its states hold NaN or Inf; not trained on", err=True)
        return None
