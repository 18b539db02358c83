"""Build a benchmark model: it behaves as the bundled one does and costs what a large one costs.

    python benchmarks/scale_up.py --shape 1b --type q4_0 [--output_type q4_0]

Writes the GGUF and the draft heads that go with it, both at full width, and prints the variables to use them with. A
file that is there already is used again. `growth.py` says how the model grows while its text stays what it was.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
    sys.path[0] = str(ROOT)

import click  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.growth import BLOCK, RECIPE, Shape, check_room, grow, recipe, shape_of  # noqa: E402
from config import HEADS_FOLDER, usable_cores  # noqa: E402
from model.base.gguf_file import GGUFFile, requantize  # noqa: E402
from model.base.llama import LlamaBase  # noqa: E402
from model.base.llama_model import LlamaModel  # noqa: E402
from model.engine import find_heads  # noqa: E402
from model.errors import HeadsError  # noqa: E402
from model.heads.files import base_facts, load_heads, new_heads, save_heads  # noqa: E402
from model.training.command import one_line  # noqa: E402

BUNDLED = ROOT / "models" / "tiny-python.Q4_0.gguf"
OUT = ROOT / "build" / "scaled"
# TinyLlama has 4 KV heads, too few for the bundled model's 5: 8 are the next that divide 32, and 2 % more parameters.
SHAPES = {
    "1b": Shape(dim=2048, layers=22, heads=32, kv_heads=8, head_dim=64, ffn=5632, vocab=32_000),
    "7b": Shape(dim=4096, layers=32, heads=32, kv_heads=32, head_dim=128, ffn=11_008, vocab=32_000),
}
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS")
OUTPUT_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS")
POSITIONS = 64  # tokens that show how large the residual stream is
SPARE_BIAS = 3.0  # adds 2.9 to the constant in what the LM head reads: int8 must not round that to nothing


@dataclass(frozen=True)
class Scaled:
    """A benchmark model: its GGUF, and its heads where the base model has some."""

    model: Path
    heads: Path | None

    def variables(self) -> str:
        """Return what to set to use it, as a shell reads it."""
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
    """Write the benchmark model of a shape in SHAPES and of a type such as "Q4_0", with heads beside it.

    output_type: of the LM head, where it should differ. heads: of the base model; None: those that are known, if any.
    Raises UsageError where the shape is too small, ModelFileError for a base model and HeadsError for heads that
    cannot be grown, OutputError where something cannot be written.
    """
    file = GGUFFile(base)
    heads = heads or find_heads(HEADS_FOLDER, file)
    name = f"{base.name.split('.')[0]}-{shape}"
    stem = f"{name}.{kind}" + (f"-output-{output_type}" if output_type else "")
    target = out / f"{stem}.gguf"
    if not target.exists() or GGUFFile(target).metadata.get(RECIPE) != recipe(file, SHAPES[shape]):
        _write(file, SHAPES[shape], target, name, kind, output_type)
    if heads:
        grow_heads(heads, file, GGUFFile(target), out / f"{stem}.heads")
    return Scaled(target, out / f"{stem}.heads" if heads else None)


def _write(file: GGUFFile, shape: Shape, target: Path, name: str, kind: str, output_type: str | None) -> None:
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

    llama.cpp doesn't show it. But a constant that entered that norm comes out of it divided by this RMS: so grow the
    model by one block and look.
    """
    small = shape_of(file)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "probe.gguf"
        grow(file, replace(small, dim=small.dim + 2 * BLOCK), path, name="probe", stream=1.0)
        model = LlamaModel(path)
        with LlamaBase(model, n_ctx=POSITIONS, n_threads=usable_cores(), embeddings=True) as context:
            context.decode(np.random.default_rng(0).integers(0, small.vocab, POSITIONS).astype(np.int32), 0, 0)
            constants = context.hidden(POSITIONS)[:, -1].copy()
        model.close()
    return float(1 / np.median(constants))


def grow_heads(source: Path, base: GGUFFile, large: GGUFFile, target: Path) -> None:
    """Write the base model's heads with zeros around their weights, so that they guess what they guessed.

    The states' last entry, the constant that keeps new tokens from being chosen, passes through and grows on the way.
    Raises HeadsError for heads that have LM heads of their own.
    """
    small, facts = load_heads(source, base)
    config = small.config
    if config.lm_head == "own":
        raise HeadsError(f"{source}: heads with LM heads of their own cannot be grown; train them with --lm_head tied")
    inner = max(config.hidden_dim * large.n_embd // base.n_embd, config.hidden_dim + 1) if config.bottleneck else 0
    config = replace(config, dim=large.n_embd, vocab=large.n_vocab, hidden_dim=inner)
    heads = new_heads(config, large).requires_grad_(False)
    for name, old in small.state_dict().items():
        heads.state_dict()[name].zero_()[tuple(slice(n) for n in old.shape)] = old
    heads.bias[0, :, -1] = SPARE_BIAS
    if heads.up is not None:
        heads.up[0, :, -1, -1] = 1.0
    kept: dict[str, Any] = {key: facts[key] for key in ("training", "rank_accuracies") if key in facts}
    if facts["token_counts"] is not None:
        kept["token_counts"] = np.pad(facts["token_counts"], (0, large.n_vocab - base.n_vocab))
    save_heads(target, heads, {**base_facts(large), **kept})


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.option("--shape", type=click.Choice(list(SHAPES)), default="1b")
@click.option("--type", "kind", type=click.Choice(TYPES, case_sensitive=False), default="Q4_0")
@click.option(
    "--output_type", type=click.Choice(OUTPUT_TYPES, case_sensitive=False), help="Of the LM head, to make it differ."
)
@click.option("--base", type=click.Path(path_type=Path), default=BUNDLED, show_default="the bundled model")
@click.option("--heads", type=click.Path(path_type=Path), show_default="those that belong to the base model")
@click.option("--out", type=click.Path(path_type=Path), default=OUT, show_default="build/scaled")
def main(shape: str, kind: str, output_type: str | None, base: Path, heads: Path | None, out: Path) -> None:
    """Build a model that behaves as a small one and costs as much as a large one."""
    start = perf_counter()
    with one_line():
        scaled = build(shape, kind, output_type, base=base, heads=heads, out=out)
    size, seconds = scaled.model.stat().st_size / 1e9, perf_counter() - start
    click.echo(f"{os.path.relpath(scaled.model)}: {size:.2f} GB, {seconds:.0f} s")
    click.echo(f"{scaled.variables()} python main.py bench")


if __name__ == "__main__":
    main()
