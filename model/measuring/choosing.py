"""Who drafts, and how much: what a user asks for becomes a plan, for commands and server alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from model.decoding.drafting import Drafter
from model.decoding.generation import Request
from model.decoding.planning import ROOT_ONLY, Draft, FixedPlan, Plan
from model.decoding.sampling import SamplingParams
from model.engine import Engine
from model.errors import ModelFileError, UsageError
from model.measuring.tuning import BRANCH, live_plan, tuned
from model.trees.tree import MAX_LEAVES, Tree

TRIAL_TOKENS = 64


@dataclass(frozen=True)
class Wish:
    """What a user asks for.

    draft "auto": from the text so far and, where the model has heads, with them; a tree is drafted by the heads alone.
    tree: of the heads, in every step (`Tree.parse` reads it); "": what pays. fixed: the tree that pays best, in every
    step, so that runs can be repeated; otherwise what pays now. draft_vocab: see Engine.drafter.
    """

    draft: Draft = "auto"
    tree: str = ""
    fixed: bool = False
    draft_vocab: int | None = None


class Drafting(NamedTuple):
    """A plan, the heads' drafter, whether the text so far drafts, and all that in words."""

    plan: Plan
    drafter: Drafter | None
    ngrams: bool
    words: str


def trial_requests(engine: Engine, texts: Sequence[str], sampling: SamplingParams) -> list[Request]:
    """Return the requests that drafts are timed on; their prompts fill half of the context at the most."""
    prompts = [engine.model.tokenize(text).tolist()[: engine.context // 2] for text in texts]
    return [Request(prompt, TRIAL_TOKENS, sampling) for prompt in prompts]


def choose(
    engine: Engine,
    wish: Wish,
    trial: Sequence[Request],
    *,
    lanes: int = MAX_LEAVES,
    told: Callable[[], None] = lambda: None,
) -> Drafting:
    """Return how to draft. lanes: the most that a slot may have. told: called before a measurement.

    Raises HeadsError where heads are asked for and missing or unfit, UsageError for the tree, ModelFileError for a
    model that cannot roll back a draft.
    """
    able, nodes = engine.model.can_roll_back, engine.options.max_nodes
    heads, ngrams = wish.draft in ("medusa", "both"), wish.draft in ("ngram", "both")
    if wish.draft == "auto":
        heads, ngrams = engine.weights is not None, able and not wish.tree
        if wish.tree and not heads:
            raise UsageError(f"tree {wish.tree}: {engine.file.path} has no heads, and only they draft trees")
    if ngrams and not able:
        raise ModelFileError(f"{engine.file.path}: this kind of model cannot roll back a draft; use draft none")
    heads = heads and engine.n_heads > 0  # raises where heads are missing or don't fit
    ngrams = ngrams and nodes > 1
    words = " and ".join(["the heads"] * heads + ["the text so far"] * ngrams) or "nobody"
    if not (heads or ngrams):
        return Drafting(FixedPlan(), None, False, words)
    tree = ROOT_ONLY
    if wish.tree:
        tree = engine.check_tree(Tree.parse(wish.tree)) if heads else tree
    else:
        tuning = tuned(engine, trial, heads=heads, draft_vocab=wish.draft_vocab, told=told)
        if not wish.fixed:
            live, drafter = live_plan(engine, tuning, ngrams=ngrams, draft_vocab=wish.draft_vocab, lanes=lanes)
            return Drafting(live, drafter, ngrams, f"{words}, up to {live.max_nodes} nodes a step where it pays")
        tree = tuning.best(tuning.curve.contexts[0], nodes).tree
    drafter = engine.drafter(tree, wish.draft_vocab) if len(tree) > 1 else None
    plan = FixedPlan(tree, min(BRANCH, nodes - len(tree)) if ngrams else 0)
    return Drafting(plan, drafter, ngrams, f"{words}, a tree of {len(tree)} nodes")
