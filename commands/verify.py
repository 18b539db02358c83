"""The proofs that drafting leaves the text alone."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from commands.common import (
    open_engine,
    prompts_option,
)
from config import Settings
from model.decoding.sampling import SamplingParams
from model.engine import Engine
from model.errors import UsageError
from model.measuring.report import check_writable, facts, read_prompts, write_json
from model.trees.tree import Tree


@click.command()
@prompts_option
@click.option("--n_prompts", default=8, type=click.IntRange(1), help="Use the first so many.")
@click.option("--max_tokens", default=96, type=click.IntRange(16), help="New tokens per text at the most.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures here.")
def verify(prompts: Path, n_prompts: int, max_tokens: int, json_path: Path | None) -> None:
    """Prove that drafting leaves the text alone, and that the proof would notice if it did not."""
    from model.measuring.faults import controls
    from model.measuring.proofs import prove

    check_writable(json_path)
    engine = open_engine(Settings.load())
    texts = read_prompts(prompts)[:n_prompts]
    trees = [Tree.chain(min(3, engine.n_heads)), bushy_tree(engine)]
    cases: list[dict[str, Any]] = []
    for temperature in (0.0, 0.8):
        requests = [
            engine.request(t, max_tokens, sampling=SamplingParams(temperature, seed=i)) for i, t in enumerate(texts)
        ]
        for case in prove(engine, requests, trees):
            chains = "" if case.chains_equal is None else f"bit-equal chains {case.chains_equal}/{case.texts}, "
            click.echo(
                f"{'ok  ' if case.holds else 'FAIL'} temperature {temperature}, {case.name}: replayed "
                f"{case.replayed}/{case.texts} (off by {case.worst_difference:.1f} noise floors), {chains}equal to "
                f"plain {case.plain_equal}/{case.texts}, {case.acceptance_length:.2f} tokens a step"
            )
            cases.append({"temperature": temperature, **asdict(case), "holds": case.holds})
    noticed = controls(engine, [engine.request(t, max_tokens) for t in texts[:3]], trees[1])
    for name, answers in noticed.items():
        caught = [answer for answer in answers if answer]
        click.echo(
            f"{'ok  ' if caught else 'FAIL'} control, {name}: noticed in {len(caught)}/{len(answers)} texts "
            f"({'; '.join(caught) or 'not at all'})"
        )
    held = all(c["holds"] for c in cases) and all(any(answers) for answers in noticed.values())
    if json_path:
        write_json(json_path, {**facts(engine), "holds": held, "cases": cases, "controls": noticed})
    if not held:
        click.echo("a proof failed or a fault went unnoticed", err=True)
        sys.exit(1)


def bushy_tree(engine: Engine) -> Tree:
    """Return a tree with siblings at every depth, as large as heads and limit allow."""
    for widths in ([3, 2, 2], [2, 2, 2], [2, 2], [2]):
        tree = Tree.product(widths)
        if tree.max_depth <= engine.n_heads and len(tree) <= engine.options.max_nodes:
            return tree
    raise UsageError("verify needs a tree of 3 nodes or more; raise MEDUSA_MAX_TOKENS_PER_STEP")
