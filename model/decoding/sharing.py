"""The plan for many slots: it shares the nodes of a pass by what each is expected to win. Knows no logits, no cache.

A slot's nodes come in the order of their worth, so the best k nodes of all slots are the k worthiest, and the best k is
the one that wins most tokens per second of the pass. One slot gets its full tree; many get short chains, or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from model.decoding.live import WORTH, Live, LivePlan
from model.decoding.planning import Proposal

if TYPE_CHECKING:
    from model.decoding.step import Slot

Float64Array = npt.NDArray[np.float64]
FADE = 0.95  # of the times seen, per pass
TRUST = 8.0  # passes that the curve counts for
MORE_STATES = 0.1  # of the heads' time for one state: what each further one takes (the bundled model's: 0.04)
STRIDE = 8  # beyond the sizes that were measured, passes of multiples of this are on offer


class SharedPlan:
    """A live plan's knowledge of each text, and one budget for the pass.

    most_rows: of a pass, the roots included. A slot that is alone drafts as the live plan says.
    """

    def __init__(self, plan: LivePlan, most_rows: int = 512) -> None:
        self._plan, self._most_rows = plan, most_rows
        self.lanes, self.max_nodes = plan.lanes, plan.max_nodes
        self._times = [[0.0, 0.0], [0.0, 0.0]]  # seconds as predicted and as measured, undrafted and drafted
        self._predicted = 0.0
        self._pass: Slot | None = None  # the first slot of the pass that was proposed last
        self._roots = 1

    def wants_state(self, slot: Slot) -> bool:
        """See Plan."""
        return self._plan.wants_state(slot)

    def propose(self, slot: Slot) -> Proposal:
        """See Plan."""
        return self._plan.propose(slot)

    def propose_all(self, slots: Sequence[Slot]) -> list[Proposal]:
        """See Plan."""
        self._pass, self._roots = slots[0], len(slots)
        if len(slots) == 1:
            return [self._plan.propose(slots[0])]
        looks = [self._plan.look(slot) for slot in slots]
        offers: list[tuple[float, int, int]] = []  # worth, slot, which of the heads' nodes (0: a branch's)
        for i, (slot, (live, following)) in enumerate(zip(slots, looks, strict=True)):
            branch, heads = self._worths(live, live.match if following else 0)
            offers += [(worth, i, 0) for worth in branch]
            if slot.hidden is not None and slot.drafter is not None:
                offers += [(worth, i, m) for m, worth in enumerate(heads, 1)]
        offers.sort(key=itemgetter(0), reverse=True)
        taken = self._how_many(slots, offers[: self._most_rows - len(slots)])
        counts = [[0, 0] for _ in slots]
        for _, i, m in offers[:taken]:
            counts[i][m > 0] += 1
        return [
            self._plan.proposal(slot, nodes, following, min(branch, self.max_nodes - 1 - nodes))
            for slot, (_, following), (branch, nodes) in zip(slots, looks, counts, strict=True)
        ]

    def _worths(self, live: Live, match: int) -> tuple[list[float], list[float]]:
        """Return what each node of the branch and of the heads' tree is worth, beside those before it: falling."""
        if match not in live.worths:
            rate, branch = live.branch[match]
            heads = np.minimum.accumulate(np.diff(live.heads) * (1 - rate))
            room = self.max_nodes - 1
            live.worths[match] = np.diff(branch).tolist()[:room], heads.tolist()[:room]
        return live.worths[match]

    def _how_many(self, slots: Sequence[Slot], offers: list[tuple[float, int, int]]) -> int:
        """Return how many of the worthiest nodes to draft."""
        if not offers:
            self._predicted = float(self._plan.curve.seconds_for(len(slots), sum(len(slot.tokens) for slot in slots)))
            return 0
        roots, most = len(slots), len(slots) + len(offers)
        context = sum(len(slot.tokens) for slot in slots)  # every token looks at every cell
        every, seconds = self._seconds(context, most)
        seconds[roots - 1] = every[roots - 1]
        plain, drafted = (
            (measured + TRUST * every[0]) / (predicted + TRUST * every[0]) for predicted, measured in self._times
        )
        cost = seconds[roots - 1 :] * drafted  # (k + 1,)
        nodes = np.array([0, *(m for *_, m in offers)])
        states = np.cumsum(nodes == 1)
        cost += np.maximum.accumulate(self._plan.draft_s[nodes]) * (1 + MORE_STATES * np.maximum(states - 1, 0))
        cost[0] = WORTH * plain * every[roots - 1]
        tokens = roots + np.cumsum([0.0, *(worth for worth, *_ in offers)])
        best = int((tokens / cost).argmax())
        self._predicted = float(every[roots + best - 1])
        return best

    def _seconds(self, context: int, most: int) -> tuple[Float64Array, Float64Array]:
        """Return (most,) seconds for n = 1 … most rows, guesses included; and those that are on offer, else infinite.

        Beyond what was measured a row costs what it cost on average: a single flat stretch must not make many free.
        """
        curve = self._plan.curve
        last = curve.sizes[-1]
        every, offered = curve.row(context, max(most, last)), curve.on_offer(context, max(most, last))
        every[last:] = every[last - 1] + np.arange(1, len(every) - last + 1) * (every[last - 1] - every[0]) / (last - 1)
        far = np.arange(last + STRIDE - last % STRIDE, len(every) + 1, STRIDE)
        offered[far - 1] = every[far - 1]
        return every[:most], offered[:most]

    def learn(self, slot: Slot, proposal: Proposal, tokens: list[int], won: list[int], rows: int, took: float) -> None:
        """See Plan."""
        if slot is self._pass and self._roots > 1:
            seen = self._times[rows > self._roots]
            seen[:] = [FADE * seen[0] + self._predicted, FADE * seen[1] + took]
        self._plan.learn(slot, proposal, tokens, won, rows, took)
