"""What a step costs on this machine and what drafting wins on this model's own text: measured, kept, and searched.

Everything is timed through `step` itself, so that verification and roll-back are in the figures. Kept facts belong to
one file, its heads, this machine and these versions; anything else is measured again.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from model.base.llama import LlamaBase
from model.base.remember import recall, remember
from model.decoding.drafting import ConstantDrafter, Drafter, Ranker
from model.decoding.generation import Request
from model.decoding.live import HOPEFUL, LivePlan
from model.decoding.planning import FixedPlan
from model.decoding.sampling import Sampler, SamplingParams
from model.decoding.slot import Slot
from model.decoding.step import prefill, step
from model.engine import Decoder, Engine
from model.trees.costs import SIZES, CostCurve, measure_curve
from model.trees.search import Choice, all_choices, grow
from model.trees.tree import MAX_LEAVES, Tree

Float64Array = npt.NDArray[np.float64]
KIND = "tuning"  # of what is remembered
CONTEXTS = (64, 1024)  # tokens in the cache
RANKS = 8  # guesses per head that are counted
PRIOR = 20.0  # positions that the training's own rates count for
LANES = 8  # of the context that is timed
BRANCH = 15  # most tokens from the text so far: with the root a multiple of 4, which quantized kernels like
QUICK_S = 0.02  # a step below this is timed twice after one that is not: llama.cpp rebuilds its graph for a new size
NEARLY = 0.9  # of the best tree's speed: the live plan may go as large as trees that reach it


@dataclass(frozen=True)
class Tuning:
    """curve: seconds of a step but for the heads. draft_s: (K,) the heads' by depth. accuracies: (K, R), measured on
    text of the model's own; both are empty without heads. tokens: how many of them.
    """

    curve: CostCurve
    draft_s: list[float]
    accuracies: list[list[float]]
    tokens: int

    def choices(self, context: int, max_nodes: int) -> list[Choice]:
        """Return the best tree of the heads for each size, from the root alone on."""
        accuracies = np.array(self.accuracies) if self.accuracies else np.zeros((1, 1))
        seconds = self.curve.on_offer(context, max_nodes)
        return all_choices(accuracies, seconds, draft_seconds=self.draft_s or 0.0, max_nodes=max_nodes)

    def best(self, context: int, max_nodes: int) -> Choice:
        """Return the heads' tree that earns most per second; the root alone where nothing pays."""
        return max(self.choices(context, max_nodes), key=lambda choice: choice.tokens_per_s)

    def expected_speedup(
        self, sizes: dict[int, int], emitted: int, head_steps: dict[int, int], context: float
    ) -> float:
        """Return the speedup that these times give for steps of so many nodes that won so many tokens.

        sizes: steps by their nodes. head_steps: those for which the heads drafted, by the depth of their tree.
        """
        seconds = sum(steps * self.curve.seconds_for(nodes, context) for nodes, steps in sizes.items())
        seconds += sum(steps * self.draft_s[depth - 1] for depth, steps in head_steps.items())
        return emitted * self.curve.seconds_for(1, context) / seconds

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return {**vars(self), "curve": self.curve.to_json()}

    @classmethod
    def from_json(cls, data: Any) -> Tuning | None:
        """Read what was kept; None where it is damaged or of another form."""
        try:
            curve = CostCurve.from_json(data["curve"])
            if curve is None:
                return None
            tuning = cls(curve, data["draft_s"], data["accuracies"], int(data["tokens"]))
            times, rates = np.array(tuning.draft_s, np.float64), np.array(tuning.accuracies, np.float64)
        except (KeyError, TypeError, ValueError):
            return None
        sound = rates.shape[:1] == times.shape and rates.ndim == (2 if len(times) else 1)
        return tuning if sound and (times >= 0).all() and ((rates >= 0) & (rates <= 1)).all() else None


def tuned(
    engine: Engine,
    requests: Sequence[Request],
    *,
    heads: bool,
    draft_vocab: int | None = None,
    afresh: bool = False,
    budget_s: float = 1.0,
    told: Callable[[], None] = lambda: None,
) -> Tuning:
    """Return the remembered figures, or measure them now, having `told` the user."""
    key = _key(engine, requests[0].sampling.temperature > 0, heads, draft_vocab)
    kept = None if afresh else Tuning.from_json(recall(KIND).get(key))
    if kept is not None:
        return kept
    told()
    tuning = measure(engine, requests, heads=heads, draft_vocab=draft_vocab, budget_s=budget_s)
    remember(KIND, key, tuning.to_json())
    return tuning


def _key(engine: Engine, sampling: bool, heads: bool, draft_vocab: int | None) -> str:
    n_heads = engine.n_heads if heads else 0  # raises where heads are missing
    weights = ""
    if n_heads and engine.weights:  # what was learnt and how well it guesses, whenever it was written
        folder = engine.weights if engine.weights.is_dir() else engine.weights.parent
        weights = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()[:16]
    parts = (
        engine.file.file_fingerprint(), weights, n_heads, draft_vocab, engine.options, sampling,
        version("llama-cpp-python"), version("torch"), platform.node(), platform.processor(),
    )  # fmt: skip
    return " ".join(map(str, parts))


