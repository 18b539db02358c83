"""The cache of hidden states: safetensors shards with a manifest, filled once, resumed after a kill at any point.

A cache folder holds `manifest.json`, `states-00000.safetensors` …, `lock` and `manifest.lock`. Several processes of one
run fill it together, each its own shards. Knows nothing of heads.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from model.base.whole_file import human_size, whole_file
from model.errors import DataError, OutputError
from model.training.extraction import StateBase, decode_states
from model.training.ranks import ALONE, Ranks
from model.training.shards import SHARD_BYTES, Shard, ShardBuilder, plan_shards
from model.training.storage import WriterLock, require_writable
from model.training.text import Sample

QUEUE = 8  # batches that may wait for the writer
BYTES = {"fp16": 2, "fp8": 1}
BAR = "{desc} {percentage:3.0f}% |{bar:30}| {n_fmt}/{total_fmt} tokens, {rate_noinv_fmt}, {remaining} left"


@dataclass(frozen=True)
class CacheKey:
    """What stored states depend on; all of it must be equal before they are used again."""

    base_fingerprint: str
    tokenizer: str
    data_sha256: str
    max_length: int
    dtype: str
    kv_type: str = "f16"

    def folder_name(self) -> str:
        """Return a short name that is different for each key."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


class CachedStates:
    """States in finished shards on disk."""

    def __init__(self, folder: Path, samples: list[Sample], shards: list[Shard]) -> None:
        self.samples = samples
        self._files = [safetensors.safe_open(folder / shard.file, framework="pt") for shard in shards]
        self._place = np.zeros((len(samples), 3), np.int64)  # shard, first row, behind the last row
        self._rejected = {i for shard in shards for i in shard.rejected}
        for number, shard in enumerate(shards):
            ends = np.cumsum(shard.lengths)
            rows = self._place[shard.first_sample : shard.first_sample + len(ends)]
            rows[:, 0], rows[:, 1], rows[:, 2] = number, ends - shard.lengths, ends
        if len(self._rejected) == len(samples):
            raise DataError(f"{folder}: the states of all samples hold NaN or Inf; there is nothing to train on")

    def read(self, order: Sequence[int], since: int = 0) -> Iterator[Tensor | None]:
        """See States.read. Yields float16, or float32 where fp8 is stored."""
        for i in order[since:]:
            number, start, end = self._place[i].tolist()
            if i in self._rejected:
                yield None
                continue
            file = self._files[number]
            states: Tensor = file.get_slice("states")[start:end]
            if states.dtype == torch.float8_e4m3fn:
                states = states.float() * file.get_slice("scales")[start:end][:, None]
            yield states


def require_room(folder: Path, n_bytes: int) -> None:
    """Print what the states take, and raise OutputError when the disk has less; makes nothing."""
    require_writable(folder)
    there = sum(path.stat().st_size for path in folder.glob("states-*.safetensors")) if folder.is_dir() else 0
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    click.echo(f"states take {human_size(n_bytes)} in {folder} ({human_size(free)} free, {human_size(there)} there)")
    if n_bytes - there > free:
        raise OutputError(
            f"{folder}: states need {human_size(n_bytes - there)}, {human_size(free)} are free; "
            "use --cache_dtype fp8, --cache off, --max_tokens or another --cache_dir"
        )


