"""Would trees that follow the heads' own confidence win more than the fixed one? Simulated on the model's own text.

    python benchmarks/confidence.py

At each position the n likeliest nodes by the heads' probabilities (EAGLE-2's way, arXiv 2406.16858) are held against
the n likeliest by measured rates, which are the same everywhere. Rates come from one half of the texts, tokens per step
are counted on the other. Also times the choice of nodes, which a step would pay for on top of the softmax.
"""

from __future__ import annotations

import os
import sys
from heapq import heappop, heappush
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
    sys.path[0] = str(ROOT)

import click  # noqa: E402
import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402

from commands.common import PROMPTS, open_engine  # noqa: E402
from config import Settings  # noqa: E402
from model.decoding.planning import FixedPlan  # noqa: E402
from model.decoding.sampling import SamplingParams  # noqa: E402
from model.measuring.guess_rates import states_and_followers  # noqa: E402
from model.measuring.report import facts, read_prompts, write_json  # noqa: E402
from model.trees.search import grow  # noqa: E402
from model.trees.tree import RankPath, Tree  # noqa: E402

RANKS = 8
SIZES = (1, 3, 5, 7, 11, 15, 23, 31)


def likeliest(probabilities: list[list[float]], n: int) -> set[RankPath]:
    """Return the n nodes of the greatest products along their paths; probabilities (K, R), best first."""
    chosen = set[RankPath]()
    heap: list[tuple[float, RankPath, float]] = [(-probabilities[0][0], (0,), 1.0)]
    while heap and len(chosen) < n:
        minus_p, path, above = heappop(heap)
        chosen.add(path)
        depth, rank = len(path), path[-1]
        if rank + 1 < RANKS:
            heappush(heap, (-above * probabilities[depth - 1][rank + 1], (*path[:-1], rank + 1), above))
        if depth < len(probabilities):
            heappush(heap, (minus_p * probabilities[depth][0], (*path, 0), -minus_p))
    return chosen


def right_path(guesses: npt.NDArray[np.int32], followers: npt.NDArray[np.int32]) -> RankPath:
    """Return the ranks of the tokens that did follow, as far down as they were among the guesses; (K, R) and (K,)."""
    path = list[int]()
    for ranked, token in zip(guesses.tolist(), followers.tolist(), strict=True):
        if token not in ranked:
            break
        path.append(ranked.index(token))
    return tuple(path)


def accepted(path: RankPath, nodes: set[RankPath]) -> int:
    """Return how deep the right path runs inside the tree."""
    return next((d for d in range(len(path)) if path[: d + 1] not in nodes), len(path))


@click.command()
@click.option("--tokens", default=160, help="New tokens per prompt.")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "benchmarks" / "results" / "confidence.json")
def main(tokens: int, out: Path) -> None:
    """Compare both kinds of trees at two temperatures."""
    engine = open_engine(Settings.load())
    k, rows = engine.n_heads, list[dict[str, Any]]()
    drafter = engine.drafter(Tree.chain(k), ranks=RANKS, with_probs=True)
    for temperature in (0.0, 0.8):
        halves: list[list[tuple[RankPath, list[list[float]]]]] = [[], []]
        with engine.decoder() as plain, engine.base(FixedPlan(Tree.chain(1))) as base:
            for i, prompt in enumerate(read_prompts(PROMPTS / "python.jsonl")):
                text = plain.start(engine.request(prompt, tokens, sampling=SamplingParams(temperature, seed=i)))
                text.run()
                states, behind = states_and_followers(base, text.slot.tokens, text.slot.prompt_length, k)
                guesses, probabilities = drafter.rank(states, behind[:, :-1])
                assert probabilities is not None
                for row in range(len(states)):
                    halves[i % 2].append((right_path(guesses[row], behind[row, 1:]), probabilities[row].tolist()))
        hits, tries = np.zeros((k, RANKS)), np.zeros(k)
        for path, _ in halves[0]:
            for depth in range(k):
                tries[depth] += 1
                if depth < len(path):
                    hits[depth, path[depth]] += 1
                if depth >= len(path) or path[depth]:  # below a best guess that was wrong nothing is counted
                    break
        order = grow(hits / np.maximum(tries, 1)[:, None], max(SIZES))
        for n in SIZES:
            fixed, choose_us, sums = set(order[:n]), list[float](), [0, 0]
            for path, table in halves[1]:
                since = perf_counter()
                nodes = likeliest(table, n)
                choose_us.append(1e6 * (perf_counter() - since))
                sums[0] += accepted(path, fixed)
                sums[1] += accepted(path, nodes)
            by_rate, by_confidence = (1 + s / len(halves[1]) for s in sums)
            rows.append({"temperature": temperature, "drafted": n, "by_rates": by_rate,
                         "by_confidence": by_confidence, "choose_us": median(choose_us)})  # fmt: skip
            click.echo(
                f"temperature {temperature}, {n:2d} nodes: {by_rate:.3f} tokens a step by rates, {by_confidence:.3f} "
                f"by confidence ({by_confidence / by_rate - 1:+.1%}), chosen in {median(choose_us):.0f} us"
            )
    write_json(out, {**facts(engine), "command": "python benchmarks/confidence.py", "rows": rows})


if __name__ == "__main__":
    main()
