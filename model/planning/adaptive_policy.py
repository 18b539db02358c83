"""The adaptive policy: each step drafts what earns most tokens per second, or nothing.

Continuation drafters take no time, so they are asked in every step. The heads take some, so they
are asked where that has paid lately; deeper levels only where the path there is likely. Knows
sequences and their drafters, neither logits nor the cache.
"""

from __future__ import annotations

import collections.abc as abc
from time import perf_counter
from typing import NamedTuple, cast
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from model.decoding.draft import Draft, no_draft
from model.decoding.draft_policy import StepOutcome
from model.decoding.drafters.drafter import (
    BIN_PRIORS,
    HEADS,
    LevelDrafter,
    ranked_bins,
)
from model.decoding.sampling import COLD
from model.decoding.sequence import Sequence
from model.planning.acceptance_rate import Calibration, SequenceCalibration
from model.planning.source_value import LEARNING_TRIAL, SourceValue
from model.planning.step_time import StepTimeModel
from model.planning.tree_growth import UNKNOWN, Growth, Limits, Node, Source, grow
from model.trees.costs import CostCurve

# Greedy sequences, those below this temperature and those above are held against their kind alone:
# SmolLM2-135M follows its n-grams in 0.56 of the cases at temperature 0 and in 0.44 at 0.7, what is
# recycled and agrees with them in 0.94 and 0.77.
WARM = 0.5
# Of a level's seconds for one sequence: what each further one takes (the bundled model's heads:
# 0.04).
FURTHER_SEQUENCE = 0.1
# Heads are too sure of themselves: on answers of SmolLM2-135M at temperatures 0 and 0.7 they were
# right in 0.4 to 0.8 of what they promised, where no other source had a guess.
HEAD_PRIORS = tuple(0.7 * p for p in BIN_PRIORS)


class _Asking(NamedTuple):
    """A sequence that asks the heads."""

    growth: Growth
    sequence: Sequence
    value: SourceValue
    first_guess: abc.Sequence[SequenceCalibration]


