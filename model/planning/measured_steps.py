"""Measured step times: what steps and drafts cost on this machine, timed through `step` itself.

They include verification and roll-back. Knows no acceptance.
"""

from __future__ import annotations

import collections.abc as abc
from functools import partial
from statistics import median
from time import perf_counter

import numpy as np

from model.base.llama import LlamaBase
from model.decoding.draft_policy import FixedPolicy
from model.decoding.drafters.drafter import HEADS, ConstantDrafter
from model.decoding.sampling import SamplingParams
from model.decoding.sequence import Sequence
from model.decoding.step import step
from model.loaded_model import MIN_CONTEXT, LoadedModel
from model.trees.costs import SIZES, CostCurve, curve_in_slices
from model.trees.slices import Slices, finish, undisturbed
from model.trees.tree import Tree

CONTEXTS = (64, 1024)  # tokens in the cache
SEQ_IDS = 8  # of the context that is timed
# Steps quicker than this are timed by the next two: llama.cpp rebuilds its graph for a new size.
QUICK_S = 0.02
MIN_DRAFTS = 3  # the fewest from which a median can drop a spike
MAX_DRAFTS = 40
PREFILL_SLICE = 32  # tokens: about as long as a slice of steps


def step_curve(loaded: LoadedModel, budget_s: float) -> Slices[CostCurve]:
    """Time steps of 1 to max_nodes rows over short and long contexts; all drafts are rejected.

    One row is timed as plain steps are made, without states.
    """
    contexts = sorted({max(2, min(context, loaded.context // 2)) for context in CONTEXTS})
    widest = FixedPolicy(Tree.product([SEQ_IDS]))
    with loaded.new_base(widest, n_ctx=contexts[-1] + SIZES[-1]) as base:
        max_nodes = loaded.options.max_nodes
        return (yield from time_steps(base, contexts, max_nodes, budget_s))


def time_steps(
    base: LlamaBase, contexts: abc.Sequence[int], max_nodes: int, budget_s: float
) -> Slices[CostCurve]:
    """Time steps of 1 to max_nodes rows in a context of SEQ_IDS sequence ids.

    Of fewer where they take long.
    """
    timer = StepTimer(base)
    yield from timer.prefill(contexts[0])
    plain_s = yield from undisturbed(lambda: timer.run(1, contexts[0]))
    most = 16
    if plain_s < 0.005:
        most = 64
    elif plain_s < 0.05:
        most = 32
    sizes = [n for n in SIZES if n <= min(max_nodes, most)]
    if len(sizes) == 1:
        sizes = [1, 2]
    return (
        yield from curve_in_slices(
            timer.run, sizes, contexts, budget_s=budget_s, prepare=timer.prefill
        )
    )


class StepTimer:
    """Makes steps of any size over one made-up sequence, which has the same length after each."""

    def __init__(self, base: LlamaBase) -> None:
        self._base = base
        self._context = 0
        self._tokens = list[int]()

    def run(self, n: int, context: int) -> float:
        """Return the seconds of a step of n rows over so many cached tokens."""
        finish(self.prefill(context))
        seconds = self._step(n)
        if seconds < QUICK_S:
            seconds = median(self._step(n) for _ in range(2))
        return seconds

    def prefill(self, context: int) -> Slices[None]:
        """Begin with a sequence of so many cached tokens, where it has another length."""
        if context == self._context:
            return
        rng = np.random.default_rng(0)
        self._tokens = rng.integers(0, self._base.n_vocab, context + 1).tolist()
        ids = np.array(self._tokens[:-1], np.int32)
        self._base.clear()
        for at in range(0, context, PREFILL_SLICE):
            self._base.prefill(ids[at : at + PREFILL_SLICE], at, 0)
            yield
        for seq_id in range(1, self._base.n_seq_max):
            self._base.seq_cp(0, seq_id, 0, context)
        self._context = context

    def _step(self, n: int) -> float:
        sequence = Sequence(self._tokens, self._base.model, SamplingParams(), context=1 << 30)
        sequence.seq_ids = range(self._base.n_seq_max)
        if n > 1:
            sequence.tree_drafters[HEADS] = ConstantDrafter(0)
            sequence.hidden = np.zeros((1, self._base.n_embd), np.float32)
        step(self._base, [sequence], FixedPolicy(Tree.chain(n - 1)))
        self._base.seq_rm(-1, len(self._tokens) - 1, -1)
        return sequence.statistics.seconds


def draft_seconds(
    loaded: LoadedModel, draft_vocab: int | None, budget_s: float
) -> Slices[list[float]]:
    """Return (K,) seconds that the heads take to be asked for their first 1 … K levels.

    Timed between two decodes, where all caches are cold; a few depths, the others between them.
    """
    k = loaded.n_heads
    drafter = loaded.heads_drafter(Tree.chain(k), draft_vocab)
    times: dict[int, list[float]] = {depth: [] for depth in sorted({1, (k + 1) // 2, k})}
    state = np.random.default_rng(0).standard_normal((1, loaded.file.n_embd)).astype(np.float32)
    with loaded.new_base(n_ctx=MIN_CONTEXT) as base:
        spent_s = 0.0

        def draft(depth: int) -> float:
            nonlocal spent_s
            base.clear()
            began = perf_counter()
            base.decode(np.zeros(1, np.int32), 0, 0)
            since = perf_counter()
            asked = state.copy()  # what was asked of the same state may be known
            for level in range(depth):
                drafter.look(asked, [0], [[0] * (level + 1)])
            now = perf_counter()
            spent_s += now - began
            return now - since

        for n_timed in range(MAX_DRAFTS):
            if n_timed >= MIN_DRAFTS and spent_s > budget_s:
                break
            for depth, seconds in times.items():
                seconds.append((yield from undisturbed(partial(draft, depth))))
    medians = [median(each) for each in times.values()]
    return np.interp(np.arange(1, k + 1), list(times), medians).tolist()
