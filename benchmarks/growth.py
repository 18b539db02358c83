"""Function-preserving growth: a large llama GGUF that computes what a small one does.

    x' = (x, 0 … 0, c)        the residual stream: zeros behind the D dimensions of old, a constant in the last of new
    w' = w · √(d/D)           RMSNorm over D entries is then the norm over d, if eps' = (d·eps − c²)/D; c² is d·eps/2
    q' = q · √(HD/hd)         heads wider than before: zeros behind the old dimensions, and the scale that it was
    base' = base^(HD/hd)      RoPE turns all pairs of a head, and the old ones by the angles of old

Heads, FFN columns and layers that are new have random weights, as large as those beside them, and zeros where they
would write to the stream. Tokens that are new have the embeddings of old ones; in the LM head they read nothing but
the constant, times −100, so that nothing ever chooses them. The constant has a quantization block of its own (of 256,
where the width allows). Knows GGUF files and nothing of heads, of quantization and of the command line.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from math import sqrt
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from model.base.gguf_file import GGUFFile
from model.base.gguf_header import read_header
from model.base.whole_file import whole_file
from model.errors import ModelFileError, UsageError

Array = npt.NDArray[Any]
BLOCK = 32  # weights that share a scale
RECIPE = "scale_up.recipe"  # metadata key: from what and by which rules a file was grown
VERSION = 1
FILLER_WEIGHT = -100.0  # in the LM head's new rows: their logits are near that, 60 at the least

LAYER = {
    "attn_norm": ("dim",),
    "attn_q": ("q", "dim"),
    "attn_k": ("kv", "dim"),
    "attn_v": ("kv", "dim"),
    "attn_output": ("dim", "q"),
    "ffn_norm": ("dim",),
    "ffn_gate": ("ffn", "dim"),
    "ffn_up": ("ffn", "dim"),
    "ffn_down": ("dim", "ffn"),
}
ENDS = {"token_embd": ("vocab", "dim"), "output_norm": ("dim",), "output": ("vocab", "dim")}
UNDERSTOOD = (
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.dimension_count", "rope.freq_base",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The sizes of a llama model."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int

    def axes(self) -> dict[str, int]:
        """Return the sizes of tensors' axes by name."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {"dim": self.dim, "q": q, "kv": kv, "ffn": self.ffn, "vocab": self.vocab}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return all tensors' shapes by name, rows first."""
        axes, kinds = self.axes(), {f"{kind}.weight": of for kind, of in ENDS.items()}
        for layer in range(self.layers):
            kinds |= {f"blk.{layer}.{kind}.weight": of for kind, of in LAYER.items()}
        return {name: tuple(axes[axis] for axis in of) for name, of in kinds.items()}


def grow(base: GGUFFile, large: Shape, target: Path, *, name: str, stream: float, f32: bool = False) -> None:
    """Write `base`, grown to another shape, in F16 (or F32); one tensor at a time is in memory.

    stream: the usual RMS of the residual stream before the final norm; the constant will be 1 in the usual final state.
    Raises ModelFileError where the model is no plain llama, UsageError where it has no room in the shape,
    OutputError where the file cannot be written.
    """
    small = shape_of(base)
    check_room(small, large)
    dtype = np.dtype(np.float32 if f32 else np.float16)
    with whole_file(target) as draft, closing(gguf.GGUFWriter(str(draft), "llama")) as writer:
        file_type = gguf.LlamaFileType.ALL_F32 if f32 else gguf.LlamaFileType.MOSTLY_F16
        keys = _metadata(base, small, large) | {"general.name": name, "general.file_type": int(file_type)}
        for key, value in keys.items():
            kinds = gguf.GGUFValueType
            writer.add_key_value(key, value, kinds.UINT32 if type(value) is int else kinds.get_type(value))
        for tensor, shape in large.tensors().items():
            kind = np.dtype(np.float32) if len(shape) == 1 else dtype
            writer.add_tensor_info(tensor, shape, kind, int(np.prod(shape)) * kind.itemsize)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in large.tensors():
            writer.write_tensor_data(grown(base, small, large, tensor, dtype, stream))


def recipe(base: GGUFFile, large: Shape) -> str:
    """Return what a grown file's weights depend on."""
    return f"{VERSION} {base.file_fingerprint()} {large}"


