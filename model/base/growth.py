"""Function-preserving growth: a large llama GGUF that computes what a small one does.

    x' = (x, 0 … 0, c)        the residual stream: zeros behind the d old dimensions, a constant
                              in the last of the D new ones
    w' = w · √(d/D)           RMSNorm over D entries is then the norm over d, if
                              eps' = (d·eps − c²)/D; c² is d·eps/2
    q' = q · √(HD/hd)         attention heads wider than before: zeros behind the old dimensions,
                              and the scale that it was
    base' = base^(HD/hd)      RoPE turns all pairs of a head, and the old ones by the old angles

Attention heads, FFN columns and layers that are new have random weights, as large as those beside
them, and zeros where they would write to the stream. Tokens that are new have the embeddings of
old ones; in the LM head they read nothing but the constant, times −100, so that nothing ever
chooses them. The constant has a quantization block of its own (of 256, where the width allows).
Knows GGUF files and nothing of draft heads, of quantization and of the command line.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import cache
from math import sqrt
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from model.base.gguf_file import GGUFFile
from model.base.llama_shape import LAYER, Shape, epsilon, shape_of
from model.errors import UsageError
from model.storage.whole_file import whole_file

Array = npt.NDArray[Any]
BLOCK = 32  # weights that share a scale
RECIPE = "scale_up.recipe"  # metadata key: from what and by which rules a file was grown
VERSION = 1
FILLER_WEIGHT = -100.0  # in the LM head's new rows: their logits are near that, −60 at the most


def grow(
    base: GGUFFile, large: Shape, target: Path, *, name: str, stream: float, f32: bool = False
) -> None:
    """Write `base`, grown to another shape, in F16 (or F32); one tensor at a time is in memory.

    stream: the usual RMS of the residual stream before the final norm; the constant will be 1 in
    the usual final state. Raises ModelFileError where the model is no plain llama, UsageError
    where it has no room in the shape, OutputError where the file cannot be written.
    """
    small = shape_of(base)
    check_room(small, large)
    dtype = np.dtype(np.float32 if f32 else np.float16)
    file_type = gguf.LlamaFileType.ALL_F32 if f32 else gguf.LlamaFileType.MOSTLY_F16
    keys = _metadata(base, small, large)
    keys |= {"general.name": name, "general.file_type": int(file_type)}
    with whole_file(target) as draft, closing(gguf.GGUFWriter(str(draft), "llama")) as writer:
        for key, value in keys.items():
            kind = gguf.GGUFValueType.get_type(value)
            if type(value) is int:
                kind = gguf.GGUFValueType.UINT32
            writer.add_key_value(key, value, kind)
        for tensor, shape in large.tensors().items():
            stored = np.dtype(np.float32) if len(shape) == 1 else dtype
            writer.add_tensor_info(tensor, shape, stored, int(np.prod(shape)) * stored.itemsize)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in large.tensors():
            writer.write_tensor_data(grown(base, small, large, tensor, dtype, stream))


def recipe(base: GGUFFile, large: Shape) -> str:
    """Return what a grown file's weights depend on."""
    return f"{VERSION} {base.file_fingerprint()} {large}"