class AdaptivePolicy:
    """A `DraftPolicy` that follows what each sequence shows and what steps take.

    curve: seconds of a step, drafting left out. priors: by the name of a continuation source, how
    often each kind of its guesses is accepted. look_seconds: (K,) that the heads take to be asked
    for their first 1, 2, … K levels; empty: there are none. max_nodes: of a sequence's draft tree,
    the root included. max_leaves: of it. max_rows: of a step, over all sequences.
    """

    def __init__(
        self,
        curve: CostCurve,
        priors: abc.Mapping[str, abc.Sequence[float]],
        look_seconds: abc.Sequence[float] = (),
        *,
        max_nodes: int = 64,
        max_leaves: int = 16,
        max_rows: int = 512,
    ) -> None:
        # No sequence drafts more than was measured.
        self.max_nodes = min(max_nodes, curve.sizes[-1]) if priors or look_seconds else 1
        self.max_leaves = max(1, min(max_leaves, self.max_nodes - 1))
        self._limits = Limits(self.max_nodes - 1, self.max_leaves)
        self._step_time = StepTimeModel(curve, max_rows)
        self._priors = priors
        self._look_seconds = [0.0, *look_seconds]
        # By how much chance there is, and by the rule of acceptance.
        self._experiences: dict[tuple[int, bool], _Experience] = {}
        self._states: WeakKeyDictionary[Sequence, _SequenceState] = WeakKeyDictionary()
        self._running: dict[Sequence, _SequenceState] = {}  # those of the last step
        self._seconds_are_new = False  # those of a step count once, not for each sequence

    def wants_hidden(self, sequence: Sequence) -> bool:
        """See DraftPolicy."""
        if len(self._look_seconds) == 1 or HEADS not in sequence.tree_drafters:
            return False
        return any(value.due_soon for value in self._state(sequence).look_values)

    def draft(self, sequences: abc.Sequence[Sequence]) -> list[Draft]:
        """See DraftPolicy."""
        # Ask who takes no time, also in a step that goes without: it shows how good they are.
        n = len(sequences)
        n_context = 0
        growths = list[Growth]()
        running = dict[Sequence, _SequenceState]()
        for sequence in sequences:
            state = running[sequence] = self._state(sequence)
            growths.append(state.begin(sequence))
            n_context += len(sequence.tokens)
        self._running = running
        self._step_time.begin_step(n, n_context)
        self._seconds_are_new = True
        for experience in self._experiences.values():
            experience.tick(n)
        plain_rate = n / self._step_time.plain_seconds(n, n_context)
        for state in running.values():
            state.tokens_per_second = plain_rate / n
        if self._step_time.plain_step_due:
            for growth in growths:
                growth.expand(growth.root)
            return [no_draft(sequence.tokens[-1]) for sequence in sequences]

        # Grow their trees, and with the heads' guesses where these are worth asking for.
        guessed = False
        for growth in growths:
            growth.expand(growth.root)
            guessed = guessed or bool(growth.root.children)
        asked = self._who_asks(sequences, growths)
        if not (guessed or asked):
            return [no_draft(sequence.tokens[-1]) for sequence in sequences]
        offers = self._step_time.offers(n, n_context, n * self.max_nodes)
        rate = plain_rate
        if guessed:
            rate = grow(growths, offers, plain_rate, self._limits)
        if asked:
            self._look(growths, asked, offers, plain_rate, rate)
        self._share_costs(growths, offers, plain_rate)
        return [growth.draft() for growth in growths]

    def _share_costs(
        self,
        growths: abc.Sequence[Growth],
        offers: abc.Sequence[tuple[int, float]],
        plain_rate: float,
    ) -> None:
        """Say what a drafted row costs in this step, in the tokens that plain steps bring."""
        n = len(growths)
        n_nodes = sum(len(growth.nodes) for growth in growths)
        a_row = 0.0
        if n_nodes:
            a_row = (_seconds(growths, offers, plain_rate) * plain_rate - n) / n_nodes
        for state in self._running.values():
            state.row_tokens = a_row

    def _who_asks(
        self, sequences: abc.Sequence[Sequence], growths: abc.Sequence[Growth]
    ) -> list[_Asking]:
        """Return the sequences that ask the heads in this step."""
        asked = list[_Asking]()
        if len(self._look_seconds) == 1:
            return asked
        for sequence, growth in zip(sequences, growths, strict=True):
            values = self._running[sequence].look_values
            for each in values:
                each.tick()
            if sequence.hidden is None or HEADS not in sequence.tree_drafters or growth.room < 1:
                continue
            value = values[-1] if growth.root.children else values[0]
            if not value.pausing:
                first_guess = self._running[sequence].first_guess
                asked.append(_Asking(growth, sequence, value, first_guess))
        return asked

    def _look(
        self,
        growths: abc.Sequence[Growth],
        asked: abc.Sequence[_Asking],
        offers: abc.Sequence[tuple[int, float]],
        plain_rate: float,
        rate: float,
    ) -> None:
        """Ask the heads, level by level, while the next level promises more than it takes."""
        # The first level of every sequence that asks; each further one where it is hoped to pay.
        rate_without = rate
        seconds_without = _seconds(growths, offers, plain_rate)
        without = [sum(node.p for node in each.growth.nodes) for each in asked]
        states = [cast(np.ndarray, each.sequence.hidden) for each in asked]
        hidden = states[0] if len(states) == 1 else np.concatenate(states)
        level = [(each.growth.root, i) for i, each in enumerate(asked)]
        spent = 0.0
        for depth in range(len(self._look_seconds) - 1):
            if depth:
                level = self._hoped(growths, asked, depth, offers, plain_rate, rate, spent)
            if not level:
                break
            self._ask(asked, level, hidden, depth)
            spent += self._level_seconds(depth, len(level))
            rate = grow(growths, offers, plain_rate, self._limits, spent)
        more_seconds = spent + _seconds(growths, offers, plain_rate) - seconds_without
        cost = rate_without * more_seconds / len(asked)
        for each, expected in zip(asked, without, strict=True):
            self._running[each.sequence].look = each.value, expected, cost

    def _ask(
        self,
        asked: abc.Sequence[_Asking],
        level: abc.Sequence[tuple[Node, int]],
        hidden: npt.NDArray[np.float32],
        depth: int,
    ) -> None:
        """Have the heads guess behind nodes of a depth; sequences with the same ones share a call.

        level: nodes, and whose they are. hidden: (B, D), a state for each of `asked`.
        """
        calls: dict[LevelDrafter, list[tuple[Node, int]]] = {}
        for node, i in level:
            drafter = cast(LevelDrafter, asked[i].sequence.tree_drafters[HEADS])
            calls.setdefault(drafter, []).append((node, i))
        first_kind = depth * len(BIN_PRIORS)
        for drafter, part in calls.items():
            paths = [_path(node) for node, _ in part]
            tokens, probabilities = drafter.look(hidden, [i for _, i in part], paths)
            for (node, i), best, shares in zip(part, tokens, probabilities, strict=True):
                kinds = [first_kind + kind for kind in ranked_bins(shares)]
                asked[i].growth.add_look(node, list(zip(best, kinds, strict=True)))
                if best:
                    node.judged.append((asked[i].first_guess[depth], 0, best[0]))

    def _hoped(
        self,
        growths: abc.Sequence[Growth],
        asked: abc.Sequence[_Asking],
        depth: int,
        offers: abc.Sequence[tuple[int, float]],
        plain_rate: float,
        rate: float,
        spent: float,
    ) -> list[tuple[Node, int]]:
        """Return the nodes of a depth that the heads should be asked about, if it is hoped to pay.

        Their guesses there, and those of all deeper levels, are hoped to be right as often as the
        best guesses of the level were.
        """
        chosen = [growth.nodes for growth in growths]
        for each in asked:
            rates = [first.probability(0) for first in each.first_guess[depth:]]
            each.growth.hope = [0.0] * depth + rates
        hoped = grow(
            growths, offers, plain_rate, self._limits, spent + self._level_seconds(depth, 1)
        )
        level = list[tuple[Node, int]]()
        if hoped > rate:
            for i, each in enumerate(asked):
                of_depth = {
                    node.parent: i
                    for node in each.growth.nodes
                    if node.token == UNKNOWN and node.depth == depth + 1
                }
                level += [(node, i) for node in of_depth if node is not None]
        for growth, nodes in zip(growths, chosen, strict=True):
            growth.hope = ()
            growth.nodes = nodes
        return level

    def _level_seconds(self, depth: int, n: int) -> float:
        """Return what the heads take for n paths at a depth."""
        seconds = self._look_seconds[depth + 1] - self._look_seconds[depth]
        return max(0.0, seconds) * (1 + FURTHER_SEQUENCE * (n - 1))

    def record(self, sequence: Sequence, outcome: StepOutcome) -> None:
        """See DraftPolicy."""
        if self._seconds_are_new:
            self._step_time.record(outcome.n_rows, outcome.seconds)
            self._seconds_are_new = False
        self._state(sequence).learn(sequence, outcome)
        if sequence.finished:  # nobody is to keep it alive
            self._running.pop(sequence, None)

    def _state(self, sequence: Sequence) -> _SequenceState:
        state = self._running.get(sequence) or self._states.get(sequence)
        if state is None:
            # Under the lossy rule what was drafted is right more often.
            like = (_chance(sequence.sampler.params.temperature), sequence.typical_acceptance)
            experience = self._experiences.get(like)
            if experience is None:
                n_levels = len(self._look_seconds) - 1
                experience = self._experiences[like] = _Experience(self._priors, n_levels)
            state = self._states[sequence] = _SequenceState(sequence, experience)
        return state


