"""One shard of a states cache: a safetensors file with the states of some samples, one after the other.

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

from model.base.whole_file import whole_file
from model.training.extraction import Rows
from model.training.text import Sample

SHARD_BYTES = 64 << 20
MAX_SHARDS = 512  # all of them stay mapped while training
F16_MAX, F8_MAX = 65504.0, 448.0


@dataclass
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
            shards.append(Shard(f"states-{len(shards):05}.safetensors", i, []))
            size = 0
        shards[-1].lengths.append(len(sample.tokens))
        size += len(sample.tokens) * row_bytes
    return shards


def to_float8(rows: Rows, peaks: npt.NDArray[np.float32]) -> tuple[Tensor, Tensor]:
    """Return e4m3 values (n, D) and a scale per row (n,); peaks: (n,), each row's largest absolute value.

    A row of zeros gets scale 1; values are at most 2^-4 of themselves, or 2^-10 of the row's scale, off.
    """
    scales = torch.from_numpy(np.where((peaks > 0) & np.isfinite(peaks), peaks / F8_MAX, 1).astype(np.float32))
    return (torch.from_numpy(rows) / scales[:, None]).to(torch.float8_e4m3fn), scales


class ShardBuilder:
    """Collects one shard's rows and writes it whole; lives in the writer's thread."""

    def __init__(self, shard: Shard, dim: int, dtype: str) -> None:
        kind = {"fp16": torch.float16, "fp8": torch.float8_e4m3fn}[dtype]
        self.shard, self.dtype, self.at = shard, dtype, 0
        self.tensors = {"states": torch.zeros((shard.n_tokens, dim), dtype=kind)}
        if dtype == "fp8":
            self.tensors["scales"] = torch.ones(shard.n_tokens)
        self.good = np.zeros(shard.n_tokens, np.bool_)

    def add(self, rows: Rows) -> None:
        """Convert and keep the next rows (n, D)."""
        here = slice(self.at, self.at + len(rows))
        peaks = np.abs(rows).max(axis=1)  # NaN and Inf go through
        if self.dtype == "fp16":
            self.good[here] = peaks <= F16_MAX
            with np.errstate(over="ignore", invalid="ignore"):
                self.tensors["states"].numpy()[here] = rows
        else:
            self.good[here] = np.isfinite(peaks)
            self.tensors["states"][here], self.tensors["scales"][here] = to_float8(rows, peaks)
        self.at += len(rows)

    def finish(self, folder: Path, samples: Sequence[Sample]) -> Shard:
        """Write the shard whole: temporary name, fsync, rename."""
        assert self.at == self.shard.n_tokens
        ends = np.cumsum(self.shard.lengths)
        bad = np.unique(np.searchsorted(ends, np.flatnonzero(~self.good), side="right"))
        for number in bad.tolist():
            rows = slice(int(ends[number]) - self.shard.lengths[number], int(ends[number]))
            self.tensors["states"][rows] = torch.zeros(1).to(self.tensors["states"].dtype)
            self.shard.rejected.append(self.shard.first_sample + number)
            name = samples[self.shard.first_sample + number].name
            click.echo(
                f"sample {name}: its states hold NaN, Inf or more than {self.dtype} takes; never trained on", err=True
            )
        data = safetensors.torch.save(self.tensors)
        self.shard.sha256 = hashlib.sha256(data).hexdigest()
        with whole_file(folder / self.shard.file) as draft:
            draft.write_bytes(data)
        return self.shard
