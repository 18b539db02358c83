"""Simulated decoding for draft policies: times follow a curve, right guesses come by chance."""

from __future__ import annotations

import collections.abc as abc

import numpy as np
import numpy.typing as npt
from oracles import new_sequence

from model.decoding.draft import Proposal, assemble
from model.decoding.draft_policy import DraftPolicy, StepOutcome
from model.decoding.drafters.drafter import HEADS, NGRAM, ConstantDrafter
from model.decoding.sequence import Sequence
from model.planning.adaptive_policy import AdaptivePolicy
from model.planning.sources import ContinuationSource, SourceModel, TreeSource
from model.trees.costs import CostCurve
from model.trees.search import grow
from model.trees.tree import Tree

Times = tuple[tuple[int, float], ...]  # rows of a step, and its seconds in multiples of one row's

# DESIGN.md, "Time per batch is not flat": 1 B parameters on two cores with AVX512-VNNI.
BF16: Times = (
    (1, 1.0),
    (2, 1.19),
    (3, 1.38),
    (4, 1.57),
    (6, 1.88),
    (8, 2.12),
    (12, 2.5),
    (16, 2.89),
)
Q4_0: Times = (
    (1, 1.0),
    (2, 1.63),
    (3, 2.26),
    (4, 1.7),
    (6, 2.96),
    (8, 2.98),
    (12, 4.1),
    (16, 4.61),
)
Q4_K_M: Times = (
    (1, 1.0),
    (2, 1.6),
    (3, 2.12),
    (4, 2.67),
    (6, 3.78),
    (8, 4.32),
    (12, 5.47),
    (16, 5.42),
)
LONG: Times = (*BF16, (32, 5.5))

GOOD = np.array([[0.75, 0.1, 0.04], [0.6, 0.12, 0.05], [0.5, 0.12, 0.05], [0.45, 0.1, 0.05]])
DRAFT_S = 0.05  # of the heads, in multiples of one row's seconds
FURTHER_SEQUENCE_S = 0.1  # of it, for each further sequence that they draft for

TRUTH = 100  # the right token is this and its position
WRONG = -1


def curve(times: Times) -> CostCurve:
    return CostCurve((0,), tuple(n for n, _ in times), (tuple(t for _, t in times),))


def heads_source(draft_seconds: abc.Sequence[float] = (DRAFT_S,) * len(GOOD)) -> TreeSource:
    return TreeSource(HEADS, grow(GOOD, 15), GOOD, draft_seconds)


def adaptive(
    times: Times, *, heads: bool = True, continuation: int = 0, max_rows: int = 512
) -> AdaptivePolicy:
    sources: list[SourceModel] = []
    if heads:
        sources.append(heads_source())
    if continuation:
        sources.append(ContinuationSource(NGRAM, continuation))
    return AdaptivePolicy(curve(times), sources, max_rows=max_rows)


def drafted_sequence() -> Sequence:
    """A sequence with heads, whose guesses the world makes."""
    sequence = new_sequence([0], 10**9)
    sequence.tree_drafters[HEADS] = ConstantDrafter(0)
    return sequence


class ChanceDrafter:
    """A continuation drafter: each token is right by chance, if those before it are.

    matches: in what share of the steps it has anything to say. agreeing: tokens that it says agree.
    """

    def __init__(
        self,
        name: str,
        sequence: Sequence,
        *,
        rate: float,
        matches: float = 1.0,
        agreeing: int = 8,
        seed: int = 0,
    ) -> None:
        self.name = name
        self.rate = rate
        self._sequence = sequence
        self._matches = matches
        self._agreeing = agreeing
        self._rng = np.random.default_rng(seed)

    def propose(self, most: int) -> tuple[list[int], int]:
        if self._rng.random() >= self._matches:
            return [], 0
        begin = len(self._sequence.tokens)
        right = (self._rng.random(most) < self.rate).cumprod().astype(bool)
        tokens = [TRUTH + begin + i if right[i] else WRONG for i in range(most)]
        return tokens, self._agreeing


