"""The command verify: the proofs that drafting does not change the output, with their controls.

Knows options and messages; the proofs are in model/evaluation/.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from commands.common import (
    load_model,
    make_requests,
    prompts_option,
    read_prompts,
    template_option,
)
from config import Settings
from model.decoding.sampling import SamplingParams
from model.errors import UsageError
from model.evaluation.proofs import Case
from model.evaluation.report import check_writable, facts, write_json
from model.loaded_model import LoadedModel
from model.trees.tree import Tree

TEMPERATURES = (0.0, 0.8)
N_CONTROLLED = 3  # prompts for the negative controls


@click.command()
@prompts_option
@template_option
@click.option(
    "--n_prompts",
    default=8,
    type=click.IntRange(1),
    help="Use only so many prompts, of each kind in turn.",
)
@click.option(
    "--max_tokens", default=96, type=click.IntRange(16), help="Most new tokens per prompt."
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    help="Write all figures to this file.",
)
def verify(
    prompts: Path | None,
    chat_template: str,
    n_prompts: int,
    max_tokens: int,
    json_path: Path | None,
) -> None:
    """Prove that drafting does not change the output, and that the proof detects planted faults.

    Exits with status 1 where a proof fails or a fault goes undetected.
    """
    from model.evaluation.negative_controls import negative_controls
    from model.evaluation.proofs import prove

    check_writable(json_path)
    loaded = load_model(Settings.load())
    tasks, template = read_prompts(loaded, prompts, chat_template, n_prompts)
    bushy = bushy_tree(loaded)
    trees = [Tree.chain(min(3, max_depth(loaded))), bushy]

    if loaded.heads_path is None:
        click.echo(
            f"no heads for {loaded.file.name}: other drafters are put to the proof", err=True
        )

    # The proofs: each tree and drafter, at each temperature.
    cases: list[dict[str, Any]] = []
    for temperature in TEMPERATURES:
        sampling = SamplingParams(temperature=temperature)
        requests = make_requests(loaded, tasks, template, max_tokens, sampling)
        for case in prove(loaded, requests, trees):
            click.echo(f"{mark(case.holds)} temperature {temperature}, {describe_case(case)}")
            cases.append({"temperature": temperature, **asdict(case), "holds": case.holds})

    # The controls: each planted fault has to be detected.
    controlled = tasks[:N_CONTROLLED]
    greedy = make_requests(loaded, controlled, template, max_tokens, SamplingParams())
    controls = negative_controls(loaded, greedy, bushy)
    for name, answers in controls.items():
        click.echo(f"{mark(any(answers))} control, {describe_control(name, answers)}")

    # The verdict.
    detected = all(any(answers) for answers in controls.values())
    holds = detected and all(case["holds"] for case in cases)
    if json_path:
        result = {"holds": holds, "cases": cases, "controls": controls}
        write_json(json_path, {**facts(loaded), **result})
    if not holds:
        click.echo("a proof failed or a planted fault was not detected", err=True)
        sys.exit(1)


def mark(holds: bool) -> str:
    """Return the first word of a line."""
    return "ok  " if holds else "FAIL"


def describe_case(case: Case) -> str:
    """Return the figures of a case."""
    chains = ""
    if case.chains_equal is not None:
        chains = f"bit-equal chains {case.chains_equal}/{case.sequences}, "
    return (
        f"{case.name}: replayed {case.replayed}/{case.sequences} "
        f"(largest difference {case.worst_difference:.1f} noise floors), {chains}"
        f"equal to plain decoding {case.plain_equal}/{case.sequences}, "
        f"acceptance length {case.acceptance_length:.2f}"
    )


def describe_control(name: str, answers: list[str]) -> str:
    """Say in how many sequences a fault was detected, and how."""
    how = [answer for answer in answers if answer]
    detected = f"detected in {len(how)}/{len(answers)} sequences"
    return f"{name}: {detected} ({'; '.join(how) or 'not at all'})"


def max_depth(loaded: LoadedModel) -> int:
    """Return how deep a tree may be; without heads other drafters draft it, as deep as any."""
    limit = loaded.options.max_nodes - 1
    return loaded.n_heads if loaded.heads_path is not None else limit


def bushy_tree(loaded: LoadedModel) -> Tree:
    """Return a tree with siblings at every depth, as large as heads and limit allow."""
    for widths in ([3, 2, 2], [2, 2, 2], [2, 2], [2]):
        tree = Tree.product(widths)
        if tree.max_depth <= max_depth(loaded) and len(tree) <= loaded.options.max_nodes:
            return tree
    raise UsageError("verify needs a tree of 3 nodes or more; raise MEDUSA_MAX_TOKENS_PER_STEP")
