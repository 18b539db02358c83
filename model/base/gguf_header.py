"""Read the header of one GGUF file: its metadata and where its tensors lie.

Written here because the `gguf` package makes numpy objects of each token's text: 11.3 s for 128k pieces and
280k merges, where this takes 0.24 s (one core of a 2-core machine). Knows the container only, not what keys and
tensors mean.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np
import numpy.typing as npt

from model.errors import ModelFileError

MAGIC = b"GGUF"
_UINT32, _STRING, _ARRAY = 4, 8, 9
_NAMES = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_DTYPES = {kind: np.dtype(name) for kind, name in _NAMES.items()}
T = TypeVar("T")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: `shape` has rows first; `offset` counts bytes from the start of the file."""

    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class _Damaged(Exception):
    pass


class _Cursor:
    """Reads values one after another; never beyond the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> int:
        """Return the present offset and step over `size` bytes."""
        start = self.at
        if size > len(self.data) - start:
            raise _Damaged("it ends within its header")
        self.at = start + size
        return start

    def number(self, form: str) -> Any:
        return struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        """Return a text; bytes that are no UTF-8 survive as surrogates."""
        size = self.number("<Q")
        start = self.take(size)
        return self.data[start : start + size].decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _DTYPES:
            raise _Damaged(f"it holds a value of unknown type {kind}")
        return np.frombuffer(self.data, _DTYPES[kind], 1, self.take(_DTYPES[kind].itemsize))[0].item()

    def array(self) -> Any:
        """Return a list of texts, or a numpy array of numbers."""
        kind, count = self.number("<I"), self.number("<Q")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        if kind not in _DTYPES:
            raise _Damaged(f"it holds an array of unknown type {kind}")
        dtype = _DTYPES[kind]
        return np.frombuffer(self.data, dtype, count, self.take(count * dtype.itemsize)).copy()

    def tensor(self) -> TensorInfo:
        """Return a tensor's description; its offset still counts from the start of the tensor data."""
        name, n_dims = self.string(), self.number("<I")
        shape = tuple(reversed([int(self.number("<Q")) for _ in range(n_dims)]))
        kind, offset = self.number("<I"), self.number("<Q")
        if kind not in set(gguf.GGMLQuantizationType):
            raise _Damaged(f"tensor {name!r} has the unknown type {kind}")
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        count = 1
        for n in shape:
            count *= n
        return TensorInfo(name, gguf.GGMLQuantizationType(kind), shape, offset, count // block * size)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Return metadata by key and tensors by name. Raises ModelFileError where the file is none or is damaged."""
    return _read(path, _header)


def read_pairs(path: Path) -> dict[str, bytes]:
    """Return each key's bytes as they stand in the file: key, type, value. Raises as `read_header`."""
    return _read(path, _pairs)


def number_pair(key: str, value: int) -> bytes:
    """Return the bytes of a key with an unsigned 32-bit number."""
    return text_bytes(key) + struct.pack("<II", _UINT32, value)


def array_pair(key: str, values: npt.NDArray[Any]) -> bytes:
    """Return the bytes of a key with an array of numbers, of the type that they have."""
    kind = next(kind for kind, dtype in _DTYPES.items() if dtype == values.dtype)
    return text_bytes(key) + struct.pack("<IIQ", _ARRAY, kind, len(values)) + values.tobytes()


def text_bytes(text: str) -> bytes:
    """Return a text's bytes with their number before them."""
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _read(path: Path, parse: Callable[[_Cursor], T]) -> T:
    try:
        with path.open("rb") as f:
            size = path.stat().st_size
            if size < 24 or f.read(4) != MAGIC:
                raise ModelFileError(f"{path}: this is not a GGUF file (it does not begin with {MAGIC.decode()})")
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return parse(_Cursor(data))
    except IsADirectoryError:
        raise ModelFileError(f"{path}: this is a folder; name a .gguf file in it") from None
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file; name a GGUF file (MODEL_PATH, or --base_model_path)") from None
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from None
    except (_Damaged, MemoryError, ValueError) as error:
        raise ModelFileError(f"{path}: the file is damaged or cut off ({error}); fetch it again") from None


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """Return how many tensors and how many keys follow."""
    cursor.take(4)
    version, n_tensors, n_keys = cursor.number("<I"), cursor.number("<Q"), cursor.number("<Q")
    if version not in (2, 3):
        raise _Damaged(f"its format version is {version}, not 2 or 3")
    return n_tensors, n_keys


def _pairs(cursor: _Cursor) -> dict[str, bytes]:
    pairs: dict[str, bytes] = {}
    for _ in range(_counts(cursor)[1]):
        start, key = cursor.at, cursor.string()
        cursor.value(cursor.number("<I"))
        pairs[key] = cursor.data[start : cursor.at]
    return pairs


def _header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    n_tensors, n_keys = _counts(cursor)
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("<I"))
    infos = [cursor.tensor() for _ in range(n_tensors)]
    align = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(align, int) or align < 1:
        raise _Damaged(f"its alignment is {align}")
    start = -(-cursor.at // align) * align
    tensors = {t.name: TensorInfo(t.name, t.kind, t.shape, start + t.offset, t.n_bytes) for t in infos}
    for t in tensors.values():
        if t.offset + t.n_bytes > len(cursor.data):
            end = f"{t.offset + t.n_bytes:,}"
            raise _Damaged(f"tensor {t.name!r} should end at byte {end}, the file has {len(cursor.data):,}")
    return metadata, tensors
