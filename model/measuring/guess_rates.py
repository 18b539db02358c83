"""How often the heads guess right on text of the model's own, each head where the best guesses before it were right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from model.base.llama import LlamaBase
from model.decoding.drafting import Ranker
from model.decoding.generation import Request
from model.decoding.planning import FixedPlan
from model.engine import Engine
from model.trees.tree import Tree

Float64Array = npt.NDArray[np.float64]
RANKS = 8  # guesses per head that are counted
PRIOR = 20.0  # positions that the training's own rates count for


def guess_rates(engine: Engine, drafter: Ranker, requests: Sequence[Request], tokens: int) -> tuple[Float64Array, int]:
    """Write texts without drafts and count which guess of each head was right where the best ones before it were.

    Returns ((K, R) rates, the positions counted); the rates of the training count for PRIOR positions.
    """
    each = max(engine.n_heads + 4, math.ceil(tokens / len(requests)))
    told = engine.heads_facts.get("rank_accuracies") or [[]] * engine.n_heads
    prior = np.array(told, np.float64)[: engine.n_heads, :RANKS]
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
