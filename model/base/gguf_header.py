"""The header of one GGUF file: its metadata and where its tensors are.

Read here because the `gguf` package makes numpy objects of each token's text: 11.3 s for 128k
pieces and 280k merges, where this takes 0.24 s (one core of a 2-core machine). Knows the container
only, not what keys and tensors mean.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np
import numpy.typing as npt

from model.errors import ModelFileError

MAGIC = b"GGUF"
_MIN_SIZE = 24  # bytes of a file without keys and tensors
_VERSIONS = (2, 3)  # of the format
# Types of values, by the number that a file has for them.
_UINT32 = 4
_STRING = 8
_ARRAY = 9
_DTYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    _UINT32: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor of a file.

    shape: rows first. offset: in bytes from the start of the file.
    """

    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class _Damaged(Exception):
    pass


class _Cursor:
    """Reads values one after another; never beyond the end. Raises _Damaged."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.offset = 0

    def take(self, size: int) -> int:
        """Return the present offset and step over `size` bytes."""
        start = self.offset
        if size > len(self.data) - start:
            raise _Damaged("it ends within its header")
        self.offset = start + size
        return start

    def number(self, form: str) -> Any:
        """Return a number; form: as in `struct`."""
        return struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        """Return a text; bytes that are no UTF-8 survive as surrogates."""
        size = self.number("<Q")
        start = self.take(size)
        return self.data[start : start + size].decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> Any:
        """Return a value of one of the format's types."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        dtype = _DTYPES.get(kind)
        if dtype is None:
            raise _Damaged(f"it holds a value of unknown type {kind}")
        return np.frombuffer(self.data, dtype, 1, self.take(dtype.itemsize))[0].item()

    def array(self) -> Any:
        """Return a list of texts, or a numpy array of numbers."""
        kind = self.number("<I")
        count = self.number("<Q")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        dtype = _DTYPES.get(kind)
        if dtype is None:
            raise _Damaged(f"it holds an array of unknown type {kind}")
        return np.frombuffer(self.data, dtype, count, self.take(count * dtype.itemsize)).copy()

    def tensor(self) -> TensorInfo:
        """Return a tensor's description; its offset counts from the start of the tensor data."""
        name = self.string()
        n_dims = self.number("<I")
        shape = tuple(reversed([int(self.number("<Q")) for _ in range(n_dims)]))
        number = self.number("<I")
        offset = self.number("<Q")
        if number not in set(gguf.GGMLQuantizationType):
            raise _Damaged(f"tensor {name!r} has the unknown type {number}")
        kind = gguf.GGMLQuantizationType(number)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        n_bytes = prod(shape) // block * block_bytes
        return TensorInfo(name=name, kind=kind, shape=shape, offset=offset, n_bytes=n_bytes)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Return metadata by key and tensors by name.

    Raises ModelFileError where the file is no GGUF or is damaged.
    """
    return _read(path, _header)


def read_pairs(path: Path) -> dict[str, bytes]:
    """Return each key's bytes as the file has them: key, type, value. Raises as `read_header`."""
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


def padded(size: int, align: int) -> int:
    """Return the smallest multiple of `align` that is not below `size`."""
    return -(-size // align) * align


def _read(path: Path, parse: Callable[[_Cursor], T]) -> T:
    try:
        with path.open("rb") as f:
            if path.stat().st_size < _MIN_SIZE or f.read(4) != MAGIC:
                raise ModelFileError(
                    f"{path}: this is not a GGUF file (it does not begin with {MAGIC.decode()})"
                )
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return parse(_Cursor(data))
    except IsADirectoryError:
        raise ModelFileError(f"{path}: this is a folder; name a .gguf file in it") from None
    except FileNotFoundError:
        raise ModelFileError(
            f"{path}: no such file; name a GGUF file (MODEL_PATH, or --base_model_path)"
        ) from None
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from None
    except (_Damaged, MemoryError, ValueError) as error:
        raise ModelFileError(
            f"{path}: the file is damaged or cut off ({error}); fetch it again"
        ) from None


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """Return how many tensors and how many keys follow."""
    cursor.take(len(MAGIC))
    version = cursor.number("<I")
    n_tensors = cursor.number("<Q")
    n_keys = cursor.number("<Q")
    if version not in _VERSIONS:
        raise _Damaged(f"its format version is {version}, not 2 or 3")
    return n_tensors, n_keys


def _pairs(cursor: _Cursor) -> dict[str, bytes]:
    pairs: dict[str, bytes] = {}
    _, n_keys = _counts(cursor)
    for _ in range(n_keys):
        start = cursor.offset
        key = cursor.string()
        cursor.value(cursor.number("<I"))
        pairs[key] = cursor.data[start : cursor.offset]
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
    start = padded(cursor.offset, align)
    tensors = {info.name: replace(info, offset=start + info.offset) for info in infos}
    for tensor in tensors.values():
        end = tensor.offset + tensor.n_bytes
        if end > len(cursor.data):
            size = f"{len(cursor.data):,}"
            raise _Damaged(
                f"tensor {tensor.name!r} should end at byte {end:,}, the file has {size}"
            )
    return metadata, tensors
