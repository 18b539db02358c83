"""What the adaptive policy keeps of one sequence: how its sources do, and what was chosen lately.

What pays is worked out only now and then, more rarely as more is known; the steps between look it
up. Knows neither other sequences nor what a step takes: the policy hands in a function that
chooses.
"""

from __future__ import annotations

import collections.abc as abc

from model.decoding.draft import NO_DRAFT, Continuation, Proposal, TreeDraft
from model.decoding.sequence import Sequence
from model.planning.acceptance_rate import DECAY
from model.planning.cool_down import RETRY_SPEEDUP, CoolDown
from model.planning.node_budget import MIN_SPEEDUP, Counts, Expectation, Frontier, NodeBudget
from model.planning.sources import SourceModel

# Steps to the first look at what drafting earns; each later distance is twice as long, up to
# REFRESH.
FIRST_REFRESH = 4
REFRESH = 16  # steps: a refresh takes some 0.3 ms, a step of the smallest models 0.6
TRIAL_STEPS = 1  # in which a source is tried again before it is judged
# Of what was seen before a pause, here and elsewhere: it was long ago. In tests/simulation.py 0.4
# finds drafts sooner that have become good, and costs 1 % where heads are worth nothing.
RETRY_DECAY = 0.65

# By source: how much speaks for a draft in this step; 0: it cannot draft.
Evidence = tuple[int, ...]
Choose = abc.Callable[["SequenceState", Evidence], Counts]  # what it should draft, were it alone


class _Source:
    """One source and what it has shown.

    on_trial: it is tried again behind a pause. drafted: it has, since the last refresh, in a step
    that was shared with other sequences.
    """

    def __init__(self, model: SourceModel, shared: CoolDown) -> None:
        self.model = model
        self.history = model.history()
        self.cool_down = CoolDown(shared)
        self.on_trial = False
        self.drafted = False
        self._expectations: dict[int, Expectation] = {}

    def runs(self, sequence: Sequence) -> bool:
        """Say whether the sequence has the source, and it does not pause."""
        return not self.cool_down.active and self.history.available(sequence)

    def expect(self, strength: int) -> Expectation | None:
        """Return what is expected of a draft; worked out once between two refreshes."""
        if not strength:
            return None
        expectation = self._expectations.get(strength)
        if expectation is None:
            expectation = self.history.expect(strength, untried=self.on_trial)
            self._expectations[strength] = expectation
        return expectation

    def forget_expectations(self) -> None:
        """Have them worked out anew."""
        self._expectations.clear()