def shape_of(base: GGUFFile) -> Shape:
    """Return a base model's shape. Raises ModelFileError where it is more or less than a plain llama model."""
    if base.architecture != "llama":
        raise ModelFileError(f"{base.path}: only llama models can be grown, this one is {base.architecture!r}")
    keys = {key.removeprefix("llama."): value for key, value in base.metadata.items() if key.startswith("llama.")}
    if strange := keys.keys() - UNDERSTOOD:
        raise ModelFileError(f"{base.path}: cannot be grown, for the key llama.{min(strange)} is not understood")
    heads = keys.get("attention.head_count")
    if type(heads) is not int or heads < 1:
        raise ModelFileError(f"{base.path}: cannot be grown, for its number of heads is {heads!r}")
    width = keys.get("attention.key_length", base.n_embd // heads)
    kv_heads, ffn = keys.get("attention.head_count_kv", heads), keys.get("feed_forward_length")
    sizes: tuple[Any, ...] = (base.n_embd, base.n_layer, heads, kv_heads, width, ffn, base.n_vocab)
    if not all(type(size) is int and size > 0 for size in sizes) or not keys.get("attention.layer_norm_rms_epsilon"):
        raise ModelFileError(f"{base.path}: cannot be grown, for a size or the norms' epsilon is missing or no number")
    if any(keys.get(key, width) != width for key in ("attention.value_length", "rope.dimension_count")):
        raise ModelFileError(f"{base.path}: cannot be grown, for its queries, values and rotations differ in width")
    shape = Shape(*sizes)
    found = {name: tensor.shape for name, tensor in read_header(base.path)[1].items()}
    expected = shape.tensors()
    found.setdefault("output.weight", expected["output.weight"])  # tied to the embeddings
    if wrong := {t for t in found.keys() | expected.keys() if found.get(t) != expected.get(t)}:
        raise ModelFileError(f"{base.path}: cannot be grown, for {min(wrong)} is not as in a plain llama model")
    return shape


def check_room(small: Shape, large: Shape) -> None:
    """Raise UsageError where a base model of one shape has no room in another."""
    fits = all(n <= large.axes()[axis] for axis, n in small.axes().items()) and small.layers <= large.layers
    fits = fits and small.head_dim <= large.head_dim and small.kv_heads <= large.kv_heads
    fits = fits and small.heads // small.kv_heads <= large.heads // large.kv_heads
    if not fits or -(-small.dim // BLOCK) * BLOCK >= large.dim:
        raise UsageError(f"a model of {small} has no room in {large}; choose a larger shape or a smaller model")


def epsilon(base: GGUFFile) -> float:
    """Return the norms' epsilon of a base model."""
    return float(base.metadata["llama.attention.layer_norm_rms_epsilon"])


def spare_constant(small: Shape, eps: float) -> float:
    """Return what stands in the last dimension of the residual stream: in the norms it is worth half of eps."""
    return sqrt(small.dim * eps / 2)


def grown_epsilon(small: Shape, large: Shape, eps: float) -> float:
    """Return eps' (see the module's text)."""
    return (small.dim * eps - spare_constant(small, eps) ** 2) / large.dim


def norm_factor(small: Shape, large: Shape) -> float:
    """Return by how much the norms' weights grow."""
    return sqrt(small.dim / large.dim)


def query_factor(small: Shape, large: Shape) -> float:
    """Return by how much queries grow: llama.cpp divides scores by the root of the width of a head."""
    return sqrt(large.head_dim / small.head_dim)


def places(small: Shape, large: Shape) -> dict[str, npt.NDArray[np.int64]]:
    """Return where each entry of an axis stands on the grown axis.

    KV head g stays KV head g, and its query heads are the first of those that read KV head g now.
    """
    own, room = small.heads // small.kv_heads, large.heads // large.kv_heads
    head, kv_head, dims = np.arange(small.heads), np.arange(small.kv_heads), np.arange(small.head_dim)
    at = (head // own * room + head % own) * large.head_dim
    simple = {axis: np.arange(small.axes()[axis]) for axis in ("dim", "ffn", "vocab")}
    return {**simple, "q": np.add.outer(at, dims).ravel(), "kv": np.add.outer(kv_head * large.head_dim, dims).ravel()}


def grown(base: GGUFFile, small: Shape, large: Shape, name: str, dtype: np.dtype[Any], stream: float) -> Array:
    """Return one tensor of the grown model; norms are float32."""
    *_, kind, _ = name.split(".")
    if kind in ("token_embd", "output"):
        return _vocabulary(base, small, large, kind, dtype)
    layer = int(name.split(".")[1]) if kind in LAYER else None
    new = layer is not None and layer >= small.layers
    source = base.tensor(name if layer is None else f"blk.{layer % small.layers}.{kind}.weight")
    shape = large.tensors()[name]
    if len(shape) == 1:  # a norm; zeros keep what quantization leaves in unused dimensions from spreading
        result = np.zeros(shape, np.float32)
        result[: small.dim] = source * norm_factor(small, large)
        if layer is None:
            result[-1] = stream * norm_factor(small, large) / spare_constant(small, epsilon(base))
        return result
    at, (rows, columns) = places(small, large), LAYER[kind]
    if rows == "dim":  # what is new writes nothing to the stream
        result = np.zeros(shape, dtype)
    else:
        result = _noise(shape, float(np.sqrt(np.mean(source**2))), dtype)
    if not new:
        result[places(replace(small, head_dim=large.head_dim), large)[rows]] = 0  # a widened head whole
        factor = query_factor(small, large) if kind == "attn_q" else 1.0
        result[np.ix_(at[rows], at[columns])] = source * np.float32(factor)
    return result


def _vocabulary(base: GGUFFile, small: Shape, large: Shape, kind: str, dtype: np.dtype[Any]) -> Array:
    """Return the embeddings or the LM head, with rows for the new tokens and the constant's column."""
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
    """Return normally distributed numbers that repeat after a million: to draw all would take a minute."""
    return np.resize((_pool() * np.float32(scale)).astype(dtype), shape)


@cache
def _pool() -> Array:
    return np.random.default_rng(0).standard_normal(2**20 + 7, np.float32)


def _metadata(base: GGUFFile, small: Shape, large: Shape) -> dict[str, Any]:
    """Return the grown model's keys: those of the base model where nothing changes."""
    keys: dict[str, Any] = {}
    for key, value in base.metadata.items():
        if isinstance(value, list):
            value = [text.encode("utf-8", "surrogateescape") for text in value]
        keys[key] = value.tolist() if isinstance(value, np.ndarray) else value
    # llama.cpp writes spaces as ▁ or Ġ before it looks for pieces, so that no text holds a piece with a space.
    keys["tokenizer.ggml.tokens"] += [b"filler %d" % i for i in range(small.vocab, large.vocab)]
    for key, value in {"scores": -1e6, "token_type": int(gguf.TokenType.UNUSED)}.items():
        if f"tokenizer.ggml.{key}" in keys:
            keys[f"tokenizer.ggml.{key}"] += [value] * (large.vocab - small.vocab)
    # llama.cpp refuses llama models that rotate a part of a head only, so all is rotated, with another base.
    numbers = {
        "embedding_length": large.dim, "block_count": large.layers, "feed_forward_length": large.ffn,
        "attention.head_count": large.heads, "attention.head_count_kv": large.kv_heads,
        "attention.key_length": large.head_dim, "attention.value_length": large.head_dim,
        "attention.layer_norm_rms_epsilon": grown_epsilon(small, large, epsilon(base)),
        "rope.dimension_count": large.head_dim,
        "rope.freq_base": float(keys.get("llama.rope.freq_base", 10_000.0)) ** (large.head_dim / small.head_dim),
        "vocab_size": large.vocab,
    }  # fmt: skip
    keys |= {f"llama.{key}": value for key, value in numbers.items()} | {RECIPE: recipe(base, large)}
    del keys["general.architecture"]  # the writer's own
    keys.pop("general.quantization_version", None)
    return keys
