"""A scaled model: it behaves as a small base model does and costs what a large one costs.

`base/growth.py` says how a model grows while what it generates stays what it was. Files that are
there already are used again. Knows no command line.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from model.base.cores import usable_cores
from model.base.gguf_file import GGUFFile, requantize
from model.base.growth import BLOCK, RECIPE, check_room, grow, recipe
from model.base.known_models import BUNDLED
from model.base.llama import LlamaBase
from model.base.llama_model import LlamaModel
from model.base.llama_shape import Shape, shape_of
from model.errors import HeadsError
from model.heads.files import base_facts, load_heads, new_heads, save_heads
from model.heads.known_heads import HEADS_FOLDER, find_heads
from model.heads.medusa import HeadsConfig

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build" / "scaled"
SHAPES = {
    # TinyLlama's. It has 4 KV heads, too few for the bundled model's 5: 8 are the next that divide
    # 32, and 2 % more parameters.
    "1b": Shape(dim=2048, layers=22, heads=32, kv_heads=8, head_dim=64, ffn=5632, vocab=32_000),
    # Llama 2's.
    "7b": Shape(dim=4096, layers=32, heads=32, kv_heads=32, head_dim=128, ffn=11_008, vocab=32_000),
}
# Quantizations of the file, and of the LM head.
TYPES = (
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q6_K",
    "Q5_K_M",
    "Q4_K_M",
    "Q4_K_S",
    "Q4_0",
    "Q4_1",
    "IQ4_NL",
    "IQ4_XS",
)
OUTPUT_TYPES = (
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q6_K",
    "Q5_K",
    "Q4_K",
    "Q4_0",
    "Q4_1",
    "IQ4_NL",
    "IQ4_XS",
)
POSITIONS = 64  # tokens that show how large the residual stream is
# Adds 2.9 to the constant in what the LM head reads: int8 must not round that to nothing.
SPARE_BIAS = 3.0


@dataclass(frozen=True)
class Scaled:
    """A benchmark model: its GGUF, and its draft heads where the base model has some."""

    model: Path
    heads: Path | None

    def variables(self) -> str:
        """Return the environment variables that select it, as a shell reads them."""
        values = {"MODEL_PATH": self.model, "MEDUSA_WEIGHTS_PATH": self.heads}
        return " ".join(f"{name}={os.path.relpath(path)}" for name, path in values.items() if path)


def build(
    shape: str,
    kind: str,
    output_type: str | None = None,
    *,
    base: Path = BUNDLED,
    heads: Path | None = None,
    out: Path = OUT,
) -> Scaled:
    """Write the benchmark model of a shape in SHAPES, with draft heads beside it.

    kind: the quantization, such as "Q4_0"; output_type: of the LM head, where it should differ.
    heads: of the base model; None: those that are known, if any. Raises UsageError where the shape
    is too small, ModelFileError for a base model and HeadsError for heads that cannot be grown,
    OutputError where something cannot be written.
    """
    file = GGUFFile(base)
    heads = heads or find_heads(HEADS_FOLDER, file)
    name = f"{base.name.split('.')[0]}-{shape}"
    stem = f"{name}.{kind}"
    if output_type:
        stem += f"-output-{output_type}"
    target = out / f"{stem}.gguf"
    if not _is_current(target, file, SHAPES[shape]):
        _write(file, SHAPES[shape], target, name, kind, output_type)
    if heads is None:
        return Scaled(target, None)
    grown_heads = out / f"{stem}.heads"
    grow_heads(heads, file, GGUFFile(target), grown_heads)
    return Scaled(target, grown_heads)


def _is_current(target: Path, file: GGUFFile, shape: Shape) -> bool:
    """Say whether a file is there that was grown from this base model by today's rules."""
    return target.exists() and GGUFFile(target).metadata.get(RECIPE) == recipe(file, shape)


def _write(
    file: GGUFFile, shape: Shape, target: Path, name: str, kind: str, output_type: str | None
) -> None:
    """Grow the model in F16, or in F32 where that is asked for, and quantize it."""
    check_room(shape_of(file), shape)
    draft = target.with_name(f".{target.stem}.{os.getpid()}.gguf")
    try:
        grow(file, shape, draft, name=name, stream=final_stream(file), f32=kind == "F32")
        requantize(draft, target, kind, output_type)
    finally:
        with suppress(OSError):
            draft.unlink()


def final_stream(file: GGUFFile) -> float:
    """Return the usual RMS of the residual stream before the final norm, on random tokens.

    llama.cpp doesn't show it. But a constant that entered that norm comes out of it divided by
    this RMS: so grow the model by two blocks and look.
    """
    small = shape_of(file)
    probe = replace(small, dim=small.dim + 2 * BLOCK)
    tokens = np.random.default_rng(0).integers(0, small.vocab, POSITIONS).astype(np.int32)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "probe.gguf"
        grow(file, probe, path, name="probe", stream=1.0)
        model = LlamaModel(path)
        with LlamaBase(
            model, n_ctx=POSITIONS, n_threads=usable_cores(), embeddings=True
        ) as context:
            context.decode(tokens, 0, 0)
            constants = context.hidden(POSITIONS)[:, -1].copy()
        model.close()
    return float(1 / np.median(constants))


def grow_heads(source: Path, base: GGUFFile, large: GGUFFile, target: Path) -> None:
    """Write the base model's draft heads, grown: zeros around their weights, the same guesses.

    The state's last entry, the constant that keeps new tokens from being chosen, passes through
    and grows on the way. Raises HeadsError for heads that have LM heads of their own.
    """
    small, facts = load_heads(source, base)
    if small.config.lm_head == "own":
        raise HeadsError(
            f"{source}: heads with LM heads of their own cannot be grown; train them with "
            "--lm_head tied"
        )
    config = _grown_config(small.config, base, large)
    draft_ids = small.draft_ids if config.draft_vocab else None
    heads = new_heads(config, large, draft_ids=draft_ids).requires_grad_(False)
    parameters = heads.state_dict()
    for name, old in small.state_dict().items():
        corner = tuple(slice(size) for size in old.shape)
        parameters[name].zero_()[corner] = old
    heads.bias[0, :, -1] = SPARE_BIAS
    if heads.up is not None:
        heads.up[0, :, -1, -1] = 1.0

    kept: dict[str, Any] = {
        key: facts[key] for key in ("training", "rank_accuracies") if key in facts
    }
    if facts["token_counts"] is not None:
        n_new = large.n_vocab - base.n_vocab
        kept["token_counts"] = np.pad(facts["token_counts"], (0, n_new))
    save_heads(target, heads, {**base_facts(large), **kept})


def _grown_config(config: HeadsConfig, base: GGUFFile, large: GGUFFile) -> HeadsConfig:
    """Return the heads' configuration at the large model's width; a bottleneck grows along."""
    hidden_dim = 0
    if config.bottleneck:
        in_proportion = config.hidden_dim * large.n_embd // base.n_embd
        hidden_dim = max(in_proportion, config.hidden_dim + 1)  # the constant needs an entry
    return replace(config, dim=large.n_embd, vocab=large.n_vocab, hidden_dim=hidden_dim)
