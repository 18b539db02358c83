"""The report of a comparison of speed: a table and a picture, by kind of task. Measures nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.storage.whole_file import whole_file

Figures = dict[str, Any]  # of some requests, as `figures.speed_figures` returns them
OVERALL = "overall"
UNSTEADY = 1.3  # times as fast in one run as in another: then the table says so
TABLE_DEPTHS = 4  # columns of acceptance by depth
ENOUGH_NODES = 20  # drafted ones: rates of fewer are not drawn


def rows_of(result: Figures) -> dict[str, Figures]:
    """Return the rows of a comparison: one for each kind of task if there are several, and all."""
    kinds = result["by_kind"] if len(result["by_kind"]) > 1 else {}
    return {**kinds, OVERALL: result}


def table(rows: Mapping[str, Figures], label: str = "kind") -> str:
    """Return figures as text, a line for each name.

    label: what the names are. Columns of draft sources and depths are there where something was
    drafted.
    """
    sources = list(dict.fromkeys(source for row in rows.values() for source in row["by_source"]))
    depths = max(len(row["acceptance_rate_per_depth"]) for row in rows.values())
    shown_depths = range(min(depths, TABLE_DEPTHS))
    header = [label, "prompts", "plain tok/s", "drafted tok/s", "speedup", "tokens/step"]
    header += ["drafted/step", *sources, *(f"depth {depth + 1}" for depth in shown_depths)]
    header += ["same output", "repeated 8-grams"]
    cells = [header]
    for name, row in rows.items():
        rates = row["acceptance_rate_per_depth"]
        cells.append(
            [
                name,
                str(row["sequences"]),
                f"{row['plain']['tokens_per_s']:.1f}",
                f"{row['drafted']['tokens_per_s']:.1f}",
                f"{row['speedup']:.2f}x",
                f"{row['acceptance_length']:.2f}",
                f"{row['tree_nodes'] - 1:.1f}",
                *(_accepted_of(row, source) for source in sources),
                *(f"{rates[d]:.0%}" if d < len(rates) else "-" for d in shown_depths),
                f"{row['equal_sequences']}/{row['sequences']}",
                f"{row['repeated_8grams']:.0%}",
            ]
        )
    lines = _aligned(cells)
    if sources:
        columns = ", ".join([*sources, "depth"])
        lines.append(f"{columns}: share of the drafted tokens that was accepted")
    return "\n".join([*lines, *_warnings(rows)])


def _accepted_of(row: Figures, source: str) -> str:
    counts = row["by_source"].get(source)
    if not counts or not counts["drafted"]:
        return "-"
    return f"{counts['accepted'] / counts['drafted']:.0%}"


def _aligned(cells: list[list[str]]) -> list[str]:
    """Return lines of cells, the first of each on the left, the others on the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]


def _warnings(rows: Mapping[str, Figures]) -> list[str]:
    """Say what a reader of the figures has to know."""
    lines = []
    unsteady = {
        name: row["speedup_by_run"]
        for name, row in rows.items()
        if max(row["speedup_by_run"]) > UNSTEADY * min(row["speedup_by_run"])
    }
    if unsteady:
        spans = ", ".join(
            f"{name} {min(runs):.2f} to {max(runs):.2f}" for name, runs in unsteady.items()
        )
        lines.append(
            f"The runs differ (speedups of {spans}): was the machine busy with other work?"
        )
    if any(row["equal_sequences"] < row["sequences"] for row in rows.values()):
        lines.append(
            "Outputs that are not the same differ from a near-tie on, where the shape of a batch "
            "decides (`main.py verify`)."
        )
    return lines


def draw(path: Path, rows: Mapping[str, Figures], title: str) -> None:
    """Draw the speedup by kind, and the acceptance rate by depth. Raises OutputError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title)
    speed, acceptance = figure.subplots(1, 2)

    # The speedup of each kind, with the span of its runs.
    names = list(rows)
    speedups = [row["speedup"] for row in rows.values()]
    below = [row["speedup"] - min(row["speedup_by_run"]) for row in rows.values()]
    above = [max(row["speedup_by_run"]) - row["speedup"] for row in rows.values()]
    colours = ["C7" if name == OVERALL else "C0" for name in names]
    bars = speed.bar(names, speedups, yerr=[below, above], color=colours, capsize=4)
    speed.bar_label(bars, fmt="%.2f", label_type="center", color="white")
    speed.axhline(1.0, linestyle=":", color="black")
    speed.set(title="speedup (median and span of the runs)", ylabel="times plain decoding's speed")
    speed.tick_params(axis="x", rotation=20)

    # How often drafts of each depth were right.
    for name, row in rows.items():
        rates = row["acceptance_rate_per_depth"]
        drafted = row["drafted_per_depth"]
        depths = [depth for depth, nodes in enumerate(drafted) if nodes >= ENOUGH_NODES]
        if depths:
            style = {"color": "black", "linewidth": 2.5} if name == OVERALL else {}
            xs = [depth + 1 for depth in depths]
            acceptance.plot(xs, [rates[depth] for depth in depths], "o-", label=name, **style)
    acceptance.set(
        title="acceptance rate by depth", xlabel="depth of the draft token", ylim=(0, 1.02)
    )
    if acceptance.lines:
        acceptance.legend(fontsize="small")
    else:
        acceptance.text(0.5, 0.5, "hardly anything was drafted", ha="center")
    with whole_file(path) as draft:
        figure.savefig(draft, format="png", dpi=110)
