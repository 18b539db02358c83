"""A GGUF file, without loading it: facts, fingerprints, dequantised tensors.

Also has requantized copies written. Knows file and format, not decoding (`llama.py`) and not what
heads do with an LM head.
"""

from __future__ import annotations

import hashlib
import os
import re
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from model.base.gguf_header import read_header
from model.base.quantizer import TYPES, block_size, file_type, n_bytes, quantize, tensor_type
from model.errors import ModelFileError, UsageError
from model.storage.disk_room import require_room
from model.storage.facts import recall, remember
from model.storage.whole_file import require_ordinary, whole_file

Float32Array = npt.NDArray[np.float32]

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
# What decides which text an id means.
_TOKENIZER_KEYS = ("model", "tokens", "scores", "merges", "token_type")
_DIVIDES_BY_LOGIT_SCALE = ("granite", "minicpm")  # families; for others llama.cpp multiplies
_CHUNK = 1 << 24  # bytes that are hashed at a time


class GGUFFile:
    """A GGUF model: one file, or the shards of a split one, named by the first.

    Attributes: path; paths (all shards); metadata (by key); tensors (by name); architecture; name;
    n_vocab; n_embd; n_layer; context_length (in training); file_type (such as "Q4_0"); logit_scale
    and soft_cap, by which logits = cap(logit_scale · W_out·h) with
    cap(x) = soft_cap · tanh(x / soft_cap), or x where soft_cap is 0; tied (the LM head is the
    embedding matrix). Raises ModelFileError where the file cannot be used.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.paths = _shards(self.path)
        self.metadata, self.tensors = read_header(self.path)
        self._homes = dict.fromkeys(self.tensors, self.path)
        for shard in self.paths[1:]:
            _, tensors = read_header(shard)
            self.tensors |= tensors
            self._homes |= dict.fromkeys(tensors, shard)
        self.architecture = str(self._required("general.architecture", str))
        name = str(self.metadata.get("general.name") or self.path.stem)
        self.name = name.encode("utf-8", "replace").decode()  # without half surrogate pairs
        self.n_embd = self._number("embedding_length")
        self.n_layer = self._number("block_count")
        self.context_length = self._number("context_length")
        self.n_vocab = len(self._required("tokenizer.ggml.tokens", list))
        self.file_type = self._file_type()
        self.logit_scale = self._logit_scale()
        self.soft_cap = self._factor("final_logit_softcapping")
        self.tied = not self.has_tensor("output.weight")

    def _required(self, key: str, kind: type) -> Any:
        value = self.metadata.get(key)
        if not isinstance(value, kind):
            raise ModelFileError(
                f"{self.path}: the key {key!r} is missing or damaged; is this a language model?"
            )
        return value

    def _number(self, key: str) -> int:
        value = int(self._required(f"{self.architecture}.{key}", int))
        if value < 1:
            raise ModelFileError(
                f"{self.path}: {key} is {value}; the file is damaged, fetch it again"
            )
        return value

    def _factor(self, key: str) -> float:
        """Return an optional key's value; 0 where it is absent."""
        value = self.metadata.get(f"{self.architecture}.{key}", 0.0)
        if not isinstance(value, (int, float)):
            raise ModelFileError(
                f"{self.path}: {key} is no number; the file is damaged, fetch it again"
            )
        return float(value)

    def _file_type(self) -> str:
        """Return the type that the file says it is of, or that of most of its bytes."""
        number = self.metadata.get("general.file_type")
        if isinstance(number, int):
            names = {int(kind): kind.name for kind in gguf.LlamaFileType}
            name = names.get(number & ~gguf.LlamaFileType.GUESSED)
            if name is not None:
                return name.removeprefix("MOSTLY_").removeprefix("ALL_")
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.kind.name] = sizes.get(tensor.kind.name, 0) + tensor.n_bytes
        return max(sizes, key=lambda kind: sizes[kind], default="empty")

    def _logit_scale(self) -> float:
        """Return the factor on W·h, 1 where none is given."""
        scale = self._factor("logit_scale") or 1.0
        if self.architecture.startswith(_DIVIDES_BY_LOGIT_SCALE):
            return 1.0 / scale
        return scale

    def has_tensor(self, name: str) -> bool:
        """Whether the file holds a tensor of this name."""
        return name in self.tensors

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """Return one tensor's bytes, mapped from its file."""
        info = self.tensors[name]
        return np.memmap(self._homes[name], np.uint8, "r", info.offset, (info.n_bytes,))

    def tensor(
        self, name: str, rows: npt.NDArray[np.integer] | slice = slice(None)
    ) -> Float32Array:
        """Return one tensor or some of its rows, dequantised: (rows, columns) float32, a copy."""
        if name not in self.tensors:
            raise ModelFileError(f"{self.path}: no tensor is named {name}")
        info = self.tensors[name]
        try:
            raw = self.raw(name)
            if len(info.shape) > 1:
                raw = raw.reshape(info.shape[0], -1)[rows]
            values = gguf.quants.dequantize(raw, info.kind)
        except NotImplementedError:
            raise ModelFileError(
                f"{self.path}: {name} is {info.kind.name}, which cannot be dequantised here"
            ) from None
        shape = (-1, *info.shape[1:]) if len(info.shape) > 1 else info.shape
        return np.array(values, np.float32).reshape(shape)

    def output_weight(self, rows: npt.NDArray[np.integer] | slice = slice(None)) -> Float32Array:
        """Return the LM head (V, D): the output matrix, or the embeddings where they are tied.

        rows: only those of these tokens.
        """
        return self.tensor("token_embd.weight" if self.tied else "output.weight", rows)

    def token_embeddings(self, rows: npt.NDArray[np.integer] | slice = slice(None)) -> Float32Array:
        """Return the embedding matrix (V, D), or the rows of some tokens."""
        return self.tensor("token_embd.weight", rows)

    def file_fingerprint(self) -> str:
        """Return the SHA-256 of the file, as hex digits; of a split one, that of its digests."""
        digests = [_file_digest(path) for path in self.paths]
        if len(digests) == 1:
            return digests[0]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def heads_fingerprint(self) -> str:
        """Return the SHA-256 of what heads depend on: width, vocabulary, tokenizer.

        Quantizations of one model share it.
        """
        digest = hashlib.sha256(f"{self.n_embd} {self.n_vocab}".encode())
        for key in _TOKENIZER_KEYS:
            value = _bytes_of(self.metadata.get(f"tokenizer.ggml.{key}", ""))
            digest.update(b"%s %d %b" % (key.encode(), len(value), value))
        return digest.hexdigest()