def measure(
    engine: Engine,
    requests: Sequence[Request],
    *,
    heads: bool,
    draft_vocab: int | None = None,
    budget_s: float = 1.0,
    curve: CostCurve | None = None,
) -> Tuning:
    """Measure everything; budget_s: seconds for each of curve, drafting and text, if one round takes no longer.

    curve: of the same model on this machine, where it is known already.
    """
    curve = curve or step_curve(engine, budget_s)
    if not heads or not engine.n_heads:
        return Tuning(curve, [], [], 0)
    tokens = int(min(64 * len(requests), max(64, budget_s / curve.seconds_for(1, 0))))
    drafter = engine.drafter(Tree.chain(engine.n_heads), draft_vocab, ranks=RANKS)
    accuracies, seen = guess_rates(engine, drafter, requests, tokens)
    return Tuning(curve, draft_seconds(engine, draft_vocab, budget_s), accuracies.round(6).tolist(), seen)


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


def guess_rates(engine: Engine, drafter: Ranker, requests: Sequence[Request], tokens: int) -> tuple[Float64Array, int]:
    """Write texts without drafts and count which guess of each head was right where the best ones before it were.

    Returns ((K, R) rates, the positions counted); the rates of the training count for PRIOR positions.
    """
    each = max(engine.n_heads + 4, math.ceil(tokens / len(requests)))
    prior = np.array(engine.heads_facts["rank_accuracies"], np.float64)[: engine.n_heads, :RANKS]
    hits, tries = np.zeros((engine.n_heads, RANKS)), np.zeros(engine.n_heads)
    with engine.decoder() as plain, engine.base(FixedPlan(Tree.chain(1))) as base:
        for request in requests:
            text = plain.start(replace(request, max_tokens=each, stop=()))
            text.run()
            states, behind = states_and_followers(base, text.slot.tokens, text.slot.prompt_length, engine.n_heads)
            if not len(states):
                continue
            guesses, _ = drafter.rank(states, behind[:, :-1])
            alive = np.ones(len(guesses), np.bool_)
            for k in range(engine.n_heads):
                right = guesses[:, k] == behind[:, k + 1, None]  # (n, R)
                hits[k] += right[alive].sum(0)
                tries[k] += alive.sum()
                alive &= right[:, 0]
            if tries[0] >= tokens:
                break
    padded = np.zeros_like(hits)
    padded[:, : prior.shape[1]] = prior
    return (hits + PRIOR * padded) / (tries + PRIOR)[:, None], int(tries[0])


def states_and_followers(
    base: LlamaBase, tokens: list[int], prompt: int, k: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Return the states (n, D) that decided the new tokens of a text; those, each with the k behind it (n, k + 1)."""
    ids, states = np.array(tokens, np.int32), list[npt.NDArray[np.float32]]()
    base.clear()
    base.want_states(True)
    for at in range(0, len(ids), base.n_batch):
        base.decode(ids[at : at + base.n_batch], at, 0, outputs=True)
        states.append(base.hidden(len(ids[at : at + base.n_batch])).copy())
    decided = np.arange(prompt - 1, len(ids) - 1 - k)
    return np.concatenate(states)[decided], ids[decided[:, None] + 1 + np.arange(k + 1)]


def live_decoder(
    engine: Engine, tuning: Tuning, *, ngrams: bool, draft_vocab: int | None = None, context: int = 0
) -> Decoder:
    """Make a decoder that drafts what pays: with the heads, where the tuning has them, and from the text so far."""
    plan, drafter = live_plan(engine, tuning, ngrams=ngrams, draft_vocab=draft_vocab)
    return engine.decoder_for(plan, drafter, ngrams=ngrams, context=context)


def live_plan(
    engine: Engine, tuning: Tuning, *, ngrams: bool, draft_vocab: int | None = None, lanes: int = MAX_LEAVES
) -> tuple[LivePlan, Drafter | None]:
    """Make the plan that drafts what pays, and the heads' drafter where they may. lanes: the most that a slot has."""
    branch = min(BRANCH, engine.options.max_nodes - 1) if ngrams else 0
    drafting = tuning.choices(tuning.curve.contexts[0], engine.options.max_nodes)[1:] if tuning.draft_s else []
    best = max((c.speedup for c in drafting), default=0.0)
    if best < HOPEFUL:
        return LivePlan(tuning.curve, branch=branch), None
    near = [c.tree for c in drafting if c.speedup >= NEARLY * best]
    depth, nodes = max(t.max_depth for t in near), max(len(t) for t in near) - 1
    accuracies = np.array(tuning.accuracies)[:depth]
    paths = grow(accuracies, nodes, max_leaves=max(1, lanes - (branch > 0)))
    draft_s = tuning.draft_s[:depth]
    if engine.heads.config.head_type == "medusa":
        draft_s = draft_s[-1:] * depth  # all heads draft at once, however deep the tree
    plan = LivePlan(
        tuning.curve,
        paths=paths,
        accuracies=accuracies,
        draft_s=draft_s,
        branch=branch,
        max_nodes=engine.options.max_nodes,
    )
    return plan, engine.drafter(Tree(paths), draft_vocab)
