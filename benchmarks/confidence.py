"""Would trees that follow the heads' own confidence gain more than the fixed one? Simulated.

    python benchmarks/confidence.py

At each position of what the model itself generates, the n likeliest nodes by the heads'
probabilities (EAGLE-2's way, arXiv 2406.16858) are held against the n likeliest by measured
acceptance rates, which are the same everywhere. Rates come from one half of the sequences, tokens
per step are counted on the other. Also times the choice of nodes, which a step would pay for on
top of the softmax. Nothing is verified here.
"""

from __future__ import annotations

import collections.abc as abc
import os
import sys
from heapq import heappop, heappush
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
    sys.path[0] = str(ROOT)

import click  # noqa: E402
import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402

from commands.common import load_model  # noqa: E402
from config import Settings  # noqa: E402
from model.decoding.draft_policy import FixedPolicy  # noqa: E402
from model.decoding.drafters.drafter import RankingDrafter  # noqa: E402
from model.decoding.sampling import SamplingParams  # noqa: E402
from model.evaluation.report import facts, write_json  # noqa: E402
from model.loaded_model import LoadedModel  # noqa: E402
from model.planning.measured_acceptance import states_and_followers  # noqa: E402
from model.planning.prompt_files import PYTHON, read_prompt_file  # noqa: E402
from model.trees.search import grow  # noqa: E402
from model.trees.slices import finish  # noqa: E402
from model.trees.tree import RankPath, Tree  # noqa: E402

RANKS = 8
SIZES = (1, 3, 5, 7, 11, 15, 23, 31)


class Position(NamedTuple):
    """A token that was generated: the ranks of those behind it, and all guesses' probabilities."""

    right: RankPath
    probabilities: list[list[float]]  # (K, R), best first


def likeliest(probabilities: list[list[float]], n: int) -> set[RankPath]:
    """Return the n nodes of the greatest products along their paths.

    probabilities: (K, R), best first.
    """
    chosen = set[RankPath]()
    # The probability of a path (negative: the heap gives the smallest), and of its parent.
    heap: list[tuple[float, RankPath, float]] = [(-probabilities[0][0], (0,), 1.0)]
    while heap and len(chosen) < n:
        minus_p, path, parent_p = heappop(heap)
        chosen.add(path)
        depth = len(path)
        rank = path[-1] + 1
        if rank < RANKS:
            sibling_p = parent_p * probabilities[depth - 1][rank]
            heappush(heap, (-sibling_p, (*path[:-1], rank), parent_p))
        if depth < len(probabilities):
            heappush(heap, (minus_p * probabilities[depth][0], (*path, 0), -minus_p))
    return chosen


def right_path(guesses: npt.NDArray[np.int32], followers: npt.NDArray[np.int32]) -> RankPath:
    """Return the ranks of the tokens that did follow, as far down as they were guessed.

    guesses: (K, R); followers: (K,).
    """
    path = list[int]()
    for ranked, token in zip(guesses.tolist(), followers.tolist(), strict=True):
        if token not in ranked:
            break
        path.append(ranked.index(token))
    return tuple(path)


def accepted(path: RankPath, nodes: set[RankPath]) -> int:
    """Return how deep the right path runs inside the tree."""
    for depth in range(len(path)):
        if path[: depth + 1] not in nodes:
            return depth
    return len(path)


def positions(
    loaded: LoadedModel, drafter: RankingDrafter, temperature: float, max_tokens: int
) -> list[list[Position]]:
    """Generate without drafts; return the positions of each sequence."""
    found = list[list[Position]]()
    with loaded.fixed_decoder() as plain, loaded.new_base(FixedPolicy(Tree.chain(1))) as base:
        for i, prompt in enumerate(read_prompt_file(PYTHON)):
            sampling = SamplingParams(temperature=temperature, seed=i)
            sequence = plain.run(loaded.request(prompt, max_tokens, sampling))
            states, followers = finish(
                states_and_followers(base, sequence.tokens, sequence.n_prompt, loaded.n_heads)
            )
            guesses, probabilities = drafter.rank(states, followers[:, :-1])
            assert probabilities is not None
            found.append(
                [
                    Position(right_path(guesses[row], followers[row, 1:]), table.tolist())
                    for row, table in enumerate(probabilities)
                ]
            )
    return found


def acceptance_rates(sample: abc.Iterable[Position], k_heads: int) -> npt.NDArray[np.float64]:
    """Return how often each guess was right where the best ones before it were, (K, R)."""
    hits = np.zeros((k_heads, RANKS))
    tries = np.zeros(k_heads)
    for position in sample:
        path = position.right
        for depth in range(k_heads):
            tries[depth] += 1
            if depth < len(path):
                hits[depth, path[depth]] += 1
            if depth >= len(path) or path[depth]:  # below a wrong best guess nothing is counted
                break
    return hits / np.maximum(tries, 1)[:, None]


def compare(sample: list[Position], order: list[RankPath], n: int) -> dict[str, Any]:
    """Return the tokens per step of both kinds of trees of n nodes; choose_us: of one choice."""
    fixed = set(order[:n])
    choose_us = list[float]()
    by_rates = 0
    by_confidence = 0
    for path, probabilities in sample:
        began = perf_counter()
        nodes = likeliest(probabilities, n)
        choose_us.append(1e6 * (perf_counter() - began))
        by_rates += accepted(path, fixed)
        by_confidence += accepted(path, nodes)
    return {
        "drafted": n,
        "by_rates": 1 + by_rates / len(sample),
        "by_confidence": 1 + by_confidence / len(sample),
        "choose_us": median(choose_us),
    }


def describe(row: dict[str, Any]) -> str:
    """Return a row as a line of text."""
    gain = row["by_confidence"] / row["by_rates"] - 1
    return (
        f"temperature {row['temperature']}, {row['drafted']:2d} nodes: {row['by_rates']:.3f} "
        f"tokens a step by rates, {row['by_confidence']:.3f} by confidence ({gain:+.1%}), "
        f"chosen in {row['choose_us']:.0f} us"
    )


@click.command()
@click.option("--max_tokens", "--tokens", default=160, help="New tokens per prompt.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=ROOT / "benchmarks" / "results" / "confidence.json",
)
def main(max_tokens: int, out: Path) -> None:
    """Compare both kinds of trees at two temperatures."""
    loaded = load_model(Settings.load())
    drafter = loaded.heads_drafter(Tree.chain(loaded.n_heads), ranks=RANKS, with_probs=True)
    rows = list[dict[str, Any]]()
    for temperature in (0.0, 0.8):
        sequences = positions(loaded, drafter, temperature, max_tokens)
        first_half = [position for sequence in sequences[::2] for position in sequence]
        second_half = [position for sequence in sequences[1::2] for position in sequence]
        order = grow(acceptance_rates(first_half, loaded.n_heads), max(SIZES))
        for n in SIZES:
            rows.append({"temperature": temperature, **compare(second_half, order, n)})
            click.echo(describe(rows[-1]))
    command = " ".join(["python", "benchmarks/confidence.py", *sys.argv[1:]])
    write_json(out, {**facts(loaded), "command": command, "rows": rows})


if __name__ == "__main__":
    main()
