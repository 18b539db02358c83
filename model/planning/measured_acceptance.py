"""Measured acceptance: how often the heads are right on what the model itself generates.

Each head is counted where the best guesses of those before it were right. Knows no costs.
"""

from __future__ import annotations

import collections.abc as abc
import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from model.base.llama import LlamaBase
from model.decoding.draft_policy import FixedPolicy
from model.decoding.drafters.drafter import RankingDrafter
from model.decoding.request import Request
from model.loaded_model import LoadedModel
from model.trees.tree import Tree

Float64Array = npt.NDArray[np.float64]
RANKS = 8  # guesses per head that are counted
TRAINING_WEIGHT = 20.0  # positions that the training's own rates count for


def measured_acceptance(
    loaded: LoadedModel, drafter: RankingDrafter, requests: abc.Sequence[Request], n_tokens: int
) -> tuple[Float64Array, int]:
    """Generate without drafts, and count which guess of each head was right.

    A head counts where the best guesses of those before it were right. Returns ((K, R) rates, the
    positions counted); the rates of the training count for TRAINING_WEIGHT positions.
    """
    k_heads = loaded.n_heads
    each = max(k_heads + 4, math.ceil(n_tokens / len(requests)))
    hits = np.zeros((k_heads, RANKS))
    tries = np.zeros(k_heads)

    # Count, until there are enough positions.
    with loaded.fixed_decoder() as plain, loaded.new_base(FixedPolicy(Tree.chain(1))) as base:
        for request in requests:
            sequence = plain.run(replace(request, max_tokens=each, stop=()))
            states, followers = states_and_followers(
                base, sequence.tokens, sequence.n_prompt, k_heads
            )
            if not len(states):
                continue
            guesses, _ = drafter.rank(states, followers[:, :-1])
            reached = np.ones(len(guesses), np.bool_)  # the best guesses so far were right
            for k in range(k_heads):
                right = guesses[:, k] == followers[:, k + 1, None]  # (n, R)
                hits[k] += right[reached].sum(0)
                tries[k] += reached.sum()
                reached &= right[:, 0]
            if tries[0] >= n_tokens:
                break

    # Blend with the rates of the training.
    trained = np.array(loaded.heads_facts.get("rank_accuracies") or [[]] * k_heads, np.float64)
    trained = trained[:k_heads, :RANKS]
    prior = np.zeros_like(hits)
    prior[:, : trained.shape[1]] = trained
    return (hits + TRAINING_WEIGHT * prior) / (tries + TRAINING_WEIGHT)[:, None], int(tries[0])


def states_and_followers(
    base: LlamaBase, tokens: list[int], n_prompt: int, k: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Return the states (n, D) that decided new tokens, and these with k followers (n, k + 1)."""
    ids = np.array(tokens, np.int32)
    states = list[npt.NDArray[np.float32]]()
    base.clear()
    base.want_states(True)
    for at in range(0, len(ids), base.n_batch):
        piece = ids[at : at + base.n_batch]
        base.decode(piece, at, 0, outputs=True)
        states.append(base.hidden(len(piece)).copy())
    decided = np.arange(n_prompt - 1, len(ids) - 1 - k)
    return np.concatenate(states)[decided], ids[decided[:, None] + 1 + np.arange(k + 1)]