class SequenceState:
    """The policy's memory of one sequence.

    models: in the order in which their tokens count, as the budget has them. pauses: by source, of
    all sequences.
    """

    def __init__(
        self,
        models: abc.Sequence[SourceModel],
        budget: NodeBudget,
        pauses: abc.Sequence[CoolDown],
    ) -> None:
        self.sources = [
            _Source(model, shared) for model, shared in zip(models, pauses, strict=True)
        ]
        self.evidence: Evidence = (0,) * len(models)  # of the last look
        self.n_tokens = 0  # of the sequence, at the last look or refresh
        self.refresh_due = False
        self._budget = budget
        self._look_ahead = max((model.max_depth for model in models), default=0)
        self._of_hidden = [source for source in self.sources if source.model.needs_hidden]
        self._interval = FIRST_REFRESH // 2
        self._until_refresh = 0
        self._chosen: dict[Evidence, Counts] = {}
        self._recent: dict[Evidence, None] = {}  # since the last refresh, where it was alone
        self._frontiers: dict[Evidence, Frontier] = {}

    def look(self, sequence: Sequence) -> None:
        """See which sources can draft in this step, and how much speaks for each."""
        evidence = list[int]()
        for source in self.sources:
            if source.cool_down.remaining:
                evidence.append(0)
            else:
                evidence.append(source.history.look(sequence, self._look_ahead))
        self.evidence = tuple(evidence)
        self.n_tokens = len(sequence.tokens)

    def wants_hidden(self, sequence: Sequence) -> bool:
        """Say whether a source will draft from the hidden state of this step.

        One that pauses does without.
        """
        wanted = False
        for source in self._of_hidden:
            if source.cool_down.remaining <= 1:
                wanted = wanted or source.history.available(sequence)
        return wanted

    def proposal_alone(self, choose: Choose) -> Proposal:
        """Return what to draft in a step of the sequence alone, as the last look has found it."""
        self._recent[self.evidence] = None
        return self.proposal(self.chosen(self.evidence, choose))

    def chosen(self, evidence: Evidence, choose: Choose) -> Counts:
        """Return what to draft for the sequence alone; worked out once between two refreshes."""
        counts = self._chosen.get(evidence)
        if counts is None:
            counts = self._chosen[evidence] = choose(self, evidence)
        return counts

    def frontier(self, evidence: Evidence) -> Frontier:
        """Return what can be expected of its nodes; worked out once between two refreshes."""
        frontier = self._frontiers.get(evidence)
        if frontier is None:
            sources = list(zip(self.sources, evidence, strict=True))
            expectations = [source.expect(strength) for source, strength in sources]
            frontier = self._budget.frontier(expectations)
            if any(strength and source.on_trial for source, strength in sources):
                frontier = frontier.favoured(MIN_SPEEDUP / RETRY_SPEEDUP)
            self._frontiers[evidence] = frontier
        return frontier

    def shared_proposal(self, counts: Counts) -> Proposal:
        """Return the proposal for a step that several sequences share, and remember who drafts."""
        for source, n_nodes in zip(self.sources, counts, strict=True):
            if n_nodes:
                source.drafted = True
        return self.proposal(counts)

    def proposal(self, counts: Counts) -> Proposal:
        """Return the drafts that the last look has found, with so many nodes each."""
        trees: tuple[TreeDraft, ...] = ()
        continuations: tuple[Continuation, ...] = ()
        for source, n_nodes in zip(self.sources, counts, strict=True):
            if not n_nodes:
                continue
            draft = source.history.draft(n_nodes)
            if isinstance(draft, TreeDraft):
                trees = (*trees, draft)
            else:
                continuations = (*continuations, draft)
        if not (trees or continuations):
            return NO_DRAFT
        return Proposal(trees, continuations)

    def learn(self, guesses: abc.Mapping[str, list[int]], emitted: list[int]) -> None:
        """Take note of a step.

        guesses: by the name of the source, the tokens of the trees that were drafted.
        """
        for source, strength in zip(self.sources, self.evidence, strict=True):
            if strength:
                source.history.learn(guesses.get(source.model.name), emitted)
        self._until_refresh -= 1
        for source in self.sources:
            if source.cool_down.remaining and source.cool_down.tick():
                self._retry(source)
        self.refresh_due = self._until_refresh <= 0

    def _retry(self, source: _Source) -> None:
        """Try a source again whose pause is over: at first as if nothing had been seen of it."""
        source.history.forget(RETRY_DECAY)
        source.on_trial = True
        self._forget_choices()
        self._until_refresh = TRIAL_STEPS
        self._interval = FIRST_REFRESH // 2

    def refresh(self, sequence: Sequence, choose: Choose) -> None:
        """Choose anew from here on, and let sources pause that do not pay."""
        self.refresh_due = False
        self.n_tokens = len(sequence.tokens)
        self._interval = min(2 * self._interval, REFRESH)
        self._until_refresh = self._interval
        recent = list(self._recent)
        self._recent.clear()
        self._forget_choices()
        running = [source for source in self._of_hidden if source.runs(sequence)]

        # What was drafted on trial was favoured, which says nothing about its worth.
        for source in self.sources:
            if source.on_trial:
                source.on_trial = False
                source.drafted = False

        # A source pays if it drafts in company, where rows may cost less, or would draft alone.
        # Continuations don't pause: how good they are shows whether they are drafted or not.
        trees_alone = tuple(int(source in running) for source in self.sources)
        for source in running:
            if source.drafted or self._pays(source, [*recent, trees_alone], choose):
                source.cool_down.reset()
            else:
                source.cool_down.start()

        # What came lately will come again, and together it is worked out faster: caches are warm.
        for evidence in recent:
            self.chosen(evidence, choose)

        # What was seen fades; what pauses is remembered as it was.
        for source in self.sources:
            source.drafted = False
            if not source.cool_down.active:
                source.history.decay(DECAY)

    def _pays(self, source: _Source, possible: abc.Iterable[Evidence], choose: Choose) -> bool:
        """Say whether the source would draft for the sequence alone, on any possible evidence."""
        at = self.sources.index(source)
        return any(evidence[at] and self.chosen(evidence, choose)[at] for evidence in possible)

    def _forget_choices(self) -> None:
        self._chosen.clear()
        self._frontiers.clear()
        for source in self.sources:
            source.forget_expectations()
