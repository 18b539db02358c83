"""Quantizations: how fast other types of a file would be, each with its best tree.

Copies are made, timed, and searched for the tree.

Speed alone: the quality of a type is not measured. Acceptance and drafting times are the given
tuning's.
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
from model.errors import ModelFileError, OutputError, UsageError
from model.evaluation.partial_copies import (
    Seconds,
    extrapolate,
    extrapolate_size,
    layers_timed,
    time_files,
)
from model.evaluation.tuning_report import describe_tree
from model.loaded_model import LoadedModel
from model.planning.auto_tuning import Tuning
from model.storage.disk_room import human_size
from model.trees.costs import CostCurve
from model.trees.search import TreeChoice

MIN_SPEEDUP = 1.02  # times as fast: below, another type is not advised
# Times the measured speed: beyond, extrapolating a few layers is too wrong to advise anything.
MAX_EXTRAPOLATION_ERROR = 1.2


@dataclass(frozen=True, kw_only=True)
class TypeRow:
    """One quantization.

    name: such as "q4_0+q4_0". size: bytes of the whole file. best: the best tree and its speed.
    layers: numbers of layers of the files that were timed. kind, output_type: what makes it, of the
    file and of the LM head; None for the file as it is.
    """

    name: str
    size: int
    curve: CostCurve
    best: TreeChoice
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
    """Return the types of a list such as "q4_0,q4_0+q4_0,bf16".

    Each is a file's type, and its LM head's where that differs. Raises UsageError where one is
    unknown.
    """
    names = list(dict.fromkeys(name.strip().lower() for name in text.split(",") if name.strip()))
    if not names:
        raise UsageError(f"no types in {text!r}; name some, such as q4_0,q4_0+q4_0,bf16")
    for name in names:
        _parse(name)
    return names


def _parse(name: str) -> tuple[str, str | None]:
    kind, plus, output = name.partition("+")
    output_type = tensor_type(output) if plus else None
    return file_type(kind), output_type


def compare_types(
    loaded: LoadedModel,
    tuning: Tuning,
    names: Sequence[str],
    *,
    full: bool = False,
    budget_s: float = 3.0,
    folder: Path | None = None,
    on_timing: Callable[[str], None] = lambda what: None,
) -> list[TypeRow]:
    """Return a row for the loaded file as it is, and one for each type that it could have.

    tuning: acceptance and drafting times, taken to be the same for all types. full: time copies of
    the whole file; without, copies of a few layers, and a second row for the file as it is shows
    how well a few layers predict all. budget_s: seconds of timing per row, if three rounds take no
    longer. folder: where copies lie until this returns or raises; None: the system's for such.
    on_timing: called with what is timed next. Raises UsageError for unknown types, ModelFileError
    for a model that cannot be cut, OutputError without room.
    """
    wanted = [(name, *_parse(name)) for name in names]
    if not full:
        _check_cuttable(loaded)
    with _scratch(folder) as scratch:
        comparison = _Comparison(loaded, tuning, scratch, budget_s)

        # What is copied: the whole file, or its parts of a few layers.
        parts = {loaded.file.n_layer: loaded.file.path}
        if not full:
            parts = comparison.cut()

        # The file as it is, and as its parts predict it.
        on_timing("the file as it is")
        rows = comparison.as_it_is(parts)

        # Each type.
        for name, kind, output_type in wanted:
            on_timing(name)
            rows.append(comparison.copied(name, parts, kind, output_type))
    return rows


@dataclass(frozen=True)
class _Comparison:
    """What all rows of a comparison share; see compare_types."""

    loaded: LoadedModel
    tuning: Tuning
    scratch: Path
    budget_s: float

    @property
    def context(self) -> int:
        """Tokens in the cache while steps are timed."""
        return self.tuning.curve.contexts[0]

    def cut(self) -> dict[int, Path]:
        """Write files of a few of the model's layers; return them by their numbers of layers."""
        file = self.loaded.file
        parts = {n: self.scratch / f"{n}.gguf" for n in layers_timed(file.n_layer)}
        for n, path in parts.items():
            cut_layers(file.path, path, n)
        return parts

    def as_it_is(self, parts: dict[int, Path]) -> list[TypeRow]:
        """Time the loaded file as a whole and, where no part is the whole, its parts."""
        file = self.loaded.file
        if file.n_layer in parts:
            parts = {}
        name = file.file_type.lower()
        size = sum(path.stat().st_size for path in file.paths)
        seconds = time_files(
            self.loaded,
            parts,
            size,
            context=self.context,
            budget_s=self.budget_s,
            whole_too=True,
        )
        rows = [self._row(f"{name}, this file", size, seconds, (file.n_layer,))]
        if parts:
            rows.append(self._row(f"{name}, by its parts", size, seconds, tuple(parts)))
        return rows

    def copied(
        self, name: str, parts: dict[int, Path], kind: str, output_type: str | None
    ) -> TypeRow:
        """Write copies of another type, time them, and remove them."""
        threads = self.loaded.options.n_threads
        copies = {n: self.scratch / f"{n}-copy.gguf" for n in parts}
        for n, path in copies.items():
            requantize(parts[n], path, kind, output_type, threads=threads)
        size = extrapolate_size(copies, self.loaded.file.n_layer)
        seconds = time_files(
            self.loaded, copies, size, context=self.context, budget_s=self.budget_s
        )
        for path in copies.values():
            path.unlink()
        return self._row(name, size, seconds, tuple(copies), kind, output_type)

    def _row(
        self,
        name: str,
        size: int,
        seconds: Seconds,
        layers: tuple[int, ...],
        kind: str | None = None,
        output_type: str | None = None,
    ) -> TypeRow:
        """Search the best tree by the times of files of so many layers."""
        curve = extrapolate(seconds, layers, self.loaded.file.n_layer, self.context)
        best = replace(self.tuning, curve=curve).best(self.context, self.loaded.options.max_nodes)
        return TypeRow(
            name=name,
            size=size,
            curve=curve,
            best=best,
            layers=layers,
            kind=kind,
            output_type=output_type,
        )


