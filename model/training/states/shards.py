"""A shard of a states cache: a safetensors file with the states of some samples.

fp16, or fp8 (e4m3) with a scale per token. Knows nothing of manifests and of who reads shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor

from model.storage.whole_file import whole_file
from model.training.data.samples import Sample
from model.training.states.extraction import Rows

SHARD_BYTES = 64 << 20
MAX_SHARDS = 512  # all of them stay mapped while training
F16_MAX = 65504.0
F8_MAX = 448.0


@dataclass(kw_only=True)
class Shard:
    """One finished file: which samples' states it holds, one after the other."""

    file: str
    first_sample: int
    lengths: list[int]
    sha256: str = ""
    rejected: list[int] = field(default_factory=list)  # samples whose states held NaN or Inf

    @property
    def n_tokens(self) -> int:
        """Return the number of rows."""
        return sum(self.lengths)


def plan_shards(samples: Sequence[Sample], row_bytes: int, shard_bytes: int) -> list[Shard]:
    """Divide samples into shards of about shard_bytes, always the same way for the same samples."""
    total = sum(len(sample.tokens) for sample in samples) * row_bytes
    limit = max(shard_bytes, -(-total // MAX_SHARDS))
    shards: list[Shard] = []
    size = limit
    for i, sample in enumerate(samples):
        if size >= limit:
            file = f"states-{len(shards):05}.safetensors"
            shards.append(Shard(file=file, first_sample=i, lengths=[]))
            size = 0
        shards[-1].lengths.append(len(sample.tokens))
        size += len(sample.tokens) * row_bytes
    return shards


def to_float8(rows: Rows, peaks: npt.NDArray[np.float32]) -> tuple[Tensor, Tensor]:
    """Return e4m3 values (n, D) and a scale per row (n,).

    peaks: (n,), each row's largest absolute value. A row of zeros gets scale 1. Values are at most
    2^-4 of themselves, or 2^-10 of the row's scale, off.
    """
    usable = (peaks > 0) & np.isfinite(peaks)
    scales = torch.from_numpy(np.where(usable, peaks / F8_MAX, 1).astype(np.float32))
    return (torch.from_numpy(rows) / scales[:, None]).to(torch.float8_e4m3fn), scales


class ShardBuilder:
    """Collects one shard's rows and writes it whole; lives in the writer's thread."""

    def __init__(self, shard: Shard, dim: int, dtype: str) -> None:
        kind = {"fp16": torch.float16, "fp8": torch.float8_e4m3fn}[dtype]
        self.shard = shard
        self.dtype = dtype
        self.n_rows = 0  # so far
        self.tensors = {"states": torch.zeros((shard.n_tokens, dim), dtype=kind)}
        if dtype == "fp8":
            self.tensors["scales"] = torch.ones(shard.n_tokens)
        self.good = np.zeros(shard.n_tokens, np.bool_)

    def add(self, rows: Rows) -> None:
        """Convert and keep the next rows (n, D)."""
        here = slice(self.n_rows, self.n_rows + len(rows))
        peaks = np.abs(rows).max(axis=1)  # NaN and Inf go through
        if self.dtype == "fp16":
            self.good[here] = peaks <= F16_MAX
            with np.errstate(over="ignore", invalid="ignore"):
                self.tensors["states"].numpy()[here] = rows
        else:
            self.good[here] = np.isfinite(peaks)
            values, scales = to_float8(rows, peaks)
            self.tensors["states"][here] = values
            self.tensors["scales"][here] = scales
        self.n_rows += len(rows)

    def finish(self, folder: Path, samples: Sequence[Sample]) -> Shard:
        """Write the shard whole; return it with its checksum and the samples that were rejected."""
        assert self.n_rows == self.shard.n_tokens
        ends = np.cumsum(self.shard.lengths)
        bad = np.unique(np.searchsorted(ends, np.flatnonzero(~self.good), side="right"))
        for number in bad.tolist():
            self._reject(number, int(ends[number]), samples)
        data = safetensors.torch.save(self.tensors)
        self.shard.sha256 = hashlib.sha256(data).hexdigest()
        with whole_file(folder / self.shard.file) as new:
            new.write_bytes(data)
        return self.shard

    def _reject(self, number: int, end: int, samples: Sequence[Sample]) -> None:
        """Leave a sample's rows, which end before `end`, empty. number: in this shard."""
        rows = slice(end - self.shard.lengths[number], end)
        states = self.tensors["states"]
        states[rows] = torch.zeros(1).to(states.dtype)
        sample = self.shard.first_sample + number
        self.shard.rejected.append(sample)
        click.echo(
            f"sample {samples[sample].name}: its states hold NaN, Inf or more than {self.dtype} "
            "holds; never trained on",
            err=True,
        )
