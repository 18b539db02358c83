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
from model.decoding.decoder import Decoder
from model.decoding.draft_policy import FixedPolicy
from model.decoding.drafters.drafter import RankingDrafter
from model.decoding.request import Request
from model.decoding.sequence import Sequence
from model.loaded_model import LoadedModel
from model.trees.slices import Slices
from model.trees.tree import Tree

Float64Array = npt.NDArray[np.float64]
RANKS = 8  # guesses per head that are counted
SLICE_TOKENS = 32  # of which one slice extracts states, or guesses what follows
MAX_STALL_S = 0.02  # see Scheduler: a slice reads as much of a prompt as takes five times that
TRAINING_WEIGHT = 20.0  # positions that the training's own rates count for


def measured_acceptance(
    loaded: LoadedModel, drafter: RankingDrafter, requests: abc.Sequence[Request], n_tokens: int
) -> Slices[tuple[Float64Array, int]]:
    """Generate without drafts, and count which guess of each head was right.

    A head counts where the best guesses of those before it were right. Returns ((K, R) rates, the
    positions counted); the rates of the training count for TRAINING_WEIGHT positions.
    """
    k_heads = loaded.n_heads
    each = max(k_heads + 4, math.ceil(n_tokens / len(requests)))
    hits = np.zeros((k_heads, RANKS))
    tries = np.zeros(k_heads)

    # Count, until there are enough positions.
    longest = max(len(request.prompt) for request in requests)
    n_ctx = min(loaded.context, longest + each)
    with loaded.new_base(FixedPolicy(Tree.chain(1)), n_ctx=n_ctx) as base:
        for request in requests:
            shortened = replace(request, max_tokens=each, stop=())
            sequence = yield from _generated(loaded, base, shortened, n_ctx)
            states, followers = yield from states_and_followers(
                base, sequence.tokens, sequence.n_prompt, k_heads
            )
            for at in range(0, len(states), SLICE_TOKENS):
                piece = slice(at, at + SLICE_TOKENS)
                guesses, _ = drafter.rank(states[piece], followers[piece, :-1])
                _count(guesses, followers[piece], hits, tries)
                yield
            if tries[0] >= n_tokens:
                break

    # Blend with the rates of the training.
    trained = np.array(loaded.heads_facts.get("rank_accuracies") or [[]] * k_heads, np.float64)
    trained = trained[:k_heads, :RANKS]
    prior = np.zeros_like(hits)
    prior[:, : trained.shape[1]] = trained
    return (hits + TRAINING_WEIGHT * prior) / (tries + TRAINING_WEIGHT)[:, None], int(tries[0])


def _generated(
    loaded: LoadedModel, base: LlamaBase, request: Request, n_ctx: int
) -> Slices[Sequence]:
    """Generate a request without drafts, a step or a piece of its prompt in each slice."""
    decoder = Decoder(
        base, loaded.base_model, FixedPolicy(), context=n_ctx, max_stall_s=MAX_STALL_S
    )
    sequence = decoder.start(request)
    while not sequence.finished:
        decoder.scheduler.step()
        yield
    return sequence


def _count(
    guesses: npt.NDArray[np.int32],
    followers: npt.NDArray[np.int32],
    hits: Float64Array,
    tries: Float64Array,
) -> None:
    """Add to hits (K, R) and tries (K,). guesses: (n, K, R); followers: (n, K + 1)."""
    reached = np.ones(len(guesses), np.bool_)  # the best guesses so far were right
    for k in range(len(tries)):
        right = guesses[:, k] == followers[:, k + 1, None]  # (n, R)
        hits[k] += right[reached].sum(0)
        tries[k] += reached.sum()
        reached &= right[:, 0]


def states_and_followers(
    base: LlamaBase, tokens: list[int], n_prompt: int, k: int
) -> Slices[tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]]:
    """Return the states (n, D) that decided new tokens, and these with k followers (n, k + 1)."""
    ids = np.array(tokens, np.int32)
    states = list[npt.NDArray[np.float32]]()
    base.clear()
    for at in range(0, len(ids), SLICE_TOKENS):
        piece = ids[at : at + SLICE_TOKENS]
        base.want_states(True)
        base.decode(piece, at, 0, outputs=True)
        states.append(base.hidden(len(piece)).copy())
        yield
    decided = np.arange(n_prompt - 1, len(ids) - 1 - k)
    return np.concatenate(states)[decided], ids[decided[:, None] + 1 + np.arange(k + 1)]