def _seconds(
    growths: abc.Sequence[Growth], offers: abc.Sequence[tuple[int, float]], plain_rate: float
) -> float:
    """Return what the step takes with the nodes that are chosen, drafting left out."""
    n = len(growths)
    rows = n + sum(len(growth.nodes) for growth in growths)
    return dict(offers)[rows] if rows > n else n / plain_rate


def _path(node: Node) -> list[int]:
    """Return the tokens from the root to a node."""
    tokens = [node.token]
    while node.parent is not None:
        node = node.parent
        tokens.append(node.token)
    tokens.reverse()
    return tokens


def _chance(temperature: float) -> int:
    """Return 0, 1 or 2: how much of what a sequence says is chance, which nobody can guess."""
    if temperature < COLD:
        return 0
    return 1 if temperature < WARM else 2


class _Experience:
    """What sequences of about the same temperature have shown; a new one begins with it.

    priors: by the name of a continuation source. n_levels: of the heads.
    """

    def __init__(self, priors: abc.Mapping[str, abc.Sequence[float]], n_levels: int) -> None:
        self.calibrations = {name: Calibration(each) for name, each in priors.items()}
        self.head_levels = Calibration(HEAD_PRIORS * n_levels)
        # How often the best guess of each level is right, behind a right one: much is hoped for at
        # first, or deeper levels would never be asked.
        self.first_guess = [Calibration((0.8,)).of_sequence() for _ in range(n_levels)]
        # Whether asking the heads pays: where no other source guesses, and where one does.
        self.look_values = (SourceValue(), SourceValue())
        # The same for sources that learn, which takes time; all sequences share what they learn.
        self.source_values = {name: SourceValue(trial=LEARNING_TRIAL) for name in priors}

    def tick(self, n_sequences: int) -> None:
        """Count a step of so many sequences, each of which would have taught a source."""
        for value in self.look_values:
            value.tick()
        for value in self.source_values.values():
            value.tick(n_sequences)


