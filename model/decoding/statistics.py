"""What the steps of a sequence brought: tokens, drafted and accepted nodes, seconds by stage.

Knows no cache.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from time import perf_counter

from model.decoding.draft import Draft

# draft: what to draft, and the drafters. tree: the rows of the batch. decode: llama.cpp.
# verify: the choice of tokens. cache: roll-back, states. policy: the new tokens with their log
# probabilities, and what the draft policy learns.
STAGES = ("draft", "tree", "decode", "verify", "cache", "policy")
_NOTHING = dict.fromkeys(STAGES, 0.0)


class StageRecorder:
    """Adds up the seconds of each stage: `ended("decode")` ends one and begins the next.

    seconds: by stage. start: of the first one, by perf_counter.
    """

    __slots__ = ("_since", "seconds", "start")

    def __init__(self) -> None:
        self.seconds = _NOTHING.copy()
        self.start = perf_counter()
        self._since = self.start

    def ended(self, stage: str) -> None:
        """Note that a stage has ended just now; a stage may come several times."""
        now = perf_counter()
        self.seconds[stage] += now - self._since
        self._since = now


@dataclass(kw_only=True)
class DraftStatistics:
    """Counts over the steps of one sequence, or of several that were added up.

    emitted: tokens, the base model's own included. drafted, accepted: nodes by depth, from depth 1
    on. drafted_by_source, accepted_by_source: the same by the name of the draft source.
    tried_by_source, promised_by_source: nodes behind accepted ones, of which the policy said how
    likely they were, and the sum of what it said.
    steps_by_nodes: steps by the nodes of their tree, the root included. steps_by_depth: steps by
    how deep the heads were asked. seconds: by stage; steps that sequences share are
    shared out evenly. timeline: when a list, each step's start and the seconds of its STAGES.
    """

    steps: int = 0
    emitted: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    drafted_by_source: Counter[str] = field(default_factory=Counter)
    accepted_by_source: Counter[str] = field(default_factory=Counter)
    tried_by_source: Counter[str] = field(default_factory=Counter)
    promised_by_source: dict[str, float] = field(default_factory=dict)
    steps_by_nodes: Counter[int] = field(default_factory=Counter)
    steps_by_depth: Counter[int] = field(default_factory=Counter)
    seconds_by_stage: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    timeline: list[tuple[float, ...]] | None = None

    def count(self, draft: Draft, node: int, emitted: int) -> None:
        """Add one step whose accepted path ended at `node` of the draft tree."""
        tree = draft.tree
        n_nodes = len(tree)
        self.steps += 1
        self.emitted += emitted
        self.steps_by_nodes[n_nodes] += 1
        if draft.filled_depth:
            self.steps_by_depth[draft.filled_depth] += 1
        if n_nodes == 1:
            return
        for depth, nodes in enumerate(tree.level_sizes):
            if depth == len(self.drafted):
                self.drafted.append(0)
                self.accepted.append(0)
            self.drafted[depth] += nodes
        for depth in range(tree.depth_list[node]):
            self.accepted[depth] += 1
        for source in draft.sources:
            self.drafted_by_source[source] += 1
        for accepted in tree.path_to(node)[1:]:
            self.accepted_by_source[draft.sources[accepted - 1]] += 1
        if draft.shares:
            self._count_promises(draft, node)

    def _count_promises(self, draft: Draft, node: int) -> None:
        for parent in draft.tree.path_to(node):
            for child in draft.tree.children[parent]:
                source = draft.sources[child - 1]
                promised = self.promised_by_source.get(source, 0.0) + draft.shares[child - 1]
                self.promised_by_source[source] = promised
                self.tried_by_source[source] += 1

    def add_seconds(self, recorder: StageRecorder, share: float) -> None:
        """Add a share of a step's seconds."""
        ours = self.seconds_by_stage
        for stage, seconds in recorder.seconds.items():
            ours[stage] += seconds * share
        if self.timeline is not None:
            self.timeline.append((recorder.start, *recorder.seconds.values()))

    def add(self, other: DraftStatistics) -> None:
        """Add the steps of another sequence."""
        self.steps += other.steps
        self.emitted += other.emitted
        self.drafted = _added(self.drafted, other.drafted)
        self.accepted = _added(self.accepted, other.accepted)
        self.drafted_by_source += other.drafted_by_source
        self.accepted_by_source += other.accepted_by_source
        self.tried_by_source += other.tried_by_source
        for source, promised in other.promised_by_source.items():
            self.promised_by_source[source] = self.promised_by_source.get(source, 0.0) + promised
        self.steps_by_nodes += other.steps_by_nodes
        self.steps_by_depth += other.steps_by_depth
        for stage, seconds in other.seconds_by_stage.items():
            self.seconds_by_stage[stage] += seconds

    @property
    def seconds(self) -> float:
        """Time spent in steps."""
        return sum(self.seconds_by_stage.values())

    @property
    def acceptance_length(self) -> float:
        """Tokens per step; plain decoding has 1.0."""
        return self.emitted / self.steps if self.steps else 0.0

    @property
    def nodes_per_step(self) -> float:
        """Nodes drafted per step."""
        return sum(self.drafted) / self.steps if self.steps else 0.0


def _added(a: list[int], b: list[int]) -> list[int]:
    length = max(len(a), len(b))
    a = a + [0] * (length - len(a))
    b = b + [0] * (length - len(b))
    return [x + y for x, y in zip(a, b, strict=True)]
