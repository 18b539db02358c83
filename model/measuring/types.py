"""What other quantizations of a model would bring: copies are made, timed, and searched for their best tree.

Speed alone: how well a type writes is not measured. Guess rates and drafting times are the given tuning's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model.base.cutting import cut_layers, layers_alike
from model.base.gguf_file import requantize
from model.base.quantizer import file_type, tensor_type
from model.base.whole_file import human_size
from model.engine import Engine
from model.errors import ModelFileError, OutputError, UsageError
from model.measuring.copies import Seconds, layers_timed, reckon, reckon_size, time_files
from model.measuring.tuning import Tuning
from model.measuring.tuning_report import describe_tree
from model.trees.costs import CostCurve
from model.trees.search import Choice

WORTH = 1.02  # times as fast: below, another type is not advised
TRUSTED = 1.2  # times what was measured: beyond, what a few layers tell is not gone by


@dataclass(frozen=True)
class TypeRow:
    """One quantization. name: such as "q4_0+q4_0"; size: bytes of the whole file; best: the tree and what it earns;
    layers: those of the files that were timed; kind, output_type: what makes it, None for the file as it is.
    """

    name: str
    size: int
    curve: CostCurve
    best: Choice
    layers: tuple[int, ...]
    kind: str | None = None
    output_type: str | None = None

    @property
    def plain_tokens_per_s(self) -> float:
        """Without drafts."""
        return 1 / self.curve.seconds[0][0]

    @property
    def ratio_4(self) -> float:
        """t(4) / t(1)."""
        return self.curve.ratio(4, 0)

    def to_json(self) -> dict[str, Any]:
        """Return what a file of results should say."""
        return {
            "type": self.name,
            "bytes": self.size,
            "layers_timed": list(self.layers),
            "plain_tokens_per_s": self.plain_tokens_per_s,
            "ratio_4": self.ratio_4,
            "curve": self.curve.to_json(),
            "tree_nodes": len(self.best.tree),
            "tree_depth": self.best.tree.max_depth,
            "expected_length": self.best.expected_length,
            "speedup": self.best.speedup,
            "tokens_per_s": self.best.tokens_per_s,
        }


def parse_types(text: str) -> list[str]:
    """Return the types of a list such as "q4_0,q4_0+q4_0,bf16": a file's, and its LM head's where that differs.

    Raises UsageError where one is unknown.
    """
    names = list(dict.fromkeys(name.strip().lower() for name in text.split(",") if name.strip()))
    if not names:
        raise UsageError(f"no types in {text!r}; name some, such as q4_0,q4_0+q4_0,bf16")
    for name in names:
        _parse(name)
    return names


def _parse(name: str) -> tuple[str, str | None]:
    kind, plus, output = name.partition("+")
    return file_type(kind), tensor_type(output) if plus else None


def compare_types(
    engine: Engine,
    tuning: Tuning,
    names: Sequence[str],
    *,
    full: bool = False,
    budget_s: float = 3.0,
    folder: Path | None = None,
    told: Callable[[str], None] = lambda what: None,
) -> list[TypeRow]:
    """Return a row for the loaded file as it is, and one for each type that it could have.

    tuning: guess rates and drafting times, taken to be the same for all types. full: time copies of the whole file;
    without, of a few layers, and a second row for the file as it is tells what these are worth. budget_s: seconds of
    timing per row, if three rounds take no longer. folder: where copies lie until this returns or raises; None: the
    system's for such. told: called with what is timed next.
    Raises UsageError for unknown types, ModelFileError for a model that cannot be cut, OutputError without room.
    """
    wanted, file, whole = [(name, *_parse(name)) for name in names], engine.file, engine.file.n_layer
    if not full:
        _check_cuttable(engine)
    context = tuning.curve.contexts[0]

    def row(name: str, size: int, seconds: Seconds, layers: tuple[int, ...], *made: str | None) -> TypeRow:
        curve = reckon(seconds, layers, whole, context)
        best = replace(tuning, curve=curve).best(context, engine.options.max_nodes)
        return TypeRow(name, size, curve, best, layers, *made)

    with _scratch(folder) as scratch:
        parts = {whole: file.path}
        if not full:
            parts = {n: scratch / f"{n}.gguf" for n in layers_timed(whole)}
            for n, path in parts.items():
                cut_layers(file.path, path, n)
        told("the file as it is")
        kept = {} if whole in parts else parts
        name, size = file.file_type.lower(), sum(path.stat().st_size for path in file.paths)
        seconds = time_files(engine, kept, size, context=context, budget_s=budget_s, loaded=True)
        rows = [row(f"{name}, this file", size, seconds, (whole,))]
        if kept:
            rows.append(row(f"{name}, by its parts", size, seconds, tuple(kept)))
        for name, kind, output in wanted:
            told(name)
            copies = {n: scratch / f"{n}-copy.gguf" for n in parts}
            for n, path in copies.items():
                requantize(parts[n], path, kind, output, threads=engine.options.n_threads)
            size = reckon_size(copies, whole)
            seconds = time_files(engine, copies, size, context=context, budget_s=budget_s)
            rows.append(row(name, size, seconds, tuple(copies), kind, output))
            for path in copies.values():
                path.unlink()
    return rows


def _check_cuttable(engine: Engine) -> None:
    """Raise where a few layers don't tell what all of them take."""
    if not layers_alike(engine.file):
        raise ModelFileError(f"{engine.file.path}: its layers differ, a few of them don't tell; use --full")
    if 0 < engine.options.n_gpu_layers < engine.file.n_layer:
        raise UsageError(
            f"N_GPU_LAYERS={engine.options.n_gpu_layers}: with a part of the layers on the GPU, a few don't tell; "
            "use --full"
        )


