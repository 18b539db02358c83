"""What a step costs on this machine and what drafting wins on this model's own text: measured, kept, and searched.

Kept facts belong to one file, its heads, this machine and these versions; anything else is measured again.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from model.base.remember import recall, remember
from model.decoding.drafting import Drafter
from model.decoding.generation import Request
from model.decoding.live import HOPEFUL, LivePlan
from model.engine import Decoder, Engine
from model.measuring.guess_rates import RANKS, guess_rates
from model.measuring.step_times import draft_seconds, step_curve
from model.trees.costs import CostCurve
from model.trees.search import Choice, all_choices, grow
from model.trees.tree import MAX_LEAVES, Tree

KIND = "tuning"  # of what is remembered
BRANCH = 15  # most tokens from the text so far: with the root a multiple of 4, which quantized kernels like
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
    sampling = requests[0].sampling.temperature > 0
    key, known = _key(engine, sampling, heads, draft_vocab), {} if afresh else recall(KIND)
    kept = Tuning.from_json(known.get(key))
    if kept is not None:
        return kept
    told()
    before = Tuning.from_json(known.get(_key(engine, not sampling, heads, draft_vocab)))  # its steps cost the same
    curve = before.curve if before else None
    tuning = measure(engine, requests, heads=heads, draft_vocab=draft_vocab, budget_s=budget_s, curve=curve)
    remember(KIND, key, tuning.to_json())
    return tuning


def _key(engine: Engine, sampling: bool, heads: bool, draft_vocab: int | None) -> str:
    n_heads = engine.n_heads if heads else 0  # raises where heads are missing
    weights = ""
    if n_heads:  # what was learnt and how well it guesses, whenever it was written
        facts = {name: fact for name, fact in engine.heads_facts.items() if name != "token_counts"}
        weights = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
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