class World:
    """Simulated decoding: true rates of the heads' guesses, a curve, noise on the clock.

    dearer: how many times the curve's seconds steps with drafts take, which nobody knows
    beforehand.
    """

    def __init__(
        self,
        times: Times,
        rates: npt.NDArray[np.float64],
        seed: int = 0,
        dearer: float = 1.0,
    ) -> None:
        self.curve = curve(times)
        self.rates = rates
        self.rng = np.random.default_rng(seed)
        self.dearer = dearer

    def run(self, policy: DraftPolicy, n: int, *given: Sequence) -> float:
        """Return the speed in multiples of plain decoding's, over n plain steps' tokens or more."""
        sequences = given or (drafted_sequence(),)
        for sequence in sequences:
            sequence.hidden = np.zeros((1, 4), np.float32)
        emitted = 0
        spent = 0.0
        while emitted < n * len(sequences):
            new, seconds = self.go(policy, sequences, policy.propose(sequences))
            emitted += new
            spent += seconds
        plain_seconds = self.curve.seconds_for(len(sequences), 0)
        return emitted / spent * plain_seconds / len(sequences)

    def go(
        self,
        policy: DraftPolicy,
        sequences: abc.Sequence[Sequence],
        proposals: abc.Sequence[Proposal],
    ) -> tuple[int, float]:
        """Take a step; return its tokens and its seconds, drafting included."""
        filled = [
            [self._guess(part.tree, sequence) for part in proposal.trees]
            for proposal, sequence in zip(proposals, sequences, strict=True)
        ]
        all_emitted = list[list[int]]()
        n_rows = 0
        for sequence, proposal, guesses in zip(sequences, proposals, filled, strict=True):
            emitted, nodes = _verify(sequence, proposal, guesses)
            all_emitted.append(emitted)
            n_rows += nodes

        seconds = self.curve.seconds_for(n_rows, 0) * float(self.rng.lognormal(0, 0.05))
        if n_rows > len(sequences):
            seconds *= self.dearer
        for sequence, proposal, guesses, emitted in zip(
            sequences, proposals, filled, all_emitted, strict=True
        ):
            wanted = policy.wants_hidden(sequence)
            sequence.tokens += emitted
            sequence.hidden = np.zeros((1, 4), np.float32) if wanted else None
            outcome = StepOutcome(proposal, guesses, emitted, n_rows, seconds)
            policy.record(sequence, outcome)

        users = sum(len(proposal.trees) > 0 for proposal in proposals)
        if users:
            seconds += DRAFT_S * (1 + FURTHER_SEQUENCE_S * (users - 1))
        return sum(len(emitted) for emitted in all_emitted), seconds

    def _guess(self, tree: Tree, sequence: Sequence) -> list[int]:
        """Return the heads' tokens: which child, if any, is right is a matter of chance."""
        tokens = [WRONG] * len(tree)
        node = 0
        while True:
            depth = tree.depth_list[node]
            right = self._right_child(tree, node, depth)
            if not right:
                return tokens[1:]
            tokens[right] = TRUTH + len(sequence.tokens) + depth
            node = right

    def _right_child(self, tree: Tree, node: int, depth: int) -> int:
        draw = self.rng.random()
        for child in tree.children[node]:
            draw -= self.rates[depth, tree.ranks[child]]
            if draw < 0:
                return child
        return 0


def _verify(
    sequence: Sequence, proposal: Proposal, guesses: abc.Sequence[list[int]]
) -> tuple[list[int], int]:
    """Return what a step emits, and the nodes of its tree."""
    draft = assemble(sequence.tokens[-1], proposal, guesses)
    emitted = list[int]()
    node = 0
    while True:
        emitted.append(TRUTH + len(sequence.tokens) + len(emitted))
        node = draft.tree.child_with(node, emitted[-1], draft.tokens)
        if not node:
            return emitted, len(draft.tree)