def _bytes_of(value: Any) -> bytes:
    """Return what a fingerprint takes of a key's value: a text, numbers or a list of texts."""
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, list):
        encoded = (text.encode("utf-8", "surrogateescape") for text in value)
        return b"".join(b"%d %b" % (len(data), data) for data in encoded)
    return str(value).encode()


def _shards(path: Path) -> list[Path]:
    """Return all files of a model. Raises ModelFileError where some of them are missing."""
    match = _SPLIT.fullmatch(path.name)
    if not match:
        return [path]
    stem = match[1]
    number = int(match[2])
    count = int(match[3])
    paths = [path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    if number != 1:
        raise ModelFileError(
            f"{path}: this is part {number} of a split model; name the first, {paths[0].name}"
        )
    for shard in paths:
        if path.exists() and not shard.exists():
            raise ModelFileError(
                f"{shard}: this part of the split model is missing; put all {count} into one folder"
            )
    return paths


def _file_digest(path: Path) -> str:
    """Return the file's SHA-256; hashed once per path, size and time of change.

    4 GB take seconds.
    """
    stat = path.stat()
    key = str(path.resolve())
    version = [stat.st_size, stat.st_mtime_ns]
    known = recall("file_digests").get(key)
    if known and known[:2] == version:
        return str(known[2])
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(_CHUNK):
            digest.update(block)
    remember("file_digests", key, [*version, digest.hexdigest()])
    return digest.hexdigest()


def requantize(
    source: Path, target: Path, kind: str, output_type: str | None = None, *, threads: int = 0
) -> None:
    """Write `source` as a single file of another type, through llama.cpp's quantizer.

    `target` is replaced. kind: such as "Q4_0" or "q4_k_m"; output_type: a tensor type for the LM
    head, where it should differ; threads: 0 for all cores. The source may be quantized already;
    `quantizer.quality_warning` says what that means.
    Raises UsageError for a type that is unknown or does not fit, and where `target` is the source,
    ModelFileError for a source that cannot be read, OutputError where llama.cpp fails or `target`
    cannot be written.
    """
    kind = file_type(kind)
    if output_type:
        output_type = tensor_type(output_type)
    file = GGUFFile(source)
    if output_type and file.n_embd % block_size(output_type):
        # llama.cpp would abort, or write nonsense.
        raise UsageError(
            f"tensor type {output_type.lower()!r} cannot hold this LM head: rows of {file.n_embd} "
            f"weights are no multiple of {block_size(output_type)}; use another, such as q8_0 "
            "or q4_0"
        )
    require_other_file(file, target)
    require_room(target, _least_bytes(file, TYPES[kind], output_type))
    with whole_file(target) as draft:
        draft.touch()  # where this fails the reason is known, where llama.cpp does it is not
        quantize(file.path, draft, kind, output_type, threads or os.cpu_count() or 1)


def _least_bytes(file: GGUFFile, kind: str, output_type: str | None) -> int:
    """Return what a requantized copy takes at the least: some layers of a mixed type take more.

    kind: the smallest tensor type of the copy's.
    """
    head = file.n_vocab * file.n_embd
    rest = sum(prod(tensor.shape) for tensor in file.tensors.values()) - head
    return n_bytes(kind, rest) + n_bytes(output_type or kind, head)


def require_other_file(source: GGUFFile, target: Path) -> None:
    """Raise UsageError where writing `target` would destroy the source.

    Raises OutputError where no file may be written there.
    """
    require_ordinary(target)
    if target.exists() and any(target.samefile(path) for path in source.paths):
        raise UsageError(f"{target}: this is the file that is read; write to another")
