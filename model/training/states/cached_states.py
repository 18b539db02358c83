"""The cache of hidden states: safetensors shards, filled once, resumed after a kill at any point.

A cache folder holds `manifest.json`, `states-00000.safetensors` …, `lock` and `manifest.lock`.
Several processes of one run fill it together, each its own shards. Knows nothing of heads.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import safetensors
import torch
from torch import Tensor
from tqdm import tqdm

from model.errors import DataError
from model.storage.disk_room import free_bytes, human_size, require_room, require_writable
from model.storage.folder_lock import WriterLock
from model.training.data.samples import Sample
from model.training.ranks import ALONE, Ranks
from model.training.states.extraction import StateBase, decode_states
from model.training.states.manifest import CacheKey, add_to_manifest, recall_shards
from model.training.states.shards import SHARD_BYTES, Shard, ShardBuilder, plan_shards

QUEUE = 8  # batches that may wait for the writer
BYTES = {"fp16": 2, "fp8": 1}
SCALE_BYTES = 4  # of each row in fp8
BAR = (
    "{desc} {percentage:3.0f}% |{bar:30}| {n_fmt}/{total_fmt} tokens, {rate_noinv_fmt}, "
    "{remaining} left"
)
OpenBase = Callable[[], AbstractContextManager[StateBase]]


class CachedStates:
    """States in finished shards on disk."""

    def __init__(self, folder: Path, samples: list[Sample], shards: list[Shard]) -> None:
        self.samples = samples
        self._files = [
            safetensors.safe_open(folder / shard.file, framework="pt") for shard in shards
        ]
        # Where each sample's rows lie: shard, first row, the row behind the last one.
        self._rows = np.zeros((len(samples), 3), np.int64)
        self._rejected = {i for shard in shards for i in shard.rejected}
        for number, shard in enumerate(shards):
            ends = np.cumsum(shard.lengths)
            rows = self._rows[shard.first_sample : shard.first_sample + len(ends)]
            rows[:, 0] = number
            rows[:, 1] = ends - shard.lengths
            rows[:, 2] = ends
        if len(self._rejected) == len(samples):
            raise DataError(
                f"{folder}: the states of all samples hold NaN or Inf; there is nothing to train on"
            )

    def read(self, order: Sequence[int], since: int = 0) -> Iterator[Tensor | None]:
        """See States.read. Yields float16, or float32 where fp8 is stored."""
        for i in order[since:]:
            if i in self._rejected:
                yield None
                continue
            number, start, end = self._rows[i].tolist()
            file = self._files[number]
            states: Tensor = file.get_slice("states")[start:end]
            if states.dtype == torch.float8_e4m3fn:
                states = states.float() * file.get_slice("scales")[start:end][:, None]
            yield states


def cached_states(
    open_base: OpenBase,
    dim: int,
    samples: list[Sample],
    folder: Path,
    key: CacheKey,
    *,
    data_source: str = "",
    shard_bytes: int = SHARD_BYTES,
    ranks: Ranks = ALONE,
) -> CachedStates:
    """Return the states (T, D=dim) of all samples; extract those that the folder doesn't hold.

    ranks: each process of the run calls this, extracts its share of the shards and gets them all.
    Raises DataError when the folder belongs to other data, another run writes there, or processes
    don't see each other's files; OutputError when the disk is full or not writable.
    """
    row_bytes = dim * BYTES[key.dtype] + (SCALE_BYTES if key.dtype == "fp8" else 0)
    shards = plan_shards(samples, row_bytes, shard_bytes)
    n_tokens = sum(shard.n_tokens for shard in shards)
    with contextlib.ExitStack() as locked:
        # The first process makes the folder, for all of them.
        if ranks.first:
            _require_room(folder, row_bytes * n_tokens)
            locked.enter_context(WriterLock(folder))
            for left in folder.glob(".states-*"):  # half a shard, where a process was killed
                left.unlink()
        ranks.wait()

        # Each process fills its share of the shards.
        mine = shards[ranks.rank :: ranks.count]
        recall_shards(folder, key, mine)
        header = {
            "format_version": 1, "key": asdict(key), "data_source": data_source, "dim": dim,
            "samples": len(samples), "tokens": n_tokens,
        }  # fmt: skip
        if any(not shard.sha256 for shard in mine):
            _extract(open_base, samples, folder, mine, header)

        # All learn what the others have written, and see that it is there.
        for rank, theirs in enumerate(ranks.gather([asdict(shard) for shard in mine])):
            shards[rank :: ranks.count] = [Shard(**shard) for shard in theirs]
        missing = [shard.file for shard in shards if not (folder / shard.file).is_file()]
        if missing:
            raise DataError(
                f"{folder / missing[0]}: not seen here; all machines must see the same --cache_dir"
            )
        ranks.wait()  # nobody gives up the lock before
    return CachedStates(folder, samples, shards)


def _require_room(folder: Path, n_bytes: int) -> None:
    """Print what the states need, and raise OutputError when the disk has less; makes nothing."""
    require_writable(folder)
    there = sum(path.stat().st_size for path in folder.glob("states-*.safetensors"))
    free = free_bytes(folder)
    click.echo(
        f"states need {human_size(n_bytes)} in {folder} "
        f"({human_size(free)} free, {human_size(there)} there)"
    )
    require_room(
        folder, n_bytes - there,
        advice="use --cache_dtype fp8, --cache off, --max_tokens or another --cache_dir",
    )  # fmt: skip


def _extract(
    open_base: OpenBase,
    samples: Sequence[Sample],
    folder: Path,
    shards: list[Shard],
    header: dict[str, Any],
) -> None:
    """Fill those shards that are missing: this thread decodes, another one converts and writes."""
    missing = [shard for shard in shards if not shard.sha256]
    pending: collections.deque[Future[None]] = collections.deque()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # conversions must not fight with llama.cpp's threads
    total = sum(shard.n_tokens for shard in shards)
    there = total - sum(shard.n_tokens for shard in missing)
    bar = tqdm(
        total=total, initial=there, desc="states", unit=" tokens", unit_scale=True, bar_format=BAR,
        mininterval=0.5,
    )  # fmt: skip

    def finish(builder: ShardBuilder) -> None:
        add_to_manifest(folder, header, builder.finish(folder, samples))

    with open_base() as base, ThreadPoolExecutor(1) as writer, bar:
        try:
            for shard in missing:
                builder = ShardBuilder(shard, header["dim"], header["key"]["dtype"])
                mine = samples[shard.first_sample : shard.first_sample + len(shard.lengths)]
                for block in decode_states(base, mine):
                    pending.append(writer.submit(builder.add, block.copy()))
                    while len(pending) > QUEUE:
                        pending.popleft().result()
                    bar.update(len(block))
                pending.append(writer.submit(finish, builder))
            for future in pending:
                future.result()
        finally:
            writer.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
