"""The adaptive policy: each step drafts what earns most tokens per second, or nothing.

It puts together what this room has: step-time model, draft sources, cool-downs and node budget.
Knows sequences and their sources, neither logits nor the cache.
"""

from __future__ import annotations

import collections.abc as abc
from functools import lru_cache
from itertools import chain, combinations
from weakref import WeakKeyDictionary

from model.decoding.draft import NO_DRAFT, Proposal
from model.decoding.draft_policy import StepOutcome
from model.decoding.sequence import Sequence
from model.planning.cool_down import CoolDown
from model.planning.node_budget import Counts, NodeBudget, allocate
from model.planning.sequence_state import Evidence, SequenceState
from model.planning.sources import SourceModel
from model.planning.step_time import StepTimeModel
from model.trees.costs import CostCurve


class AdaptivePolicy:
    """A `DraftPolicy` that follows what each sequence shows and what steps take.

    curve: seconds of a step, drafting left out. sources: any number. max_nodes: of a sequence's
    draft tree, the root included. max_rows: of a step, over all sequences.
    """

    def __init__(
        self,
        curve: CostCurve,
        sources: abc.Sequence[SourceModel],
        *,
        max_nodes: int = 256,
        max_rows: int = 512,
    ) -> None:
        # A continuation takes no time, so trees are held against what is expected of it, not the
        # other way round.
        continuations = [source for source in sources if not source.needs_hidden]
        self._sources = [*continuations, *(source for source in sources if source.needs_hidden)]
        self.max_leaves = max(1, sum(source.max_leaves for source in sources))
        self.max_nodes = min(1 + sum(source.max_nodes for source in sources), max_nodes)
        # No sequence drafts more than was measured.
        room = min(self.max_nodes, curve.sizes[-1]) - 1
        self._budget = NodeBudget([source.draft_seconds for source in self._sources], room)
        self._step_time = StepTimeModel(curve, max_rows)
        self._left_out = _subsets(
            i for i, source in enumerate(self._sources) if source.draft_seconds is not None
        )
        # By source: what sequences have shown lately of whether it pays.
        self._pauses = [CoolDown() for _ in self._sources]
        self._states: WeakKeyDictionary[Sequence, SequenceState] = WeakKeyDictionary()
        self._seconds_are_new = False  # those of a step count once, not for each sequence
        self._running: dict[Sequence, SequenceState] = {}  # those of the last step

    def wants_hidden(self, sequence: Sequence) -> bool:
        """See DraftPolicy."""
        return self._state(sequence).wants_hidden(sequence)

    def propose(self, sequences: abc.Sequence[Sequence]) -> list[Proposal]:
        """See DraftPolicy."""
        # See what there is to draft from, also in a step that goes without: it shows how good a
        # draft would have been.
        n_context = 0
        running = dict[Sequence, SequenceState]()
        for sequence in sequences:
            state = self._state(sequence)
            state.look(sequence)
            running[sequence] = state
            n_context += state.n_tokens
        self._running = running
        self._step_time.begin_step(len(sequences), n_context)
        self._seconds_are_new = True
        for pause in self._pauses:
            pause.tick()
        if self._step_time.plain_step_due:
            return [NO_DRAFT] * len(sequences)

        # Share out the nodes. A sequence alone finds what was chosen last time in this situation.
        if len(sequences) == 1:
            return [state.proposal_alone(self._choose)]
        states = list(running.values())
        shared = self._share(states, [state.evidence for state in states], n_context)
        return [state.shared_proposal(counts) for state, counts in zip(states, shared, strict=True)]

    def record(self, sequence: Sequence, outcome: StepOutcome) -> None:
        """See DraftPolicy."""
        if self._seconds_are_new:
            self._step_time.record(outcome.n_rows, outcome.seconds)
            self._seconds_are_new = False
        trees = zip(outcome.proposal.trees, outcome.filled, strict=True)
        guesses = {part.source: tokens for part, tokens in trees}
        state = self._state(sequence)
        state.learn(guesses, outcome.emitted)
        if state.refresh_due:
            state.refresh(sequence, self._choose)

    def _state(self, sequence: Sequence) -> SequenceState:
        state = self._running.get(sequence) or self._states.get(sequence)
        if state is None:
            state = self._states[sequence] = SequenceState(
                self._sources, self._budget, self._pauses
            )
            state.refresh(sequence, self._choose)
        return state

    def _choose(self, state: SequenceState, evidence: Evidence) -> Counts:
        """Return what a sequence should draft, were it alone."""
        return self._share([state], [evidence], state.n_tokens)[0]

    def _share(
        self, states: abc.Sequence[SequenceState], evidence: list[Evidence], n_context: int
    ) -> list[Counts]:
        """Return for sequences of one step how many nodes each source drafts for each of them."""
        offers = [evidence]
        for sources in self._left_out:
            others = [_without(each, sources) for each in evidence]
            if others not in offers:
                offers.append(others)
        menus = [
            [state.frontier(each) for state, each in zip(states, offer, strict=True)]
            for offer in offers
        ]
        n = len(states)
        step_seconds = self._step_time.drafted_seconds(n, n_context)
        plain_seconds = self._step_time.plain_seconds(n, n_context)
        return allocate(menus, step_seconds, plain_seconds).counts


def _subsets(sources: abc.Iterable[int]) -> list[tuple[int, ...]]:
    """Return all that may be left out of sources that take time.

    That is 2^n - 1 for n sources, of which there are few.
    """
    listed = list(sources)
    return list(chain.from_iterable(combinations(listed, n) for n in range(1, len(listed) + 1)))


@lru_cache(maxsize=4096)
def _without(evidence: Evidence, sources: tuple[int, ...]) -> Evidence:
    return tuple(0 if i in sources else strength for i, strength in enumerate(evidence))
