"""The plan that follows what it sees: drafts what pays, as measured, and nothing where nothing does.

One text gets the draft that is best for it; many share the nodes of a pass by what each is expected to win.
Knows trees, costs and slots, neither logits nor the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from model.decoding.clock import Clock
from model.decoding.planning import ROOT_ONLY, Proposal
from model.decoding.sharing import Worths, share
from model.decoding.slot import Slot
from model.trees.costs import CostCurve
from model.trees.tree import RankPath, Tree

Float64Array = npt.NDArray[np.float64]
FIRST_LOOK, REFRESH = 4, 16  # steps to the first look at what drafting earns, doubling up to the distance of later ones
PROBE = 2  # steps that try a source once more before it is judged
REST, LONGEST_REST = 64, 256  # steps without a source that does not pay; doubled each time
WORTH = 1.02  # drafting must beat plain decoding by this much
HOPEFUL = 0.7  # of plain decoding's speed: what promises less is not even tried again
DOUBT = 2.0  # steps that the validation's rates count for, beside those that were lived through
FADE = 0.9  # of what was seen, per refresh: the text changes
# How often the first token of a branch is right, by the bits of the length of the match, and each one behind it:
# a start only, corrected within a few steps.
FIRST, LATER = (0.0, 0.0, 0.4, 0.55, 0.7, 0.85, 0.95), 0.85
Table = list[tuple[int, int]]  # by the bits of the length of a match: nodes of the heads' tree, nodes of the branch
NOTHING = Proposal(ROOT_ONLY, [], 0)


@dataclass
class Live:
    """What one text has shown so far. tries, hits: by depth for the heads; by match, first and later, for branches."""

    table: Table
    depths: int
    rests: list[int] = field(default_factory=lambda: [0, 0])  # steps that heads and branches still rest
    spans: list[int] = field(default_factory=lambda: [REST, REST])  # their next rests
    refresh: int = FIRST_LOOK // 2
    until_refresh: int = 0
    match: int = 0  # bits of the length of this step's match
    heads: Float64Array = field(default_factory=lambda: np.zeros(1))  # (T,) tokens that so many nodes are worth
    branch: list[tuple[float, Float64Array]] = field(
        default_factory=list
    )  # by match: its first token's rate, (M,) worth
    worths: dict[int, Worths] = field(default_factory=dict)  # by match, as they are asked for

    def __post_init__(self) -> None:
        self.expected, self.hits = [0.0] * self.depths, [0.0] * self.depths
        self.branches = [[0.0] * 4 for _ in FIRST]  # tries and hits of the first token, of the later ones


class LivePlan:
    """The draft that earns most per second as measured, for each slot and step; none where none pays.

    Trees grow node by node in the order of `paths`, which the search has found; a branch of up to `branch` tokens comes
    from the slot's own text. Expected tokens per step: 1 + b + (1 - q) · h, with h the heads' tree alone, b the branch
    alone and q the rate of its first token. Rates begin with `accuracies` (K, R), conditional on the parent's
    acceptance, and follow what each text shows. curve: seconds of a step but for the heads; draft_s (D,): the
    heads', by the depth of the tree. max_nodes: of a draft, with the root. most_rows: of a pass that slots share.
    """

    def __init__(
        self,
        curve: CostCurve,
        *,
        paths: Sequence[RankPath] = (),
        accuracies: npt.NDArray[np.float64] | None = None,
        draft_s: Sequence[float] = (),
        branch: int = 0,
        max_nodes: int = 256,
        most_rows: int = 512,
    ) -> None:
        self._branch, self.clock = branch, Clock(curve, most_rows)
        self._first: Slot | None = None  # of the pass that was proposed last: its times are noted once
        self._trees = [Tree(paths[:n]) for n in range(len(paths) + 1)]
        self._depths = self._trees[-1].max_depth
        drafting = [0.0, *draft_s] if draft_s else [0.0] * (self._depths + 1)
        self.draft_s = np.array([drafting[tree.max_depth] for tree in self._trees])  # (T,)
        self._rates = np.zeros((len(paths) + 1, self._depths))  # of reaching each depth from the one above, by tree
        for n, tree in enumerate(self._trees):
            assert n == 0 or accuracies is not None
            chance = np.ones(len(tree))
            for i in range(1, len(tree)):
                assert accuracies is not None
                chance[i] = chance[tree.parents[i]] * accuracies[tree.depths[i] - 1, tree.ranks[i]]
            reached = np.bincount(tree.depths, chance, minlength=self._depths + 1)
            np.divide(reached[1:], reached[:-1], out=self._rates[n], where=reached[:-1] > 0)
        self.lanes = max(len(tree.leaves) for tree in self._trees) + (branch > 0 and len(paths) > 0)
        self.max_nodes = min(len(paths) + branch + 1, max_nodes)

    def wants_state(self, slot: Slot) -> bool:
        """See Plan. While the heads rest the base model need not copy its states."""
        live = slot.live
        return slot.drafter is not None and self._depths > 0 and (live is None or live.rests[0] <= 1)

    def propose(self, slot: Slot) -> Proposal:
        """See Plan."""
        return self.propose_all([slot])[0]

    def propose_all(self, slots: Sequence[Slot]) -> list[Proposal]:
        """See Plan."""
        self._first, roots, context = slots[0], len(slots), sum(len(slot.tokens) for slot in slots)
        looks = [self._look(slot) for slot in slots]
        counts = [(0, 0)] * roots
        if not self.clock.begin(roots, context):
            counts = self._shared(slots, looks, context) if roots > 1 else self._alone(looks[0][0])
        return [
            NOTHING if live is None else Proposal(self._trees[nodes if slot.hidden is not None else 0], following, more)
            for slot, (live, following), (nodes, more) in zip(slots, looks, counts, strict=True)
        ]

    def _alone(self, live: Live | None) -> list[tuple[int, int]]:
        return [live.table[live.match] if live is not None else (0, 0)]

    def _shared(
        self, slots: Sequence[Slot], looks: list[tuple[Live | None, list[int]]], context: int
    ) -> list[tuple[int, int]]:
        """Return for each slot the nodes of the heads' tree and of the branch that win most for the pass."""
        worths, room = list[Worths](), self.max_nodes - 1
        for slot, (live, following) in zip(slots, looks, strict=True):
            branch, heads = self._worths(live, live.match if following else 0) if live is not None else ([], [])
            worths.append((branch, heads if slot.hidden is not None and slot.drafter is not None else []))
        (every, offered), (plain, drafted) = self.clock.seconds(context), self.clock.drift(len(slots))
        plain_s = WORTH * plain * float(every[len(slots) - 1])
        counts = share(worths, plain_s, drafted * offered, self.draft_s)
        return [(nodes, min(branch, room - nodes)) for nodes, branch in counts]

    def _worths(self, live: Live, match: int) -> Worths:
        if match not in live.worths:
            rate, branch = live.branch[match]
            heads = np.minimum.accumulate(np.diff(live.heads) * (1 - rate))
            room = self.max_nodes - 1
            live.worths[match] = np.diff(branch).tolist()[:room], heads.tolist()[:room]
        return live.worths[match]

    def _look(self, slot: Slot) -> tuple[Live | None, list[int]]:
        """Return what is known of a slot (None: nobody drafts for it), and what may follow in its text."""
        if slot.drafter is None and slot.ngrams is None:
            return None, []
        if slot.live is None:
            slot.live = Live([], self._depths)
            self._refresh(slot, slot.live)
        live, following = slot.live, list[int]()
        live.match = 0
        if not live.rests[1] and self._branch and slot.ngrams is not None:
            following, match = slot.ngrams.propose(self._depths + self._branch)
            live.match = match.bit_length()
        return live, following

    def learn(self, slot: Slot, proposal: Proposal, tokens: list[int], won: list[int], rows: int, took: float) -> None:
        """See Plan."""
        if slot is self._first:
            self.clock.note(rows, took)
        live = slot.live
        if live is None:
            return
        tree = proposal.tree
        if len(tree) > 1:
            rates, node = self._rates[len(tree) - 1], 0
            for depth, token in enumerate(won[: tree.max_depth]):
                live.expected[depth] += rates[depth]
                node = tree.child_with(node, token, tokens)
                if not node:
                    break
                live.hits[depth] += 1
        if proposal.following:
            counts = live.branches[live.match]
            for at, (wanted, token) in enumerate(zip(proposal.following, won, strict=False)):
                counts[0 if at == 0 else 2] += 1
                if wanted != token:
                    break
                counts[1 if at == 0 else 3] += 1
        self._rest(slot, live)
        live.until_refresh -= 1
        if not live.until_refresh:
            self._refresh(slot, live)

    def _rest(self, slot: Slot, live: Live) -> None:
        """Count rests down; a source whose rest is over is tried as the validation's rates would have it."""
        for source in (0, 1):
            if live.rests[source]:
                live.rests[source] -= 1
                if not live.rests[source]:
                    untried = Live([], self._depths, live.rests)
                    live.table = self._best(slot, untried, WORTH / HOPEFUL)
                    live.heads, live.branch, live.worths = untried.heads, untried.branch, {}
                    live.until_refresh, live.refresh = PROBE, FIRST_LOOK // 2
                    for counts in live.branches if source else (live.expected, live.hits):
                        counts[:] = [0.8 * count for count in counts]  # it was long ago

    def _refresh(self, slot: Slot, live: Live) -> None:
        """Choose anew for every length of match; send a source to rest that pays nowhere."""
        live.refresh = live.until_refresh = min(2 * live.refresh, REFRESH)
        live.table = self._best(slot, live)
        has = (self._depths > 0 and slot.drafter is not None, self._branch > 0 and slot.ngrams is not None)
        for source in (0, 1):
            if live.rests[source] or not has[source]:
                continue
            if any(entry[source] for entry in live.table):
                live.spans[source] = REST
            else:
                live.rests[source], live.spans[source] = live.spans[source], min(2 * live.spans[source], LONGEST_REST)
        faded = [] if live.rests[0] else [live.expected, live.hits]  # what rests is remembered
        faded += [] if live.rests[1] else live.branches
        for counts in faded:
            counts[:] = [FADE * count for count in counts]

    def _best(self, slot: Slot, live: Live, favour: float = 1.0) -> Table:
        """Return for each length of match how many nodes of tree and branch earn most per second.

        favour: how much more drafting is made to earn than is expected.
        """
        most = min(self.max_nodes, self.clock.curve.sizes[-1])
        seconds, (plain, drafted) = self.clock.seconds(len(slot.tokens))[1][:most], self.clock.drift(1)
        heads = slot.drafter is not None and not live.rests[0]
        scale = (np.array(live.hits) + DOUBT) / (np.array(live.expected) + DOUBT)
        rates = np.minimum(1.0, self._rates * scale)
        h = rates.cumprod(1).sum(1)[: None if heads else 1]  # (T,)
        branches = slot.ngrams is not None and not live.rests[1]
        branch = np.arange(self._branch + 1 if branches else 1)  # (M,)
        rows = np.arange(len(h))[:, None] + branch
        cost = np.where(rows < most, seconds[np.minimum(rows, most - 1)], np.inf) * drafted  # (T, M)
        cost += self.draft_s[: len(h), None]
        cost /= favour
        cost[0, 0] = WORTH * seconds[0] * plain
        table, live.heads, live.branch, live.worths = Table(), h, [], {}
        for first, counts in zip(FIRST, live.branches, strict=True):
            q = (counts[1] + DOUBT * first) / (counts[0] + DOUBT)
            later = (counts[3] + DOUBT * LATER) / (counts[2] + DOUBT)
            b = q * np.concatenate([[0.0], (later ** branch[:-1]).cumsum()])
            live.branch.append((q, b) if first else (0.0, b[:1]))
            gain = (1 + b + (1 - q * (branch > 0)) * h[:, None]) / cost  # (T, M)
            gain = gain if first else gain[:, :1]  # no match, no branch
            nodes, more = divmod(int(gain.argmax()), gain.shape[1])
            table.append((nodes, more))
        return table