class _SequenceState:
    """What the policy keeps of one sequence."""

    def __init__(self, sequence: Sequence, experience: _Experience) -> None:
        self._sources = list[Source]()
        self._values = list[SourceValue | None]()  # of each source; None: it costs nothing
        for name, drafter in sequence.continuation_drafters.items():
            calibration = experience.calibrations.get(name)
            if calibration is not None:
                self._sources.append(Source(drafter, calibration.of_sequence()))
                self._values.append(experience.source_values[name] if drafter.learns else None)
        # Where nothing else guesses, and where something does.
        self.look_values = [SourceValue(shared) for shared in experience.look_values]
        if not self._sources:
            del self.look_values[1:]
        self.first_guess = experience.first_guess
        self._heads = experience.head_levels.of_sequence()
        self._growth: Growth | None = None
        # The look of the step, what was expected without it, and what it cost, in tokens.
        self.look: tuple[SourceValue, float, float] | None = None
        self.row_tokens = 0.0  # tokens that a drafted row of the step costs
        self.tokens_per_second = 0.0  # of the sequence in plain steps

    def begin(self, sequence: Sequence) -> Growth:
        """Return the tree that is to grow in this step. The last token is never drafted."""
        awake = [
            source
            for source, value in zip(self._sources, self._values, strict=True)
            if value is None or not value.pausing
        ]
        self.look = None
        self.row_tokens = 0.0
        room = sequence.draft_room
        self._growth = Growth(sequence.tokens[-1], awake, self._heads, room)
        return self._growth

    def learn(self, sequence: Sequence, outcome: StepOutcome) -> None:
        """Learn from a step how good guesses are, and what the base model said."""
        if self._growth is None:
            return
        growth = self._growth
        self._growth = None
        growth.learn(outcome.node, outcome.emitted)
        if self.look is not None:
            value, without, cost = self.look
            expected = sum(node.p for node in growth.nodes)
            value.record(expected, len(outcome.emitted) - 1, without, cost)
        path = outcome.draft.tree.path_to(outcome.node)
        for source, source_value in zip(self._sources, self._values, strict=True):
            if source_value is not None and not source_value.pausing:
                self._teach(source, source_value, sequence, outcome, growth, path)

    def _teach(
        self,
        source: Source,
        value: SourceValue,
        sequence: Sequence,
        outcome: StepOutcome,
        growth: Growth,
        path: abc.Sequence[int],
    ) -> None:
        """Show a source what the base model said; see whether it is worth that."""
        began = perf_counter()
        tokens = outcome.draft.tokens
        root = len(sequence.tokens) - len(outcome.emitted) - 1
        before = sequence.tokens[root - 1] if root else -1
        source.drafter.observe([before, *(tokens[at] for at in path)], path, outcome.logits)
        seconds = perf_counter() - began

        name = source.drafter.name
        own = [(at, node) for at, node in enumerate(growth.nodes, 1) if node.source == name]
        expected = sum(node.p for _, node in own)
        accepted = sum(at in path for at, _ in own)
        cost = len(own) * self.row_tokens + seconds * self.tokens_per_second
        value.record(expected, accepted, 0.0, cost)
