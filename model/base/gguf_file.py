"""What a GGUF file says about its model, without loading it: facts, fingerprints, dequantised tensors.

Also writes requantized copies. Knows file and format; decoding is `llama.py`'s, what heads do with an LM head theirs.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from model.base.gguf_header import read_header
from model.base.remember import recall, remember
from model.base.whole_file import whole_file
from model.errors import ModelFileError, OutputError, UsageError

Float32Array = npt.NDArray[np.float32]

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_TOKENIZER_KEYS = ("model", "tokens", "scores", "merges", "token_type")  # what decides which text an id stands for
_CHUNK = 1 << 24


class GGUFFile:
    """A GGUF model: one file, or the shards of a split one, named by the first.

    Attributes: path; paths (all shards); metadata (by key); architecture; name; n_vocab; n_embd; n_layer;
    context_length (in training); file_type (such as "Q4_0"); logit_scale and soft_cap, by which
    logits = cap(logit_scale · W_out·h) with cap(x) = soft_cap · tanh(x / soft_cap), or x where soft_cap is 0;
    tied (the LM head is the embedding matrix). Raises ModelFileError where the file cannot be used.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.paths = _shards(self.path)
        self.metadata, self._tensors = read_header(self.path)
        self._homes = dict.fromkeys(self._tensors, self.path)
        for shard in self.paths[1:]:
            tensors = read_header(shard)[1]
            self._tensors |= tensors
            self._homes |= dict.fromkeys(tensors, shard)
        self.architecture = str(self._required("general.architecture", str))
        self.name = str(self.metadata.get("general.name") or self.path.stem).encode("utf-8", "replace").decode()
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
            raise ModelFileError(f"{self.path}: the key {key!r} is missing or damaged; is this a language model?")
        return value

    def _number(self, key: str) -> int:
        value = int(self._required(f"{self.architecture}.{key}", int))
        if value < 1:
            raise ModelFileError(f"{self.path}: {key} is {value}; the file is damaged, fetch it again")
        return value

    def _factor(self, key: str) -> float:
        """Return an optional key's value; 0 where it is absent."""
        value = self.metadata.get(f"{self.architecture}.{key}", 0.0)
        if not isinstance(value, (int, float)):
            raise ModelFileError(f"{self.path}: {key} is no number; the file is damaged, fetch it again")
        return float(value)

    def _file_type(self) -> str:
        number = self.metadata.get("general.file_type")
        known = {int(kind): kind.name for kind in gguf.LlamaFileType}
        if isinstance(number, int) and (number & ~gguf.LlamaFileType.GUESSED) in known:
            return known[number & ~gguf.LlamaFileType.GUESSED].removeprefix("MOSTLY_").removeprefix("ALL_")
        sizes: dict[str, int] = {}
        for tensor in self._tensors.values():
            sizes[tensor.kind.name] = sizes.get(tensor.kind.name, 0) + tensor.n_bytes
        return max(sizes, key=lambda kind: sizes[kind], default="empty")

    def _logit_scale(self) -> float:
        """Return the factor on W·h: llama.cpp multiplies by the key's value, but for these families divides."""
        scale = self._factor("logit_scale") or 1.0
        return 1.0 / scale if self.architecture.startswith(("granite", "minicpm")) else scale

    def has_tensor(self, name: str) -> bool:
        """Say whether the file holds a tensor of this name."""
        return name in self._tensors

    def tensor(self, name: str) -> Float32Array:
        """Return one tensor, dequantised: (rows, columns) float32, a copy."""
        if name not in self._tensors:
            raise ModelFileError(f"{self.path}: no tensor is named {name}")
        info = self._tensors[name]
        raw = np.memmap(self._homes[name], np.uint8, "r", info.offset, (info.n_bytes,))
        try:
            values = gguf.quants.dequantize(raw, info.kind)
        except NotImplementedError:
            raise ModelFileError(f"{self.path}: {name} is {info.kind.name}, which cannot be dequantised here") from None
        return np.array(values, np.float32).reshape(info.shape)

    def output_weight(self) -> Float32Array:
        """Return the LM head (V, D): the output matrix, or the embeddings where they are tied."""
        return self.token_embeddings() if self.tied else self.tensor("output.weight")

    def token_embeddings(self) -> Float32Array:
        """Return the embedding matrix (V, D)."""
        return self.tensor("token_embd.weight")

    def file_fingerprint(self) -> str:
        """Return the SHA-256 of the file (of the shards' digests, where it is split), as hex digits."""
        digests = [_file_digest(path) for path in self.paths]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def heads_fingerprint(self) -> str:
        """Return the SHA-256 of what heads depend on: width, vocabulary, tokenizer. Quantizations share it."""
        digest = hashlib.sha256(f"{self.n_embd} {self.n_vocab}".encode())
        for key in _TOKENIZER_KEYS:
            value = self.metadata.get(f"tokenizer.ggml.{key}", "")
            if isinstance(value, np.ndarray):
                value = value.tobytes()
            elif isinstance(value, list):
                value = b"".join(b"%d %b" % (len(b), b) for b in (t.encode("utf-8", "surrogateescape") for t in value))
            else:
                value = str(value).encode()
            digest.update(b"%s %d %b" % (key.encode(), len(value), value))
        return digest.hexdigest()