def cached_states(
    open_base: Callable[[], AbstractContextManager[StateBase]],
    dim: int,
    samples: list[Sample],
    folder: Path,
    key: CacheKey,
    *,
    data_source: str = "",
    shard_bytes: int = SHARD_BYTES,
    ranks: Ranks = ALONE,
) -> CachedStates:
    """Return the states (T, D=dim) of all samples, extracting those that the folder doesn't hold yet.

    ranks: each process of the run calls this, extracts its share of the shards and gets them all.
    Raises DataError when the folder belongs to other data, another run writes there, or processes don't see each
    other's files; OutputError when the disk is full or not writable.
    """
    row_bytes = dim * BYTES[key.dtype] + (4 if key.dtype == "fp8" else 0)
    shards = plan_shards(samples, row_bytes, shard_bytes)
    with contextlib.ExitStack() as locked:
        if ranks.first:
            require_room(folder, row_bytes * sum(shard.n_tokens for shard in shards))
            locked.enter_context(WriterLock(folder))
            for left in folder.glob(".states-*"):  # half a shard, where a process was killed
                left.unlink()
        ranks.wait()
        mine = shards[ranks.rank :: ranks.count]
        _recall(folder, key, mine)
        manifest = {
            "format_version": 1, "key": asdict(key), "data_source": data_source, "dim": dim, "samples": len(samples),
            "tokens": sum(shard.n_tokens for shard in shards),
        }  # fmt: skip
        if any(not shard.sha256 for shard in mine):
            _extract(open_base, samples, folder, mine, manifest)
        for rank, theirs in enumerate(ranks.gather([asdict(shard) for shard in mine])):
            shards[rank :: ranks.count] = [Shard(**shard) for shard in theirs]
        missing = next((shard.file for shard in shards if not (folder / shard.file).is_file()), None)
        if missing:
            raise DataError(f"{folder / missing}: not seen here; all machines must see the same --cache_dir")
        ranks.wait()  # nobody gives up the lock before
    return CachedStates(folder, samples, shards)


def _recall(folder: Path, key: CacheKey, shards: list[Shard]) -> None:
    """Mark the shards that are there already, whole: in the manifest, with the right checksum."""
    path = folder / "manifest.json"
    if not path.exists():
        return
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = {shard["file"]: Shard(**shard) for shard in manifest["shards"]}
        differences = [name for name, value in asdict(key).items() if manifest["key"].get(name) != value]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged manifest; delete the folder or choose another --cache_dir") from error
    if differences:
        raise DataError(f"{folder}: holds states with another {', '.join(differences)}; choose another --cache_dir")
    for shard in shards:
        old = known.get(shard.file)
        if old is None or not old.sha256 or (old.first_sample, old.lengths) != (shard.first_sample, shard.lengths):
            continue
        if _file_sha256(folder / shard.file) == old.sha256:
            shard.sha256, shard.rejected = old.sha256, old.rejected
        else:
            click.echo(f"{folder / shard.file}: damaged or missing; extracted again", err=True)


def _extract(
    open_base: Callable[[], AbstractContextManager[StateBase]],
    samples: Sequence[Sample],
    folder: Path,
    shards: list[Shard],
    manifest: dict[str, Any],
) -> None:
    """Fill the missing ones of some shards: this thread decodes, another one converts and writes."""
    todo = [shard for shard in shards if not shard.sha256]
    pending: collections.deque[Future[None]] = collections.deque()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # conversions must not fight with llama.cpp's threads
    total = sum(s.n_tokens for s in shards)
    bar = tqdm(total=total, initial=total - sum(s.n_tokens for s in todo), desc="states", unit=" tokens",
               unit_scale=True, bar_format=BAR, mininterval=0.5)  # fmt: skip

    def finish(builder: ShardBuilder) -> None:
        _add_to_manifest(folder, manifest, asdict(builder.finish(folder, samples)))

    with open_base() as base, ThreadPoolExecutor(1) as writer, bar:
        try:
            for shard in todo:
                builder = ShardBuilder(shard, manifest["dim"], manifest["key"]["dtype"])
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


def _add_to_manifest(folder: Path, manifest: dict[str, Any], shard: dict[str, Any]) -> None:
    """Note a finished shard; processes of one run take turns."""
    path = folder / "manifest.json"
    with (folder / "manifest.lock").open("a") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        known = json.loads(path.read_text(encoding="utf-8"))["shards"] if path.exists() else []
        shards = sorted([s for s in known if s["file"] != shard["file"]] + [shard], key=lambda s: s["first_sample"])
        with whole_file(path) as draft:
            draft.write_text(json.dumps({**manifest, "shards": shards}) + "\n", encoding="utf-8")


def _file_sha256(path: Path) -> str:
    try:
        with path.open("rb") as f:
            total = hashlib.sha256()
            while block := f.read(1 << 20):
                total.update(block)
            return total.hexdigest()
    except OSError:
        return ""
