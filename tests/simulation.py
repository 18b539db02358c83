"""Simulated decoding for draft policies: times follow a curve, right guesses come by chance."""

from __future__ import annotations

import collections.abc as abc
from time import sleep

import numpy as np
import numpy.typing as npt
from oracles import new_sequence

from model.decoding.draft import Draft
from model.decoding.draft_policy import DraftPolicy, StepOutcome
from model.decoding.drafters.drafter import HEADS, NGRAM, Guesses
from model.decoding.drafters.ngram import PRIORS
from model.decoding.sampling import SamplingParams
from model.decoding.sequence import Sequence
from model.planning.adaptive_policy import AdaptivePolicy
from model.trees.costs import CostCurve
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
LOOK_S = 0.05  # of the heads for the first level, in multiples of one row's seconds
LEVEL_S = 0.01  # for each further one
LOOK_SECONDS = tuple(LOOK_S + LEVEL_S * level for level in range(len(GOOD)))
FURTHER_PATH_S = 0.1  # of it, for each further path that is looked at

TRUTH = 100  # the right token behind one of these is the next number
WRONG = -1000


def curve(times: Times) -> CostCurve:
    return CostCurve((0,), tuple(n for n, _ in times), (tuple(t for _, t in times),))


def adaptive(
    times: Times,
    *,
    heads: bool = True,
    ngram: bool = False,
    look_seconds: abc.Sequence[float] = LOOK_SECONDS,
    max_rows: int = 512,
    **limits: int,
) -> AdaptivePolicy:
    priors = {NGRAM: PRIORS} if ngram else {}
    return AdaptivePolicy(
        curve(times), priors, look_seconds if heads else (), max_rows=max_rows, **limits
    )


class ChanceHeads:
    """Heads whose guesses are right by chance.

    rates: (K, R), how often the guess of a rank is right behind a right path. sure: how often the
    first level knows: its probability is then 1 and it is right; else it is right as rarely as the
    rates leave over. seconds: that it has taken, to be read and set to 0.
    """

    name = HEADS

    def __init__(self, rates: npt.NDArray[np.float64], seed: int = 0, *, sure: float = 0.0) -> None:
        self.rates = rates
        self.sure = sure
        self.seconds = 0.0
        self.looks = 0
        self._rng = np.random.default_rng(seed)

    def look(
        self,
        hidden: npt.NDArray[np.float32],
        states: abc.Sequence[int],
        paths: abc.Sequence[abc.Sequence[int]],
    ) -> tuple[list[list[int]], list[list[float]]]:
        level = len(paths[0]) - 1
        cost = LEVEL_S if level else LOOK_S
        self.seconds += cost * (1 + FURTHER_PATH_S * (len(paths) - 1))
        self.looks += level == 0
        guesses = [self._guess(path[-1], level) for path in paths]
        return [tokens for tokens, _ in guesses], [shares for _, shares in guesses]

    def _guess(self, last: int, level: int) -> tuple[list[int], list[float]]:
        rates = self.rates[level]
        if self.sure and level == 0:
            if self._rng.random() < self.sure:
                rates = np.array([1.0, 0.0, 0.0])
            else:
                rates = np.array([max(0.0, rates[0] - self.sure) / (1 - self.sure), 0.0, 0.0])
        tokens = [WRONG - rank for rank in range(len(rates))]
        right = int(np.searchsorted(rates.cumsum(), self._rng.random(), side="right"))
        if last >= TRUTH and right < len(tokens):
            tokens[right] = last + 1
        return tokens, rates.tolist()

    def draft(
        self, hidden: npt.NDArray[np.float32], roots: abc.Sequence[int], trees: abc.Sequence[Tree]
    ) -> list[list[int]]:
        """Fill whole trees, as fixed policies ask for."""
        self.seconds += LOOK_S * (1 + FURTHER_PATH_S * (len(trees) - 1))
        return [self._fill(root, tree) for root, tree in zip(roots, trees, strict=True)]

    def _fill(self, root: int, tree: Tree) -> list[int]:
        tokens = [root] + [WRONG] * (len(tree) - 1)
        for node, children in enumerate(tree.children):
            if not children:
                continue
            guesses, _ = self._guess(tokens[node], tree.depth_list[node])
            for child in children:
                rank = int(tree.ranks[child])
                tokens[child] = guesses[rank] if rank < len(guesses) else WRONG
        return tokens[1:]


