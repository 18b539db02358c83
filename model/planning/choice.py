"""The choice of draft policy: from what a user asks for, for commands, API and server alike.

Knows neither how policies decide nor how they are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from model.base.chat import ChatTemplate
from model.decoding.draft import ROOT_ONLY
from model.decoding.draft_policy import DraftPolicy, FixedPolicy
from model.decoding.drafters.drafter import HEADS, NGRAM, RECYCLED, Drafters
from model.decoding.drafters.sources import Sources, source_names
from model.decoding.request import Request
from model.decoding.sampling import SamplingParams
from model.errors import ModelFileError, UsageError
from model.loaded_model import LoadedModel, new_drafters
from model.planning.auto_tuning import MAX_CONTINUATION, adaptive_policy, tuned
from model.planning.flash_attention import choose_flash_attention
from model.planning.prompt_files import PYTHON_TRIALS, TASK_TRIALS, in_turn, read_tasks
from model.trees.slices import Slices, begin, finish
from model.trees.tree import MAX_LEAVES, Tree

TRIAL_TOKENS = 64
N_TRIALS = 6  # one of each kind: reading the prompts takes most of the time
WORDS = {HEADS: "heads", NGRAM: "n-grams", RECYCLED: "recycled continuations"}


@dataclass(frozen=True, kw_only=True)
class DraftOptions:
    """What a user asks for.

    sources: see `drafters/sources.py`; auto: all there are, with a tree the heads alone. tree: of
    the heads, in every step: a chain's length ("4"), widths by depth ("2,2,1") or a JSON file of
    rank paths; "": the fastest as measured. fixed: for the fastest tree: draft it in every step, so
    that runs can be repeated; otherwise what is fastest changes with the output. draft_vocab: how
    many of the most frequent tokens the heads draft; see LoadedModel.heads_drafter.
    """

    sources: Sources = "auto"
    tree: str = ""
    fixed: bool = False
    draft_vocab: int | None = None


class Drafting(NamedTuple):
    """A policy, the drafters of its sources, and a description of it all."""

    policy: DraftPolicy
    drafters: Drafters
    description: str


def trial_requests(
    loaded: LoadedModel,
    sampling: SamplingParams,
    template: ChatTemplate | None,
    n: int = N_TRIALS,
) -> list[Request]:
    """Return n requests that drafts are measured on, of each kind of task in turn.

    Tasks in the chat template, and Python source where there is none. Their prompts fill half of
    the context at the most.
    """
    most = loaded.context // 2
    tasks = read_tasks(PYTHON_TRIALS if template is None else TASK_TRIALS)
    requests = [
        loaded.request(task.text, TRIAL_TOKENS, sampling, template=template)
        for task in in_turn(tasks)[:n]
    ]
    return [replace(request, prompt=request.prompt[:most]) for request in requests]


def choose(
    loaded: LoadedModel,
    options: DraftOptions,
    trial: Sequence[Request],
    *,
    max_leaves: int = MAX_LEAVES,
    on_measure: Callable[[], None] = lambda: None,
) -> Drafting:
    """Return how to draft, having measured now what has to be; see `choose_in_slices`.

    on_measure: called before a measurement.
    """
    slices = choose_in_slices(loaded, options, trial, max_leaves=max_leaves)
    known = begin(slices)
    if known is not None:
        return known
    on_measure()
    return finish(slices)


def choose_in_slices(
    loaded: LoadedModel,
    options: DraftOptions,
    trial: Sequence[Request],
    *,
    max_leaves: int = MAX_LEAVES,
) -> Slices[Drafting]:
    """Return how to draft: at once, or where that has to be measured, after many slices.

    trial: what acceptance is measured on. max_leaves: of the draft tree of one sequence. Raises
    HeadsError where heads are asked for and missing or unfit, UsageError for the tree,
    ModelFileError for a model that cannot roll back a draft; all of that before the first slice.
    """
    sources = _sources(loaded, options)
    max_nodes = loaded.options.max_nodes
    description = ", ".join(WORDS[source] for source in sources) or "nothing"
    if not sources:
        yield from choose_flash_attention(loaded)
        return Drafting(FixedPolicy(), Drafters(), description)
    if sources == [RECYCLED] and (options.tree or options.fixed):
        raise UsageError("draft recycled: only the adaptive policy drafts recycled continuations")
    heads = HEADS in sources
    ngram = NGRAM in sources

    # The tree that was asked for, or the adaptive policy, or the fastest tree for good.
    tree = ROOT_ONLY
    if options.tree:
        asked = Tree.parse(options.tree)
        if heads:
            tree = loaded.check_tree(asked)
    yield from choose_flash_attention(loaded)
    if not options.tree:
        tuning = yield from tuned(loaded, trial, heads=heads, draft_vocab=options.draft_vocab)
        if not options.fixed:
            policy, drafters = adaptive_policy(
                loaded,
                tuning,
                sources,
                draft_vocab=options.draft_vocab,
                max_leaves=max_leaves,
            )
            names = (*drafters.trees, *drafters.continuations)
            description = ", ".join(WORDS[name] for name in names) or "nothing"
            description = f"{description}, up to {policy.max_nodes} nodes a step"
            return Drafting(policy, drafters, description)
        tree = tuning.best(tuning.curve.contexts[0], max_nodes).tree
    fixed_sources = [source for source in sources if source != RECYCLED]
    description = ", ".join(WORDS[source] for source in fixed_sources)
    heads_drafter = None
    if len(tree) > 1:
        heads_drafter = loaded.heads_drafter(tree, options.draft_vocab)
    continuation = 0
    if ngram:
        continuation = min(MAX_CONTINUATION, max_nodes - len(tree))
    description = f"{description}, a tree of {len(tree)} nodes"
    drafters = new_drafters(heads_drafter, {NGRAM} if ngram else ())
    return Drafting(FixedPolicy(tree, continuation), drafters, description)


def _sources(loaded: LoadedModel, options: DraftOptions) -> list[str]:
    """Return the names of the sources that draft, as far as the model has them."""
    able = loaded.base_model.can_roll_back
    wanted = source_names(options.sources)
    if wanted is None:
        wanted = _all_sources(loaded, tree=options.tree)
    if wanted & {NGRAM, RECYCLED} and not able:
        raise ModelFileError(
            f"{loaded.file.path}: this kind of model cannot roll back a draft; use draft none"
        )
    sources = list[str]()
    if HEADS in wanted and loaded.n_heads > 0:  # raises where heads are missing or don't fit
        sources.append(HEADS)
    if loaded.options.max_nodes > 1:
        sources += [source for source in (NGRAM, RECYCLED) if source in wanted]
    return sources


def _all_sources(loaded: LoadedModel, *, tree: str) -> frozenset[str]:
    """Return the sources of "auto": all there are; with a tree the heads alone."""
    sources = set[str]()
    if loaded.heads_path is not None:
        sources.add(HEADS)
    elif tree:
        raise UsageError(f"tree {tree}: {loaded.file.path} has no heads, and only they draft trees")
    if loaded.base_model.can_roll_back and not tree:
        sources |= {NGRAM, RECYCLED}
    return frozenset(sources)