def _shards(path: Path) -> list[Path]:
    match = _SPLIT.fullmatch(path.name)
    if not match:
        return [path]
    stem, number, count = match[1], int(match[2]), int(match[3])
    paths = [path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    if number != 1:
        raise ModelFileError(f"{path}: this is part {number} of a split model; name the first, {paths[0].name}")
    for shard in paths:
        if path.exists() and not shard.exists():
            raise ModelFileError(f"{shard}: this part of the split model is missing; put all {count} into one folder")
    return paths


def _file_digest(path: Path) -> str:
    """Return the file's SHA-256; hashed once per path, size and time of change (4 GB take seconds)."""
    stat, key = path.stat(), str(path.resolve())
    seen = [stat.st_size, stat.st_mtime_ns]
    known = recall("file_digests").get(key)
    if known and known[:2] == seen:
        return str(known[2])
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(_CHUNK):
            digest.update(block)
    remember("file_digests", key, [*seen, digest.hexdigest()])
    return digest.hexdigest()


def requantize(source: Path, target: Path, kind: str, output_type: str | None = None) -> None:
    """Write `source` as a single file of another type, through llama.cpp's quantizer.

    kind: such as "Q4_0" or "F32"; output_type: a tensor type for the LM head, where it should differ.
    Raises UsageError for an unknown type, OutputError where llama.cpp fails or `target` cannot be written.
    """
    import llama_cpp  # here, not above: a file can be read without starting llama.cpp

    from model.base import llama  # noqa: F401  (sends llama.cpp's log to `logging`)

    types = {t.name.removeprefix("MOSTLY_").removeprefix("ALL_"): t for t in gguf.LlamaFileType}
    outputs = {t.name: t for t in gguf.GGMLQuantizationType}
    if kind not in types or kind == "GUESSED":
        raise UsageError(f"quantization {kind!r} is unknown; Q4_0, Q4_K_M, Q8_0, F16 and F32 are some that are known")
    if output_type is not None and output_type not in outputs:
        raise UsageError(f"tensor type {output_type!r} is unknown; use one of {', '.join(outputs)}")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = int(types[kind]), True, os.cpu_count() or 1
    if output_type is not None:
        params.output_tensor_type = int(outputs[output_type])
    GGUFFile(source)
    with whole_file(target) as draft:
        draft.touch()  # where this fails the reason is known, where llama.cpp does it is not
        if llama_cpp.llama_model_quantize(str(source).encode(), str(draft).encode(), params) != 0:
            raise OutputError(f"{target}: llama.cpp could not write {source} as {kind}")