def check_room(small: Shape, large: Shape) -> None:
    """Raise UsageError where a base model of one shape has no room in another."""
    sizes = large.axes()
    fits = (
        all(size <= sizes[axis] for axis, size in small.axes().items())
        and small.layers <= large.layers
        and small.head_dim <= large.head_dim
        and small.kv_heads <= large.kv_heads
        and small.queries_per_kv_head <= large.queries_per_kv_head
    )
    whole_blocks = -(-small.dim // BLOCK) * BLOCK
    if not fits or whole_blocks >= large.dim:  # the constant needs a block of its own
        raise UsageError(
            f"a model of {small} has no room in {large}; choose a larger shape or a smaller model"
        )


def spare_constant(small: Shape, eps: float) -> float:
    """Return c, the constant of the residual stream: in the norms it is worth half of eps."""
    return sqrt(small.dim * eps / 2)


def grown_epsilon(small: Shape, large: Shape, eps: float) -> float:
    """Return eps' (see the module's text)."""
    return (small.dim * eps - spare_constant(small, eps) ** 2) / large.dim


def norm_factor(small: Shape, large: Shape) -> float:
    """Return by how much the norms' weights grow."""
    return sqrt(small.dim / large.dim)


def query_factor(small: Shape, large: Shape) -> float:
    """Return by how much queries grow.

    llama.cpp divides scores by the root of the width of a head.
    """
    return sqrt(large.head_dim / small.head_dim)


def places(small: Shape, large: Shape) -> dict[str, npt.NDArray[np.int64]]:
    """Return for each axis the index that each old entry has on the grown axis.

    KV head g stays KV head g, and its query heads are the first of those that read KV head g now.
    """
    indices = {axis: np.arange(small.axes()[axis]) for axis in ("dim", "ffn", "vocab")}
    dims = np.arange(small.head_dim)
    kv_head = np.arange(small.kv_heads)
    indices["kv"] = np.add.outer(kv_head * large.head_dim, dims).ravel()
    head = np.arange(small.heads)
    group, member = np.divmod(head, small.queries_per_kv_head)
    grown_head = group * large.queries_per_kv_head + member
    indices["q"] = np.add.outer(grown_head * large.head_dim, dims).ravel()
    return indices


def grown(
    base: GGUFFile, small: Shape, large: Shape, name: str, dtype: np.dtype[Any], stream: float
) -> Array:
    """Return one tensor of the grown model; norms are float32. stream: see `grow`."""
    *_, kind, _ = name.split(".")
    if kind in ("token_embd", "output"):
        return _vocabulary(base, small, large, kind, dtype)
    if kind not in LAYER:
        return _final_norm(base, small, large, name, stream)
    layer = int(name.split(".")[1])
    source = base.tensor(f"blk.{layer % small.layers}.{kind}.weight")
    shape = large.tensors()[name]
    if len(shape) == 1:
        return _norm(source, small, large)
    rows, columns = LAYER[kind]
    if rows == "dim":  # what is new writes nothing to the stream
        result = np.zeros(shape, dtype)
    else:
        result = _noise(shape, float(np.sqrt(np.mean(source**2))), dtype)
    if layer >= small.layers:
        return result
    whole_heads = places(replace(small, head_dim=large.head_dim), large)
    result[whole_heads[rows]] = 0  # old heads that were widened: noise in none of their rows
    factor = query_factor(small, large) if kind == "attn_q" else 1.0
    at = places(small, large)
    result[np.ix_(at[rows], at[columns])] = source * np.float32(factor)
    return result


def _norm(source: Array, small: Shape, large: Shape) -> Array:
    """Return a norm's weights; zeros keep quantization errors in new dimensions from spreading."""
    result = np.zeros(large.dim, np.float32)
    result[: small.dim] = source * norm_factor(small, large)
    return result


def _final_norm(base: GGUFFile, small: Shape, large: Shape, name: str, stream: float) -> Array:
    """Return the norm before the LM head, which the constant passes."""
    result = _norm(base.tensor(name), small, large)
    result[-1] = stream * norm_factor(small, large) / spare_constant(small, epsilon(base))
    return result


def _vocabulary(
    base: GGUFFile, small: Shape, large: Shape, kind: str, dtype: np.dtype[Any]
) -> Array:
    """Return the embeddings or the LM head: rows for new tokens, and the constant's column."""
    result = np.zeros((large.vocab, large.dim), dtype)
    if kind == "token_embd":
        source = base.token_embeddings()
        result[:, : small.dim] = source[np.arange(large.vocab) % small.vocab]
        result[:, -1] = spare_constant(small, epsilon(base))
    else:
        result[: small.vocab, : small.dim] = base.output_weight()
        result[small.vocab :, -1] = FILLER_WEIGHT
    return result


def _noise(shape: tuple[int, ...], scale: float, dtype: np.dtype[Any]) -> Array:
    """Return normally distributed numbers that repeat after a million.

    To draw all would take a minute.
    """
    return np.resize((_pool() * np.float32(scale)).astype(dtype), shape)


@cache
def _pool() -> Array:
    return np.random.default_rng(0).standard_normal(2**20 + 7, np.float32)


def _metadata(base: GGUFFile, small: Shape, large: Shape) -> dict[str, Any]:
    """Return the grown model's keys: those of the base model where nothing changes."""
    keys: dict[str, Any] = {}
    for key, value in base.metadata.items():
        if isinstance(value, list):
            keys[key] = [text.encode("utf-8", "surrogateescape") for text in value]
        elif isinstance(value, np.ndarray):
            keys[key] = value.tolist()
        else:
            keys[key] = value

    # llama.cpp writes spaces as ▁ or Ġ before it looks for pieces, so that no text holds a piece
    # with a space.
    n_new = large.vocab - small.vocab
    fillers = [b"filler %d" % i for i in range(small.vocab, large.vocab)]
    keys["tokenizer.ggml.tokens"] += fillers
    for key, value in {"scores": -1e6, "token_type": int(gguf.TokenType.UNUSED)}.items():
        if f"tokenizer.ggml.{key}" in keys:
            keys[f"tokenizer.ggml.{key}"] += [value] * n_new

    # llama.cpp refuses llama models that rotate a part of a head only, so all is rotated, with
    # another base.
    rope_base = float(keys.get("llama.rope.freq_base", 10_000.0))
    numbers = {
        "embedding_length": large.dim,
        "block_count": large.layers,
        "feed_forward_length": large.ffn,
        "attention.head_count": large.heads,
        "attention.head_count_kv": large.kv_heads,
        "attention.key_length": large.head_dim,
        "attention.value_length": large.head_dim,
        "attention.layer_norm_rms_epsilon": grown_epsilon(small, large, epsilon(base)),
        "rope.dimension_count": large.head_dim,
        "rope.freq_base": rope_base ** (large.head_dim / small.head_dim),
        "vocab_size": large.vocab,
    }
    keys |= {f"llama.{key}": value for key, value in numbers.items()}
    keys[RECIPE] = recipe(base, large)
    del keys["general.architecture"]  # the writer's own
    keys.pop("general.quantization_version", None)
    return keys
