"""What steps and drafts cost on this machine, timed through `step` itself: verification and roll-back are in it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from time import perf_counter

import numpy as np

from model.base.llama import LlamaBase
from model.decoding.drafting import ConstantDrafter
from model.decoding.planning import FixedPlan
from model.decoding.sampling import Sampler, SamplingParams
from model.decoding.slot import Slot
from model.decoding.step import prefill, step
from model.engine import Engine
from model.trees.costs import SIZES, CostCurve, measure_curve
from model.trees.tree import Tree

CONTEXTS = (64, 1024)  # tokens in the cache
LANES = 8  # of the context that is timed
QUICK_S = 0.02  # a step below this is timed twice after one that is not: llama.cpp rebuilds its graph for a new size


def step_curve(engine: Engine, budget_s: float = 1.0) -> CostCurve:
    """Time steps of 1 to MEDUSA_MAX_TOKENS_PER_STEP rows over short and long contexts; all drafts are refused.

    One row is timed as plain steps are made, without states.
    """
    contexts = sorted({max(2, min(c, engine.context // 2)) for c in CONTEXTS})
    widest = FixedPlan(Tree.product([LANES]))
    with engine.base(widest, context=contexts[-1] + SIZES[-1]) as base:
        return time_steps(base, contexts, engine.options.max_nodes, budget_s)


def time_steps(base: LlamaBase, contexts: Sequence[int], max_nodes: int, budget_s: float) -> CostCurve:
    """Time steps of 1 to max_nodes rows in a context of LANES lanes, of fewer where they take long."""
    timer = StepTimer(base)
    plain = timer.run(1, contexts[0])
    most = min(max_nodes, 64 if plain < 0.005 else 32 if plain < 0.05 else 16)
    sizes = [n for n in SIZES if n <= most]
    return measure_curve(timer.run, sizes if len(sizes) > 1 else [1, 2], contexts, budget_s=budget_s)


class StepTimer:
    """Steps of any size over one made-up text, which is as long again after each."""

    def __init__(self, base: LlamaBase) -> None:
        self._base, self._context, self._tokens = base, 0, list[int]()

    def run(self, n: int, context: int) -> float:
        """Return the seconds of a step of n rows over so many cached tokens."""
        if context != self._context:
            self._base.clear()
            rng = np.random.default_rng(0)
            self._tokens = rng.integers(0, self._base.n_vocab, context + 1).tolist()
            prefill(self._base, self._slot(1))
            self._context = context
        took = self._step(n)
        return median(self._step(n) for _ in range(2)) if took < QUICK_S else took

    def _slot(self, n: int) -> Slot:
        lanes, sampler = range(self._base.n_seq_max), Sampler(SamplingParams())
        slot = Slot(list(self._tokens), 1 << 30, sampler, lambda token: False, lanes=lanes)
        if n > 1:
            slot.drafter, slot.hidden = ConstantDrafter(0), np.zeros((1, self._base.n_embd), np.float32)
        return slot

    def _step(self, n: int) -> float:
        slot = self._slot(n)
        step(self._base, [slot], FixedPlan(Tree.chain(n - 1)))
        self._base.seq_rm(-1, len(self._tokens) - 1, -1)
        return slot.stats.seconds


def draft_seconds(engine: Engine, draft_vocab: int | None, budget_s: float) -> list[float]:
    """Return (K,) seconds that chains of 1 … K tokens take to draft between two decodes, where all caches are cold."""
    k = engine.n_heads
    chains = {depth: Tree.chain(depth) for depth in sorted({1, (k + 1) // 2, k})}
    drafters = {depth: engine.drafter(chain, draft_vocab) for depth, chain in chains.items()}
    times: dict[int, list[float]] = {depth: [] for depth in drafters}
    state, start = np.random.default_rng(0).standard_normal((1, engine.file.n_embd)).astype(np.float32), perf_counter()
    with engine.base() as base:
        while len(times[k]) < 3 or (len(times[k]) < 40 and perf_counter() - start < budget_s):
            for depth, drafter in drafters.items():
                base.clear()
                base.decode(np.zeros(1, np.int32), 0, 0)
                since = perf_counter()
                drafter.draft(state, [0], [chains[depth]])
                times[depth].append(perf_counter() - since)
    return np.interp(np.arange(1, k + 1), list(times), [median(t) for t in times.values()]).tolist()
