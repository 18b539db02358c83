"""The manifest of a states cache: what the stored states depend on, and which shards are whole.

`manifest.json` in the cache's folder, written whole, with `manifest.lock` for the processes of a
run that write it in turn. Knows nothing of what is in a shard.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from filelock import FileLock

from model.errors import DataError
from model.storage.whole_file import whole_file
from model.training.states.shards import Shard

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
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
        content = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


def recall_shards(folder: Path, key: CacheKey, shards: list[Shard]) -> None:
    """Mark the shards that are there already, whole: in the manifest, with the right checksum.

    Raises DataError where the folder holds states of another key, or its manifest is damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        return
    known = _read_shards(path, key)
    for shard in shards:
        old = known.get(shard.file)
        if old is None or not old.sha256:
            continue
        if (old.first_sample, old.lengths) != (shard.first_sample, shard.lengths):
            continue
        if _file_sha256(folder / shard.file) == old.sha256:
            shard.sha256 = old.sha256
            shard.rejected = old.rejected
        else:
            click.echo(f"{folder / shard.file}: damaged or missing; extracted again", err=True)


def _read_shards(path: Path, key: CacheKey) -> dict[str, Shard]:
    """Return the shards of a manifest by their files' names."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = {shard["file"]: Shard(**shard) for shard in manifest["shards"]}
        stored = manifest["key"]
        differences = [name for name, value in asdict(key).items() if stored.get(name) != value]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: damaged manifest; delete the folder or choose another --cache_dir"
        ) from error
    if differences:
        raise DataError(
            f"{path.parent}: holds states with another {', '.join(differences)}; "
            "choose another --cache_dir"
        )
    return known


def add_to_manifest(folder: Path, header: dict[str, Any], shard: Shard) -> None:
    """Note a finished shard; processes of one run take turns. header: all but the shards."""
    path = folder / MANIFEST
    with FileLock(folder / "manifest.lock", poll_interval=0.01):
        known = []
        if path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))["shards"]
        others = [other for other in known if other["file"] != shard.file]
        shards = sorted([*others, asdict(shard)], key=lambda each: each["first_sample"])
        with whole_file(path) as new:
            new.write_text(json.dumps({**header, "shards": shards}) + "\n", encoding="utf-8")


def _file_sha256(path: Path) -> str:
    """Return a file's checksum; empty where it cannot be read."""
    try:
        with path.open("rb") as f:
            total = hashlib.sha256()
            while block := f.read(1 << 20):
                total.update(block)
            return total.hexdigest()
    except OSError:
        return ""
