"""The shape of a plain llama model: its sizes, and the tensors that they make. Knows no growth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model.base.gguf_file import GGUFFile
from model.base.gguf_header import read_header
from model.errors import ModelFileError

# The axes of each tensor, rows first: of a layer's, and of the others.
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
UNDERSTOOD = (  # metadata keys; with any other the model is no plain llama
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a llama model. heads: of attention."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int

    @property
    def queries_per_kv_head(self) -> int:
        """How many query heads read one KV head."""
        return self.heads // self.kv_heads

    def axes(self) -> dict[str, int]:
        """Return the sizes of tensors' axes by name."""
        return {
            "dim": self.dim,
            "q": self.heads * self.head_dim,
            "kv": self.kv_heads * self.head_dim,
            "ffn": self.ffn,
            "vocab": self.vocab,
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return all tensors' shapes by name, rows first."""
        axes_of = {f"{kind}.weight": axes for kind, axes in ENDS.items()}
        for layer in range(self.layers):
            axes_of |= {f"blk.{layer}.{kind}.weight": axes for kind, axes in LAYER.items()}
        sizes = self.axes()
        return {name: tuple(sizes[axis] for axis in axes) for name, axes in axes_of.items()}


def shape_of(base: GGUFFile) -> Shape:
    """Return a base model's shape.

    Raises ModelFileError where it is more or less than a plain llama model.
    """
    shape = _shape_of_metadata(base)
    found = {name: tensor.shape for name, tensor in read_header(base.path)[1].items()}
    expected = shape.tensors()
    found.setdefault("output.weight", expected["output.weight"])  # tied to the embeddings
    names = found.keys() | expected.keys()
    wrong = {name for name in names if found.get(name) != expected.get(name)}
    if wrong:
        raise _cannot_grow(base, f"{min(wrong)} is not as in a plain llama model")
    return shape


def _shape_of_metadata(base: GGUFFile) -> Shape:
    if base.architecture != "llama":
        raise ModelFileError(
            f"{base.path}: only llama models can be grown, this one is {base.architecture!r}"
        )
    keys = {
        key.removeprefix("llama."): value
        for key, value in base.metadata.items()
        if key.startswith("llama.")
    }
    strange = keys.keys() - UNDERSTOOD
    if strange:
        raise _cannot_grow(base, f"the key llama.{min(strange)} is not understood")
    heads = keys.get("attention.head_count")
    if type(heads) is not int or heads < 1:
        raise _cannot_grow(base, f"its number of heads is {heads!r}")
    head_dim = keys.get("attention.key_length", base.n_embd // heads)
    sizes: dict[str, Any] = {
        "dim": base.n_embd,
        "layers": base.n_layer,
        "heads": heads,
        "kv_heads": keys.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "ffn": keys.get("feed_forward_length"),
        "vocab": base.n_vocab,
    }
    sizes_known = all(type(size) is int and size > 0 for size in sizes.values())
    if not sizes_known or not keys.get("attention.layer_norm_rms_epsilon"):
        raise _cannot_grow(base, "a size or the norms' epsilon is missing or no number")
    widths = ("attention.value_length", "rope.dimension_count")
    if any(keys.get(key, head_dim) != head_dim for key in widths):
        raise _cannot_grow(base, "its queries, values and rotations differ in width")
    return Shape(**sizes)


def _cannot_grow(base: GGUFFile, reason: str) -> ModelFileError:
    return ModelFileError(f"{base.path}: cannot be grown, for {reason}")


def epsilon(base: GGUFFile) -> float:
    """Return the norms' epsilon of a base model."""
    return float(base.metadata["llama.attention.layer_norm_rms_epsilon"])