def _check_cuttable(loaded: LoadedModel) -> None:
    """Raise where a few layers cannot predict the time of all."""
    if not layers_alike(loaded.file):
        raise ModelFileError(
            f"{loaded.file.path}: its layers differ, a few cannot predict all; use --full"
        )
    if 0 < loaded.options.n_gpu_layers < loaded.file.n_layer:
        raise UsageError(
            f"N_GPU_LAYERS={loaded.options.n_gpu_layers}: with a part of the layers on the GPU, "
            "a few cannot predict all; use --full"
        )


@contextmanager
def _scratch(folder: Path | None) -> Iterator[Path]:
    """Give a folder that is gone afterwards, whatever happens."""
    try:
        scratch = tempfile.TemporaryDirectory(
            prefix="medusa-types-", dir=folder, ignore_cleanup_errors=True
        )
    except OSError as error:
        where = folder or "the system's temporary folder"
        raise OutputError(
            f"{where}: cannot be written ({error.strerror}); set TMPDIR to another folder"
        ) from None
    with scratch as path:
        yield Path(path)


def table(rows: Sequence[TypeRow]) -> str:
    """Return the rows as text, with how far to trust them and what to do."""
    width = max(len(row.name) for row in rows)
    lines = [
        f"{'type':{width}}       size  plain tok/s  t(4)/t(1)  "
        "best tree                speedup  expected tok/s"
    ]
    for row in rows:
        lines.append(
            f"{row.name:{width}}  {human_size(row.size):>9}  "
            f"{row.plain_tokens_per_s:11.1f}  {row.ratio_4:9.2f}  "
            f"{describe_tree(row.best):23}  {row.best.speedup:6.2f}x  {row.best.tokens_per_s:14.1f}"
        )
    return "\n".join([*lines, *_advice(rows)])


def _advice(rows: Sequence[TypeRow]) -> list[str]:
    """Return the lines under the table: whether its figures can be trusted, and what to do."""
    made = [row for row in rows if row.kind]
    this_file = rows[0]
    base = rows[len(rows) - len(made) - 1]  # extrapolated from its parts, where the types are
    lines = list[str]()

    # How far the extrapolation is off on the one file of which all is known.
    if base is not this_file:
        ratio = this_file.plain_tokens_per_s / base.plain_tokens_per_s
        few = " and ".join(map(str, base.layers))
        lines.append(
            f"Types are judged by {few} of {this_file.layers[0]} layers. For this file that gives "
            f"{ratio:.2f} times what a token really takes; --full times whole copies."
        )
        if not 1 / MAX_EXTRAPOLATION_ERROR <= ratio <= MAX_EXTRAPOLATION_ERROR:
            lines.append(
                "That is too far off to go by: use --full, or try again on a machine without other "
                "work."
            )
            return lines

    # The fastest type.
    fastest = max(made, key=lambda row: row.best.tokens_per_s, default=base)
    gain = fastest.best.tokens_per_s / base.best.tokens_per_s
    if fastest.kind is None or gain < MIN_SPEEDUP:
        lines.append(
            "None of these types is expected to be faster than this file with its best tree."
        )
        return lines
    command = f"python main.py requantize --type {fastest.kind.lower()}"
    if fastest.output_type:
        command += f" --output_type {fastest.output_type.lower()}"
    lines.append(
        f"Expected {gain:.2f} times as fast as this file with its best tree: {command} OUT.gguf"
    )
    return lines
