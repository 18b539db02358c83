"""The report of a tuning: a table and a picture. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from model.planning.auto_tuning import Tuning
from model.storage.whole_file import whole_file
from model.trees.search import TreeChoice


def describe_tree(choice: TreeChoice) -> str:
    """Say what a tree is in a few words."""
    tree = choice.tree
    if len(tree) == 1:
        return "no draft"
    shape = f"tree, {tree.max_depth} deep"
    if len(tree.leaves) == 1:
        shape = f"chain of {tree.max_depth}"
    return f"{shape}, {len(tree) - 1} drafted"


def table(tuning: Tuning, choices: Sequence[TreeChoice], best: TreeChoice) -> str:
    """Return the curve and the best tree of each size as text."""
    curve = tuning.curve
    heads = "".join(f"  {context:5d} tokens  t(n)/t(1)" for context in curve.contexts)
    lines = [f"  n{heads}  acceptance length  expected speedup"]
    by_size = {len(choice.tree): choice for choice in choices}
    for n in curve.sizes:
        line = f"{n:3d}"
        for context in curve.contexts:
            line += (
                f"  {1e3 * curve.seconds_for(n, context):9.2f} ms  {curve.ratio(n, context):9.2f}"
            )
        if n in by_size:
            choice = by_size[n]
            mark = "  <- best" if len(best.tree) == n else ""
            line += f"  {choice.expected_length:17.2f}  {choice.speedup:15.2f}x{mark}"
        lines.append(line)
    if tuning.draft_s:
        times = ", ".join(f"{1e6 * s:.0f}" for s in tuning.draft_s)
        rates = ", ".join(f"{row[0]:.0%}" for row in tuning.accuracies)
        lines.append(f"drafting with 1 to {len(tuning.draft_s)} heads: {times} us a step")
        lines.append(
            f"acceptance rate of each head's first guess: {rates} (of {tuning.tokens} tokens)"
        )
    lines.append(f"best tree: {describe_tree(best)}, expected {best.speedup:.2f}x")
    return "\n".join(lines)


def draw(path: Path, tuning: Tuning, choices: Sequence[TreeChoice], best: TreeChoice) -> None:
    """Draw the cost of a step and the tokens per second by size. Raises OutputError."""
    from matplotlib.figure import Figure

    # What a step costs.
    curve = tuning.curve
    n_best = len(best.tree)
    figure = Figure(figsize=(11, 4), layout="constrained")
    cost, speed = figure.subplots(1, 2)
    for context in curve.contexts:
        ratios = [curve.ratio(n, context) for n in curve.sizes]
        cost.plot(curve.sizes, ratios, "o-", label=f"{context} tokens in the cache")
    cost.plot(curve.sizes, curve.sizes, ":", color="grey", label="no gain from a batch")
    cost.plot(
        [n_best],
        [curve.ratio(n_best, curve.contexts[0])],
        "*",
        color="C3",
        markersize=16,
        label="chosen",
    )
    cost.set(
        xlabel="nodes per step, with the root",
        ylabel="t(n) / t(1)",
        title="cost of a step",
        ylim=(0, None),
    )
    cost.legend(fontsize="small")

    # How fast each size is.
    sizes = [len(choice.tree) for choice in choices]
    speed.plot(
        sizes, [choice.tokens_per_s for choice in choices], "o-", label="best tree of each size"
    )
    speed.axhline(choices[0].tokens_per_s, linestyle=":", color="grey", label="plain decoding")
    speed.plot([n_best], [best.tokens_per_s], "*", color="C3", markersize=16, label="chosen")
    speed.set(
        xlabel="nodes per step, with the root",
        ylabel="expected tokens/s",
        title="speed of the best trees",
        ylim=(0, None),
    )
    speed.legend(fontsize="small")
    with whole_file(path) as draft:
        figure.savefig(draft, format="png", dpi=110)
