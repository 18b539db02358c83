"""What a step costs on files that have a few of a model's layers, and what that says of the whole model.

A step takes a(n) + layers · b(n): two numbers of layers give a and b. But a few layers may fit into the processor's
cache (260 MB on a rented core), where in the whole model all other layers would come in between. So before each step
as many bytes of something else are read. Knows nothing of types, trees and heads.
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
from model.engine import Engine
from model.measuring.step_times import LANES, StepTimer
from model.trees.costs import CostCurve, measure_curve

SIZES = (1, 2, 3, 4, 6, 8, 12, 16)  # tokens per step that are timed; at the least up to 4
FEW, MANY = 2, 4  # layers of the copies
MOST_CROWD = 512 << 20  # bytes read between steps: more than caches hold
Run = Callable[[int, int], float]  # seconds of a step of n rows over a context
Seconds = dict[int, dict[int, list[float]]]  # by rows and by number of layers: each round's


def layers_timed(n_layer: int) -> tuple[int, ...]:
    """Return the numbers of layers that copies have: FEW and MANY, or what a small model has."""
    many = min(MANY, n_layer)
    return (many,) if many == 1 else (min(FEW, many // 2), many)


def time_files(
    engine: Engine, files: Mapping[int, Path], size: int, *, context: int, budget_s: float, loaded: bool = False
) -> Seconds:
    """Time steps in turn on files, by their numbers of layers; with `loaded`, on the engine's own model too.

    size: bytes of a file with all layers; what one of `files` lacks is what else is read between its steps.
    budget_s: seconds for all, if three rounds take no longer.
    """
    o, sizes = engine.options, [n for n in SIZES if n <= max(4, engine.options.max_nodes)]
    missing = {layers: min(max(size - path.stat().st_size, 0), MOST_CROWD) for layers, path in files.items()}
    crowd = np.ones(max(missing.values(), default=0) // 8)
    with ExitStack() as stack:
        models = {engine.file.n_layer: engine.model} if loaded else {}
        for layers, path in files.items():
            model = LlamaModel(path, n_gpu_layers=o.n_gpu_layers, use_mmap=o.use_mmap)
            models[layers] = stack.enter_context(closing(model))
        runs = dict[int, Run]()
        for layers, model in models.items():
            base = LlamaBase(
                model, n_ctx=context + 2 * sizes[-1], n_threads=o.n_threads, n_seq_max=LANES, embeddings=True,
                flash_attn=o.flash_attn, kv_type=o.kv_type,
            )  # fmt: skip
            runs[layers] = CrowdedTimer(stack.enter_context(base), crowd[: missing.get(layers, 0) // 8]).run
        return time_in_turn(runs, sizes, context, budget_s)


class CrowdedTimer(StepTimer):
    """Times steps that find the caches full of something else."""

    def __init__(self, base: LlamaBase, crowd: npt.NDArray[np.float64]) -> None:
        super().__init__(base)
        self._crowd = crowd

    def _step(self, n: int) -> float:
        self._crowd.sum()
        return super()._step(n)


def time_in_turn(runs: Mapping[int, Run], sizes: Sequence[int], context: int, budget_s: float) -> Seconds:
    """Time all sizes, in each round on all models: what the machine does meanwhile meets them all."""
    seconds: Seconds = {n: {layers: [] for layers in runs} for n in sizes}

    def run_all(n: int, context: int) -> float:
        for layers, run in runs.items():
            seconds[n][layers].append(run(n, context))
        return sum(each[-1] for each in seconds[n].values())

    measure_curve(run_all, sizes, [context], budget_s=budget_s)
    return seconds


def reckon(seconds: Seconds, layers: Sequence[int], whole: int, context: int) -> CostCurve:
    """Return the curve of a model with `whole` layers, a + whole · b, from one or two numbers of `layers`, ascending.

    With two, b is the median of the rounds' differences, and not below 0: noise must not make layers free.
    """
    few, many = layers[0], layers[-1]
    row = []
    for times in seconds.values():
        each = 0.0
        if many > few:
            each = max(0.0, median(m - f for m, f in zip(times[many], times[few], strict=True)) / (many - few))
        row.append(float(median(times[few]) + (whole - few) * each))
    return CostCurve((context,), tuple(seconds), (tuple(row),))


def reckon_size(files: Mapping[int, Path], whole: int) -> int:
    """Return the bytes of a file with `whole` layers from those with one or two numbers of them."""
    few, many = min(files), max(files)
    sizes = {layers: path.stat().st_size for layers, path in files.items()}
    each = (sizes[many] - sizes[few]) / (many - few) if many > few else 0.0
    return round(sizes[few] + (whole - few) * each)
