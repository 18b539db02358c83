"""How many nodes each text gets of a pass that many share. Pure arithmetic: knows no slots, no logits, no cache.

A text's nodes come in the order of their worth, so the best k nodes of all are the k worthiest, and the best k is the
one that wins most tokens per second of the pass. One text gets its full tree; many get short chains, or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

import numpy as np
import numpy.typing as npt

MORE_STATES = 0.1  # of the heads' time for one state: what each further one takes (the bundled model's: 0.04)
Worths = tuple[list[float], list[float]]  # of the nodes of a branch and of the heads' tree, beside those before


def share(
    worths: Sequence[Worths], plain_s: float, seconds: npt.NDArray[np.float64], draft_s: npt.NDArray[np.float64]
) -> list[tuple[int, int]]:
    """Return for each text how many nodes of the heads' tree and of the branch to draft.

    worths: falling. plain_s: seconds of the pass without drafts, to be beaten. seconds: (most,) of 1, 2, … rows, the
    roots included; infinite where not on offer. draft_s: (T,)
    of the heads for one text, by the nodes of their tree.
    """
    counts, roots = [[0, 0] for _ in worths], len(worths)
    offers: list[tuple[float, int, int]] = []  # worth, text, which of the heads' nodes (0: a branch's)
    for i, (branch, heads) in enumerate(worths):
        offers += [(worth, i, 0) for worth in branch]
        offers += [(worth, i, m) for m, worth in enumerate(heads, 1)]
    offers.sort(key=itemgetter(0), reverse=True)
    del offers[len(seconds) - roots :]
    if offers:
        cost = seconds[roots - 1 : roots + len(offers)].copy()  # (k + 1,)
        nodes = np.array([0, *(m for *_, m in offers)])
        states = np.cumsum(nodes == 1)
        cost += np.maximum.accumulate(draft_s[nodes]) * (1 + MORE_STATES * np.maximum(states - 1, 0))
        cost[0] = plain_s
        tokens = roots + np.cumsum([0.0, *(worth for worth, *_ in offers)])
        for _, i, m in offers[: int((tokens / cost).argmax())]:
            counts[i][m == 0] += 1
    return [(nodes, branch) for nodes, branch in counts]