@contextmanager
def _scratch(folder: Path | None) -> Iterator[Path]:
    """Give a folder that is gone afterwards, whatever happens."""
    try:
        scratch = tempfile.TemporaryDirectory(prefix="medusa-types-", dir=folder, ignore_cleanup_errors=True)
    except OSError as error:
        where = folder or "the system's temporary folder"
        raise OutputError(f"{where}: cannot be written ({error.strerror}); set TMPDIR to another folder") from None
    with scratch as path:
        yield Path(path)


def table(rows: Sequence[TypeRow]) -> str:
    """Return the rows as text, with how far they can be trusted and what to do."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'type':{width}}       size  plain tok/s  t(4)/t(1)  best tree                speedup  expected tok/s"]
    for row in rows:
        lines.append(
            f"{row.name:{width}}  {human_size(row.size):>9}  {row.plain_tokens_per_s:11.1f}  {row.ratio_4:9.2f}  "
            f"{describe_tree(row.best):23}  {row.best.speedup:6.2f}x  {row.best.tokens_per_s:14.1f}"
        )
    return "\n".join([*lines, *_advice(rows)])


def _advice(rows: Sequence[TypeRow]) -> list[str]:
    made = [row for row in rows if row.kind]
    base, lines = rows[len(rows) - len(made) - 1], list[str]()  # judged by its parts, where the types are
    if base is not rows[0]:
        off = rows[0].plain_tokens_per_s / base.plain_tokens_per_s
        lines.append(
            f"Types are judged by {' and '.join(map(str, base.layers))} of {rows[0].layers[0]} layers. For this file "
            f"that gives {off:.2f} times what a token really takes; --full times whole copies."
        )
        if not 1 / TRUSTED <= off <= TRUSTED:
            return [*lines, "That is too far off to go by: use --full, or try again on a machine without other work."]
    winner = max(made, key=lambda row: row.best.tokens_per_s, default=base)
    gain = winner.best.tokens_per_s / base.best.tokens_per_s
    if winner.kind is None or gain < WORTH:
        return [*lines, "None of these types is expected to be faster than this file with its best tree."]
    output = f" --output_type {winner.output_type.lower()}" if winner.output_type else ""
    command = f"python main.py requantize --type {winner.kind.lower()}{output} OUT.gguf"
    return [*lines, f"Expected {gain:.2f} times as fast as this file with its best tree: {command}"]
