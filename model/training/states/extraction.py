"""Hidden states from the base model: samples in, packed batches decoded, states out.

Knows neither files nor heads; in which order samples are wanted is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from model.base.llama import LlamaBase
from model.base.llama_model import LlamaModel
from model.base.state_reader import StateReader, reads_states
from model.training.data.samples import Sample

Rows = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

N_BATCH = 512  # tokens per decode: llama.cpp keeps the logits of every one (262 MB at V=128k)
N_SEQ = 32  # sequences per decode at most; short samples share a batch


class States(Protocol):
    """Where the trainer gets hidden states from."""

    samples: list[Sample]

    def read(self, order: Sequence[int], since: int = 0) -> Iterator[Tensor | None]:
        """Yield the states (T, D) of the samples order[since:]; None for those with NaN or Inf."""


class StateBase(Protocol):
    """What is needed of a context to extract states; LlamaBase, or a fake in tests."""

    n_batch: int
    n_seq_max: int

    def decode(self, tokens: Ints, pos: Ints, seq: Ints, *, outputs: bool | None = None) -> None:
        """Decode one batch of several sequences."""

    def hidden(self, n: int) -> Rows:
        """Return the states (n, D) of the last batch."""

    def seq_rm(self, seq: int, start: int, end: int) -> None:
        """Remove a sequence from the KV cache."""

    def clear(self) -> None:
        """Empty the KV cache."""


def open_base(
    model: LlamaModel,
    max_length: int,
    n_threads: int,
    *,
    flash_attn: bool | None = None,
    kv_type: str = "f16",
) -> LlamaBase:
    """Return the context that states are extracted in: without the LM head wherever that works."""
    n_ctx = max_length + N_BATCH  # a full batch beside a sample that began in an earlier one
    options: dict[str, Any] = {
        "n_ctx": n_ctx,
        "n_threads": n_threads,
        "n_seq_max": N_SEQ,
        "n_batch": N_BATCH,
        "flash_attn": flash_attn,
        "kv_type": kv_type,
    }
    if reads_states(model, n_threads):
        return StateReader(model, **options)
    return LlamaBase(model, embeddings=True, **options)


@dataclass(frozen=True)
class Packed:
    """One batch of several sequences: tokens, pos, seq: (n,) int32.

    finished: sequences that end in it.
    """

    tokens: Ints
    pos: Ints
    seq: Ints
    finished: list[int]


def pack(rows: Sequence[Ints], n_batch: int, n_seq: int) -> Iterator[Packed]:
    """Fill batches to the brim with the samples' tokens, in order.

    A sample that doesn't fit goes on in the next batch.
    """
    row = 0
    start = 0  # of what is left of the row
    while row < len(rows):
        pieces: list[tuple[int, int, int]] = []  # row, from, to
        room = n_batch
        while row < len(rows) and room and len(pieces) < n_seq:
            end = min(start + room, len(rows[row]))
            pieces.append((row, start, end))
            room -= end - start
            start = end
            if end == len(rows[row]):
                row += 1
                start = 0
        seqs = np.array([r % n_seq for r, _, _ in pieces], np.int32)
        yield Packed(
            tokens=np.concatenate([rows[r][a:b] for r, a, b in pieces]),
            pos=np.concatenate([np.arange(a, b, dtype=np.int32) for _, a, b in pieces]),
            seq=np.repeat(seqs, [b - a for _, a, b in pieces]),
            finished=[r % n_seq for r, _, b in pieces if b == len(rows[r])],
        )


def decode_states(base: StateBase, samples: Sequence[Sample]) -> Iterator[Rows]:
    """Yield the states of all samples' tokens, in order, a block (n, D) per batch.

    Blocks are views, valid until the next one. Begins with an empty cache, so that the same samples
    give the same bits whatever was decoded before.
    """
    base.clear()
    for batch in pack([sample.tokens for sample in samples], base.n_batch, base.n_seq_max):
        base.decode(batch.tokens, batch.pos, batch.seq, outputs=True)
        yield base.hidden(len(batch.tokens))
        for seq in batch.finished:
            base.seq_rm(seq, -1, -1)
