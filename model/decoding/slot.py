"""One running text: its tokens, its place in the cache, its sampler and drafters, and what its steps brought.

Knows neither plans nor the base model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from model.decoding.drafting import Drafter
from model.decoding.ngram import NgramIndex
from model.decoding.sampling import Sampler
from model.trees.tree import Tree

Float32Array = npt.NDArray[np.float32]
STAGES = ("draft", "tree", "decode", "verify", "cache", "plan")


@dataclass
class Stats:
    """What happened so far; times in seconds, drafted and accepted nodes per depth (from 1), and those of branches."""

    steps: int = 0
    emitted: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    branch_drafted: int = 0
    branch_accepted: int = 0
    sizes: dict[int, int] = field(default_factory=dict)  # how many steps had so many nodes, the root included
    head_steps: dict[int, int] = field(default_factory=dict)  # for how many steps the heads drafted so deep
    draft_s: float = 0.0  # what to draft, and the heads
    tree_s: float = 0.0  # the batch's rows
    decode_s: float = 0.0  # llama.cpp
    verify_s: float = 0.0
    cache_s: float = 0.0  # roll-back, states
    plan_s: float = 0.0  # what the plan learns
    timeline: list[tuple[float, ...]] | None = None  # when a list: each step's start, and the seconds of its STAGES

    def count(self, tree: Tree, node: int, emitted: int, heads: int) -> None:
        """Add one step whose accepted path ended at `node`; the nodes from `heads` on belong to the branch."""
        depth = tree.depth_list[node]
        self.steps += 1
        self.emitted += emitted
        self.sizes[len(tree)] = self.sizes.get(len(tree), 0) + 1
        if heads > 1:
            drafted = tree.depth_list[heads - 1]
            self.head_steps[drafted] = self.head_steps.get(drafted, 0) + 1
        if len(self.drafted) < tree.max_depth:
            more = [0] * (tree.max_depth - len(self.drafted))
            self.drafted += more
            self.accepted += more
        for d, nodes in enumerate(tree.level_sizes):
            self.drafted[d] += nodes
            self.accepted[d] += d < depth
        if heads < len(tree):
            self.branch_drafted += len(tree) - heads
            self.branch_accepted += sum(n >= heads for n in tree.path_to(node)) if node else 0

    def add_times(self, start: float, stages: tuple[float, ...], share: float) -> None:
        """Add a share of a pass's seconds by stage."""
        self.draft_s += stages[0] * share
        self.tree_s += stages[1] * share
        self.decode_s += stages[2] * share
        self.verify_s += stages[3] * share
        self.cache_s += stages[4] * share
        self.plan_s += stages[5] * share
        if self.timeline is not None:
            self.timeline.append((start, *stages))

    @property
    def seconds(self) -> float:
        """Time spent in steps."""
        return self.draft_s + self.decode_s + self.verify_s + self.other_s

    @property
    def other_s(self) -> float:
        """Time spent on bookkeeping: neither drafting, decoding nor verifying."""
        return self.tree_s + self.cache_s + self.plan_s

    @property
    def acceptance_length(self) -> float:
        """Tokens per step; plain decoding has 1.0."""
        return self.emitted / self.steps if self.steps else 0.0


@dataclass
class Slot:
    """One running text.

    tokens: prompt and text so far; all but the last are in the cache once `prefill` has run.
    lanes: its sequence ids, equal on the committed prefix. limit: how many tokens it may hold.
    ends(token) says whether the text ends with a token just emitted.
    trace: when a list, the logits that decided each token are kept there.
    """

    tokens: list[int]
    limit: int
    sampler: Sampler
    ends: Callable[[int], bool]
    drafter: Drafter | None = None
    lanes: range = range(1)
    hidden: Float32Array | None = None  # (1, D): the state that the root was decided from; None: nobody asked for it
    prompt_length: int = 0
    finished: bool = False
    stats: Stats = field(default_factory=Stats)
    trace: list[Float32Array] | None = None
    ngrams: NgramIndex | None = None  # over `tokens`
    live: Any = None  # what the plan has learnt of this text
    reused: int = 0  # tokens of the prompt that were in the cache already
    typical: bool = False  # Medusa's lossy acceptance
    began: float = 0.0  # when the prompt was in the cache, by perf_counter

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)
