"""Auto-tuning: step times of this machine and acceptance rates of this model, remembered.

What is remembered belongs to one file, its heads, this machine and these versions; anything else is
measured again. Knows no requests of users and no commands.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np

from model.decoding.decoder import Decoder
from model.decoding.draft_policy import DraftPolicy, FixedPolicy
from model.decoding.drafters import ngram, recycled
from model.decoding.drafters.drafter import NGRAM, RECYCLED, Drafters
from model.decoding.request import Request
from model.loaded_model import LoadedModel, new_drafters
from model.planning.adaptive_policy import AdaptivePolicy
from model.planning.measured_acceptance import RANKS, measured_acceptance
from model.planning.measured_steps import draft_seconds, step_curve
from model.storage.facts import key_here, recall, remember
from model.trees.costs import CostCurve
from model.trees.search import TreeChoice, all_choices
from model.trees.slices import Slices
from model.trees.tree import MAX_LEAVES, Tree

KIND = "tuning"  # of what is remembered
# Tokens of n-grams: with the root a multiple of 4, which quantized kernels are fast at.
MAX_CONTINUATION = 15
# Heads whose best tree promises less than this part of plain decoding's speed are not loaded.
LEAST_SPEEDUP = 0.7
# Leaves of a draft tree, which each take a sequence id, and a further look at the cache after a
# step. On SmolLM2 trees of more did not come up.
MOST_LEAVES = 16
PRIORS = {NGRAM: ngram.PRIORS, RECYCLED: recycled.PRIORS}


@dataclass(frozen=True)
class Tuning:
    """What was measured for one file, its heads and this machine.

    curve: seconds of a step without drafting. draft_s: (K,) seconds of drafting, by depth.
    accuracies: (K, R), measured on what the model itself generates, over so many tokens. Both are
    empty without heads.
    """

    curve: CostCurve
    draft_s: list[float]
    accuracies: list[list[float]]
    tokens: int

    def choices(self, context: int, max_nodes: int) -> list[TreeChoice]:
        """Return the best tree of the heads for each size, from the root alone on."""
        accuracies = np.array(self.accuracies) if self.accuracies else np.zeros((1, 1))
        seconds = self.curve.on_offer(context, max_nodes)
        return all_choices(
            accuracies, seconds, draft_seconds=self.draft_s or 0.0, max_nodes=max_nodes
        )

    def best(self, context: int, max_nodes: int) -> TreeChoice:
        """Return the fastest of these trees; the root alone where no draft is faster."""
        return max(self.choices(context, max_nodes), key=lambda choice: choice.tokens_per_s)

    def expected_speedup(
        self,
        steps_by_nodes: dict[int, int],
        emitted: int,
        steps_by_depth: dict[int, int],
        context: float,
    ) -> float:
        """Return the speedup that these times give for steps that were made.

        steps_by_nodes: how many, by their nodes. emitted: tokens of all steps. steps_by_depth:
        those for which the heads drafted, by the depth of their tree. context: tokens in the cache.
        """
        seconds = 0.0
        for nodes, steps in steps_by_nodes.items():
            seconds += steps * self.curve.seconds_for(nodes, context)
        for depth, steps in steps_by_depth.items():
            seconds += steps * self.draft_s[depth - 1]
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
            times = np.array(tuning.draft_s, np.float64)
            rates = np.array(tuning.accuracies, np.float64)
        except (KeyError, TypeError, ValueError):
            return None
        n_dims = 2 if len(times) else 1
        fitting = rates.shape[:1] == times.shape and rates.ndim == n_dims
        sound = fitting and (times >= 0).all() and ((rates >= 0) & (rates <= 1)).all()
        return tuning if sound else None


def tuned(
    loaded: LoadedModel,
    requests: Sequence[Request],
    *,
    heads: bool,
    draft_vocab: int | None = None,
    afresh: bool = False,
    budget_s: float = 1.0,
) -> Slices[Tuning]:
    """Return the remembered figures, or measure them, slice by slice, and remember them.

    requests: what acceptance is measured on; the first one stands for them all in what is
    remembered. heads: whether the heads are measured. afresh: measure in any case. budget_s: see
    `measure`.
    """
    sampling = requests[0].sampling.temperature > 0
    prompt = requests[0].prompt
    key = _key(loaded, prompt, sampling, heads, draft_vocab)
    known = {} if afresh else recall(KIND)
    kept = Tuning.from_json(known.get(key))
    if kept is not None:
        return kept
    other_key = _key(loaded, prompt, not sampling, heads, draft_vocab)
    other_temperature = Tuning.from_json(known.get(other_key))
    curve = other_temperature.curve if other_temperature else None  # steps cost the same there
    yield  # so far nothing has taken long
    tuning = yield from measure(
        loaded, requests, heads=heads, draft_vocab=draft_vocab, budget_s=budget_s, curve=curve
    )
    remember(KIND, key, tuning.to_json())
    return tuning


def _key(
    loaded: LoadedModel,
    prompt: list[int],
    sampling: bool,
    heads: bool,
    draft_vocab: int | None,
) -> str:
    n_heads = loaded.n_heads if heads else 0  # raises where heads are missing
    weights = ""
    if n_heads:  # what was learnt and how well it guesses, whenever it was written
        facts = {name: fact for name, fact in loaded.heads_facts.items() if name != "token_counts"}
        weights = _short_hash(facts)
    return key_here(
        loaded.file.file_fingerprint(),
        weights,
        n_heads,
        draft_vocab,
        _short_hash(prompt),  # another chat template, other tasks
        # These memories cost no step anything.
        replace(
            loaded.options,
            prompt_cache_mb=0,
            draft_memory_mb=0,
            share_draft_memory=True,
            flash_attn=loaded.flash_attn,
        ),
        sampling,
        version("torch"),
    )


def _short_hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def measure(
    loaded: LoadedModel,
    requests: Sequence[Request],
    *,
    heads: bool,
    draft_vocab: int | None = None,
    budget_s: float = 1.0,
    curve: CostCurve | None = None,
) -> Slices[Tuning]:
    """Measure step times, drafting times and acceptance rates.

    budget_s: seconds for each of steps, drafting and acceptance, if one round takes no longer.
    curve: of the same model on this machine, where it is known already.
    """
    if curve is None:
        curve = yield from step_curve(loaded, budget_s)
    if not heads or not loaded.n_heads:
        return Tuning(curve, [], [], 0)
    tokens = int(min(64 * len(requests), max(64, budget_s / curve.seconds_for(1, 0))))
    drafter = loaded.heads_drafter(Tree.chain(loaded.n_heads), draft_vocab, ranks=RANKS)
    accuracies, seen = yield from measured_acceptance(loaded, drafter, requests, tokens)
    draft_s = yield from draft_seconds(loaded, draft_vocab, budget_s)
    return Tuning(curve, draft_s, accuracies.round(6).tolist(), seen)


def adaptive_decoder(
    loaded: LoadedModel,
    tuning: Tuning,
    sources: Collection[str],
    *,
    draft_vocab: int | None = None,
) -> Decoder:
    """Make a decoder with the adaptive policy, see `adaptive_policy`."""
    policy, drafters = adaptive_policy(loaded, tuning, sources, draft_vocab=draft_vocab)
    return loaded.decoder(policy, drafters)


def adaptive_policy(
    loaded: LoadedModel,
    tuning: Tuning,
    sources: Collection[str],
    *,
    draft_vocab: int | None = None,
    max_leaves: int = MAX_LEAVES,
) -> tuple[DraftPolicy, Drafters]:
    """Make the policy that drafts what is fastest now, and the drafters of its sources.

    sources: those that take no time, by name; the heads draft where the tuning has them. Where no
    source may ever pay, that is plain decoding. max_leaves: of the draft tree of one sequence.
    """
    max_nodes = loaded.options.max_nodes
    heads = None
    look_seconds = list[float]()
    if tuning.draft_s and _best_speedup(tuning, max_nodes) >= LEAST_SPEEDUP:
        look_seconds = tuning.draft_s
        chain = Tree.chain(len(look_seconds))
        heads = loaded.heads_drafter(chain, draft_vocab)
    drafters = new_drafters(
        heads,
        sources,
        memory_mb=loaded.options.draft_memory_mb,
        share_memory=loaded.options.share_draft_memory,
    )
    if not (drafters.trees or drafters.continuations):
        return FixedPolicy(), drafters
    policy = AdaptivePolicy(
        tuning.curve,
        {name: PRIORS[name] for name in drafters.continuations},
        look_seconds,
        max_nodes=max_nodes,
        max_leaves=min(max_leaves, MOST_LEAVES),
    )
    return policy, drafters


def _best_speedup(tuning: Tuning, max_nodes: int) -> float:
    """Return what the heads' best tree promises, drafted in every step."""
    drafting = tuning.choices(tuning.curve.contexts[0], max_nodes)[1:]
    return max((choice.speedup for choice in drafting), default=0.0)
