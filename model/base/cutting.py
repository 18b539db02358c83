"""A GGUF with the first layers of another one: what a few layers cost tells what all of them do.

Its tensors are copied as they are, in blocks. Knows names and bytes, no numbers; what such a file
is for is the caller's.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

from model.base.gguf_file import GGUFFile, require_other_file
from model.base.gguf_header import (
    MAGIC,
    TensorInfo,
    array_pair,
    number_pair,
    padded,
    read_pairs,
    text_bytes,
)
from model.errors import ModelFileError, UsageError
from model.storage.disk_room import require_room
from model.storage.whole_file import whole_file

_VERSION = 3  # of the format
_CHUNK = 1 << 24  # bytes that are copied at a time
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
# Tensors beside the layers, whose sizes do not depend on the number of layers.
_BESIDE = re.compile(
    r"(token_embd|token_embd_norm|token_types|position_embd|output_norm|output|rope_\w+)"
    r"\.(weight|bias)"
)


def cut_layers(source: Path, target: Path, layers: int) -> None:
    """Write a model with the first `layers` layers of `source`, in one file.

    source: of a split model, the first part. Arrays with a value per layer are cut too. Little
    memory is needed, as tensors are copied in blocks.
    Raises UsageError where the model has fewer layers or `target` is the source, ModelFileError
    where it is made up in another way than layers one after another, OutputError where `target`
    cannot be written.
    """
    file = GGUFFile(source)
    if not 1 <= layers <= file.n_layer:
        raise UsageError(f"{layers} layers asked for; {source} has 1 to {file.n_layer} to give")
    tensors = [tensor for name, tensor in file.tensors.items() if _layer(file, name) < layers]
    require_other_file(file, target)
    align = int(file.metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT))
    head, ends = _head(file, tensors, layers, align)
    require_room(target, len(head) + ends[-1])
    with whole_file(target) as draft, draft.open("wb") as out:
        out.write(head)
        for tensor, end in zip(tensors, ends, strict=True):
            raw = file.raw(tensor.name)
            for start in range(0, tensor.n_bytes, _CHUNK):
                out.write(raw[start : start + _CHUNK].data)
            out.write(bytes(len(head) + end - out.tell()))


def layers_alike(file: GGUFFile) -> bool:
    """Whether all layers hold tensors of the same names and shapes, so that all cost the same."""
    layers: dict[int, set[tuple[str, tuple[int, ...]]]] = {}
    for name, tensor in file.tensors.items():
        match = _LAYER.fullmatch(name)
        if match:
            layers.setdefault(int(match[1]), set()).add((match[2], tensor.shape))
    if len(layers) != file.n_layer:
        return False
    first = layers[min(layers)]
    return all(tensors == first for tensors in layers.values())


def _layer(file: GGUFFile, name: str) -> int:
    """Return the layer that a tensor belongs to; -1: none. Raises ModelFileError for strange ones.

    Strange are tensors that are neither of a layer nor known to be the same for any number of
    layers, and all in files whose last layers are of another kind, as they predict further tokens.
    """
    match = _LAYER.fullmatch(name)
    if match:
        known = int(match[1]) < file.n_layer
    else:
        known = _BESIDE.fullmatch(name) is not None
    obstacle = "" if known else f"the tensor {name}"
    if file.metadata.get(f"{file.architecture}.nextn_predict_layers"):
        obstacle = "layers that predict further tokens"
    if obstacle:
        raise ModelFileError(
            f"{file.path}: layers of this {file.architecture} model cannot be cut off, "
            f"as it has {obstacle}"
        )
    return int(match[1]) if match else -1


def _head(
    file: GGUFFile, tensors: Sequence[TensorInfo], layers: int, align: int
) -> tuple[bytes, list[int]]:
    """Return all bytes before the tensors, and where each tensor ends after them; both padded."""
    # Metadata: as it is, but for the number of layers and what has a value for each.
    prefix = f"{file.architecture}."
    pairs = read_pairs(file.path)
    for key, value in file.metadata.items():
        if key.startswith("split."):
            del pairs[key]
            continue
        per_layer = isinstance(value, np.ndarray) and len(value) == file.n_layer
        if per_layer and key.startswith(prefix) and not key.startswith(f"{prefix}rope."):
            pairs[key] = array_pair(key, value[:layers])
    pairs[f"{prefix}block_count"] = number_pair(f"{prefix}block_count", layers)

    # Tensors: one behind the other.
    infos = list[bytes]()
    ends = list[int]()
    offset = 0
    for tensor in tensors:
        n_dims = len(tensor.shape)
        shape = struct.pack(f"<I{n_dims}Q", n_dims, *reversed(tensor.shape))
        infos.append(text_bytes(tensor.name) + shape + struct.pack("<IQ", tensor.kind, offset))
        offset = padded(offset + tensor.n_bytes, align)
        ends.append(offset)

    counts = struct.pack("<IQQ", _VERSION, len(tensors), len(pairs))
    head = MAGIC + counts + b"".join([*pairs.values(), *infos])
    return head.ljust(padded(len(head), align), b"\0"), ends