class ChanceDrafter:
    """A continuation drafter: each token is right by chance, if those before it are.

    matches: in what share of the steps it has anything to say. kind: of its guesses. learning_s:
    what it takes to learn from a step, really; 0: it does not learn.
    """

    def __init__(
        self,
        name: str,
        sequence: Sequence,
        *,
        rate: float,
        matches: float = 1.0,
        kind: int = 4,
        seed: int = 0,
        learning_s: float = 0.0,
    ) -> None:
        self.name = name
        self.learns = learning_s > 0
        self.taught = 0
        self._learning_s = learning_s
        self.rate = rate
        self._sequence = sequence
        self._matches = matches
        self._kind = kind
        self._rng = np.random.default_rng(seed)

    def start(self) -> int | None:
        return self._sequence.tokens[-1] if self._rng.random() < self._matches else None

    def advance(self, cursor: int, token: int) -> int:
        return token

    def guesses(self, cursor: int) -> Guesses:
        right = cursor >= TRUTH and self._rng.random() < self.rate
        return [(cursor + 1 if right else WRONG, self._kind)]

    def observe(self, *_: object) -> None:
        self.taught += 1
        sleep(self._learning_s)


def drafted_sequence(heads: ChanceHeads | None = None, temperature: float = 0.0) -> Sequence:
    """A sequence, with heads where they are given."""
    params = SamplingParams(temperature=temperature)
    sequence = new_sequence([TRUTH], 10**9, params, n_vocab=10**9)
    if heads is not None:
        sequence.tree_drafters[HEADS] = heads
    return sequence


class World:
    """Simulated decoding: a curve, noise on the clock, and the right token is the next number.

    dearer: how many times the curve's seconds steps with drafts take, which nobody knows
    beforehand. heads: of the sequences that it makes.
    """

    def __init__(
        self,
        times: Times,
        rates: npt.NDArray[np.float64] | None = None,
        seed: int = 0,
        dearer: float = 1.0,
        sure: float = 0.0,
    ) -> None:
        self.curve = curve(times)
        self.rng = np.random.default_rng(seed)
        self.dearer = dearer
        self.heads = None if rates is None else ChanceHeads(rates, seed + 1, sure=sure)

    def sequence(self) -> Sequence:
        return drafted_sequence(self.heads)

    def run(self, policy: DraftPolicy, n: int, *given: Sequence) -> float:
        """Return the speed in multiples of plain decoding's, over n plain steps' tokens or more."""
        sequences = given or (self.sequence(),)
        for sequence in sequences:
            sequence.hidden = np.zeros((1, 4), np.float32)
        emitted = 0
        spent = 0.0
        while emitted < n * len(sequences):
            new, seconds, _ = self.go(policy, sequences)
            emitted += new
            spent += seconds
        plain_seconds = self.curve.seconds_for(len(sequences), 0)
        return emitted / spent * plain_seconds / len(sequences)

    def go(
        self, policy: DraftPolicy, sequences: abc.Sequence[Sequence]
    ) -> tuple[int, float, list[Draft]]:
        """Take a step; return its tokens, its seconds, drafting included, and the drafts."""
        drafts = policy.draft(sequences)
        n_rows = sum(len(draft.tree) for draft in drafts)
        seconds = self.curve.seconds_for(n_rows, 0) * float(self.rng.lognormal(0, 0.05))
        if n_rows > len(sequences):
            seconds *= self.dearer
        total = 0
        for sequence, draft in zip(sequences, drafts, strict=True):
            node, emitted = verified(draft)
            wanted = policy.wants_hidden(sequence)
            sequence.tokens += emitted
            sequence.hidden = np.zeros((1, 4), np.float32) if wanted else None
            logits = np.zeros((len(draft.tree), 4), np.float32)
            policy.record(sequence, StepOutcome(draft, node, emitted, logits, n_rows, seconds))
            total += len(emitted)
        if self.heads is not None:
            seconds += self.heads.seconds
            self.heads.seconds = 0.0
        return total, seconds, drafts


def verified(draft: Draft) -> tuple[int, list[int]]:
    """Return the last accepted node, and what a step emits."""
    emitted = list[int]()
    node = 0
    while True:
        emitted.append(draft.tokens[node] + 1)
        child = draft.tree.child_with(node, emitted[-1], draft.tokens)
        if not child:
            return node, emitted
        node = child
