"""A GGUF with the first layers of another one: what a few layers cost tells what all of them do.

Its tensors are copied as they stand, in blocks. Knows names and bytes, no numbers; what such a file is for is the
caller's.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

from model.base.gguf_file import GGUFFile, require_other_file
from model.base.gguf_header import MAGIC, TensorInfo, array_pair, number_pair, read_pairs, text_bytes
from model.base.whole_file import require_room, whole_file
from model.errors import ModelFileError, UsageError

_VERSION = 3  # of the format
_CHUNK = 1 << 24
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
# What stands beside the layers, and whose size does not depend on their number.
_BESIDE = re.compile(
    r"(token_embd|token_embd_norm|token_types|position_embd|output_norm|output|rope_\w+)\.(weight|bias)"
)


def cut_layers(source: Path, target: Path, layers: int) -> None:
    """Write a model with the first `layers` layers of `source` (of a split one, the first part), in one file.

    Arrays with a value per layer are cut too. Little memory is needed, as tensors are copied in blocks.
    Raises UsageError where the model has fewer layers or `target` is the source, ModelFileError where it is made up in
    another way than layers one after another, OutputError where `target` cannot be written.
    """
    file = GGUFFile(source)
    if not 1 <= layers <= file.n_layer:
        raise UsageError(f"{layers} layers asked for; {source} has 1 to {file.n_layer} to give")
    tensors = [t for name, t in file.tensors.items() if _layer(file, name) < layers]
    require_other_file(file, target)
    align = int(file.metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT))
    head, ends = _head(file, tensors, layers, align)
    require_room(target, len(head) + ends[-1])
    with whole_file(target) as draft, draft.open("wb") as out:
        out.write(head)
        for tensor, end in zip(tensors, ends, strict=True):
            raw = file.raw(tensor.name)
            for at in range(0, tensor.n_bytes, _CHUNK):
                out.write(raw[at : at + _CHUNK].data)
            out.write(bytes(len(head) + end - out.tell()))


def layers_alike(file: GGUFFile) -> bool:
    """Whether all layers hold tensors of the same names and shapes, so that one costs as much as another."""
    layers: dict[int, set[tuple[str, tuple[int, ...]]]] = {}
    for name, tensor in file.tensors.items():
        if match := _LAYER.fullmatch(name):
            layers.setdefault(int(match[1]), set()).add((match[2], tensor.shape))
    return len(layers) == file.n_layer and all(kinds == layers[min(layers)] for kinds in layers.values())


def _layer(file: GGUFFile, name: str) -> int:
    """Return the layer that a tensor belongs to; -1: none. Raises ModelFileError for strange ones."""
    match = _LAYER.fullmatch(name)
    predicts = file.metadata.get(f"{file.architecture}.nextn_predict_layers")  # the last layers are of another kind
    if predicts or not (int(match[1]) < file.n_layer if match else _BESIDE.fullmatch(name)):
        what = "layers that predict further tokens" if predicts else f"the tensor {name}"
        raise ModelFileError(
            f"{file.path}: layers of this {file.architecture} model cannot be cut off, as it has {what}"
        )
    return int(match[1]) if match else -1


def _head(file: GGUFFile, tensors: Sequence[TensorInfo], layers: int, align: int) -> tuple[bytes, list[int]]:
    """Return all bytes before the tensors, and where each tensor ends after them; both padded."""
    pairs, prefix = read_pairs(file.path), f"{file.architecture}."
    for key, value in file.metadata.items():
        per_layer = isinstance(value, np.ndarray) and len(value) == file.n_layer
        if key.startswith("split."):
            del pairs[key]
        elif per_layer and key.startswith(prefix) and not key.startswith(f"{prefix}rope."):
            pairs[key] = array_pair(key, value[:layers])
    pairs[f"{prefix}block_count"] = number_pair(f"{prefix}block_count", layers)
    infos, ends, at = list[bytes](), list[int](), 0
    for t in tensors:
        shape = struct.pack(f"<I{len(t.shape)}Q", len(t.shape), *reversed(t.shape))
        infos.append(text_bytes(t.name) + shape + struct.pack("<IQ", t.kind, at))
        at = -(-(at + t.n_bytes) // align) * align
        ends.append(at)
    head = MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(pairs)) + b"".join([*pairs.values(), *infos])
    return head + bytes(-len(head) % align), ends
