"""Partial copies: what steps cost on files with a few of a model's layers, extrapolated to all.

A step takes a(n) + layers · b(n): two numbers of layers give a and b. But a few layers may fit into
the processor's cache (260 MB on a rented core), where in the whole model all other layers would
come in between. So before each step as many bytes of something else are read. Knows nothing of
types, trees and heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from model.base.llama import LlamaBase
from model.base.llama_model import LlamaModel
from model.loaded_model import LoadedModel
from model.planning.measured_steps import SEQ_IDS, StepTimer
from model.trees.costs import CostCurve, measure_curve

SIZES = (1, 2, 3, 4, 6, 8, 12, 16)  # tokens per step that are timed; at the least up to 4
FEW = 2  # layers of the smaller copies
MANY = 4  # and of the larger ones
MAX_EVICTING_BYTES = 512 << 20  # read between steps: more than caches hold
Run = Callable[[int, int], float]  # seconds of a step of n rows over a context
Seconds = dict[int, dict[int, list[float]]]  # by rows and by number of layers: each round's


def layers_timed(n_layer: int) -> tuple[int, ...]:
    """Return the numbers of layers that copies have: FEW and MANY, or what a small model has."""
    many = min(MANY, n_layer)
    if many == 1:
        return (many,)
    return min(FEW, many // 2), many


def time_files(
    loaded: LoadedModel,
    files: Mapping[int, Path],
    size: int,
    *,
    context: int,
    budget_s: float,
    whole_too: bool = False,
) -> Seconds:
    """Time steps in turn on files, by their numbers of layers.

    whole_too: on the loaded model itself as well. size: bytes of a file with all layers; what one
    of `files` lacks of them is read elsewhere between its steps. budget_s: seconds for all, if
    three rounds take no longer.
    """
    # The sizes of steps, and what is read between them.
    options = loaded.options
    sizes = [n for n in SIZES if n <= max(4, options.max_nodes)]
    missing = {
        layers: min(max(size - path.stat().st_size, 0), MAX_EVICTING_BYTES)
        for layers, path in files.items()
    }
    evicting = np.ones(max(missing.values(), default=0) // 8)

    # A context for each file.
    with ExitStack() as stack:
        models = {loaded.file.n_layer: loaded.base_model} if whole_too else {}
        for layers, path in files.items():
            model = LlamaModel(path, n_gpu_layers=options.n_gpu_layers, use_mmap=options.use_mmap)
            models[layers] = stack.enter_context(closing(model))
        runs = dict[int, Run]()
        for layers, model in models.items():
            base = LlamaBase(
                model,
                n_ctx=context + 2 * sizes[-1],
                n_threads=options.n_threads,
                n_seq_max=SEQ_IDS,
                embeddings=True,
                flash_attn=loaded.flash_attn,
                kv_type=options.kv_type,
            )
            timer = ColdCacheTimer(
                stack.enter_context(base), evicting[: missing.get(layers, 0) // 8]
            )
            runs[layers] = timer.run
        return time_in_turn(runs, sizes, context, budget_s)


class ColdCacheTimer(StepTimer):
    """Times steps that find the caches full of something else."""

    def __init__(self, base: LlamaBase, evicting: npt.NDArray[np.float64]) -> None:
        super().__init__(base)
        self._evicting = evicting

    def _step(self, n: int) -> float:
        self._evicting.sum()
        return super()._step(n)


def time_in_turn(
    runs: Mapping[int, Run], sizes: Sequence[int], context: int, budget_s: float
) -> Seconds:
    """Time all sizes, in each round on all models.

    So what else the machine does slows all of them.
    """
    seconds: Seconds = {n: {layers: [] for layers in runs} for n in sizes}

    def run_all(n: int, context: int) -> float:
        for layers, run in runs.items():
            seconds[n][layers].append(run(n, context))
        return sum(each[-1] for each in seconds[n].values())

    measure_curve(run_all, sizes, [context], budget_s=budget_s)
    return seconds


def extrapolate(seconds: Seconds, layers: Sequence[int], whole: int, context: int) -> CostCurve:
    """Return the curve of a model with `whole` layers, a + whole · b.

    layers: one or two numbers of layers that were timed, ascending. With two, b is the median of
    the rounds' differences, and not below 0: noise must not make layers free.
    """
    few = layers[0]
    many = layers[-1]
    row = []
    for times in seconds.values():
        layer_s = 0.0
        if many > few:
            differences = [m - f for m, f in zip(times[many], times[few], strict=True)]
            layer_s = max(0.0, median(differences) / (many - few))
        row.append(float(median(times[few]) + (whole - few) * layer_s))
    return CostCurve((context,), tuple(seconds), (tuple(row),))


def extrapolate_size(files: Mapping[int, Path], whole: int) -> int:
    """Return the bytes of a file with `whole` layers from those with one or two numbers of them."""
    few = min(files)
    many = max(files)
    sizes = {layers: path.stat().st_size for layers, path in files.items()}
    layer_bytes = 0.0
    if many > few:
        layer_bytes = (sizes[many] - sizes[few]) / (many - few)
    return round(sizes[few] + (whole - few) * layer_bytes)
