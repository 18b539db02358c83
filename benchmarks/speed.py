"""The whole comparison: one behaviour at several costs, plain against drafted, and as predicted.

    python benchmarks/speed.py                                # make bench: all types, T 0 and 0.8
    python benchmarks/speed.py --what worst --types q4_0      # useless heads, unusual prompts
    python benchmarks/speed.py --what sweep --types bf16      # every tree size beside the tuned one
    python benchmarks/speed.py --what copying --types bf16    # a part of the prompt comes once more
    python benchmarks/speed.py --others --types q4_0          # llama-cpp-python's own loop too
    python benchmarks/speed.py --against build/heads          # other heads take turns too

The model is the one of scale_up.py: it generates what the bundled model does, at the cost of 1 B
parameters. Plain decoding has a context of its own; it and all that drafts take turns in one
process. Writes speed.json and speed.md under benchmarks/results/ after every type and temperature;
others that were measured there in the same way stay, so that an hour's run can be made in parts.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
    sys.path[0] = str(ROOT)

import click  # noqa: E402

from benchmarks.peers import peer_rates  # noqa: E402
from benchmarks.speed_cases import best_tree, cases, describe_fixed, requests_for  # noqa: E402
from benchmarks.speed_table import COLUMNS, TYPES, cells, with_all_keys, write  # noqa: E402
from config import Settings  # noqa: E402
from model.base.gguf_file import GGUFFile  # noqa: E402
from model.base.known_models import BUNDLED  # noqa: E402
from model.decoding.request import Request  # noqa: E402
from model.evaluation.report import facts  # noqa: E402
from model.evaluation.scaled_model import build, grow_heads  # noqa: E402
from model.evaluation.speed import compare  # noqa: E402
from model.loaded_model import LoadedModel, LoadOptions  # noqa: E402
from model.planning.auto_tuning import Tuning, measure  # noqa: E402
from model.planning.measured_steps import step_curve  # noqa: E402
from model.trees.costs import CostCurve  # noqa: E402
from model.trees.slices import finish  # noqa: E402

BUDGET_S = 20.0  # seconds for the curve: the median of three rounds is off by up to a tenth
MAX_NODES = 32


@dataclass(frozen=True, kw_only=True)
class Amount:
    """What is measured, on how many prompts, with how many new tokens, how often."""

    what: str
    shape: str
    n_prompts: int
    max_tokens: int
    runs: int


def measure_rows(
    loaded: LoadedModel,
    amount: Amount,
    temperature: float,
    against: LoadedModel | None,
    **labels: Any,
) -> list[dict[str, Any]]:
    """Measure one model at one temperature.

    against: the same model with other heads, whose best tree takes turns.
    """
    trial = requests_for(loaded, "trial", temperature, 5, 64)
    tuning = finish(measure(loaded, trial, heads=True, budget_s=BUDGET_S))
    rows = list[dict[str, Any]]()
    for kind, decoders in cases(loaded, tuning, amount.what):
        tunings = dict.fromkeys(decoders, tuning)
        if against is not None:
            other = finish(
                measure(against, trial, heads=True, budget_s=BUDGET_S, curve=tuning.curve)
            )
            tree = best_tree(against, other)
            if len(tree) > 1:
                label = f" of --against ({against.heads.config.head_type})"
                decoders[describe_fixed(tree, label)] = against.fixed_decoder(tree)
                tunings[describe_fixed(tree, label)] = other
        requests = requests_for(loaded, kind, temperature, amount.n_prompts, amount.max_tokens)
        with ExitStack() as stack:
            for decoder in decoders.values():
                stack.enter_context(decoder)
            results = compare(loaded, requests, *decoders.values(), runs=amount.runs)
        later = finish(step_curve(loaded, BUDGET_S))
        for name, result in zip(decoders, results, strict=True):
            row = {**labels, "temperature": temperature, "prompts": kind, "drafted_by": name}
            row |= figures(result, requests, tunings[name], later)
            rows.append(with_all_keys(row))
            click.echo(cells(rows[-1]))
    return rows


def figures(
    result: dict[str, Any], requests: list[Request], tuning: Tuning, later: CostCurve
) -> dict[str, Any]:
    """Return the figures of one decoder, with the speedup predicted for the steps that it made.

    By the tuning's curve, measured before, and one measured after: the mean of both.
    """
    lengths = [len(request.prompt) + (request.max_tokens or 0) / 2 for request in requests]
    context = mean(lengths)
    steps = sum(result["steps_by_nodes"].values())
    emitted = round(result["acceptance_length"] * steps)
    expected = mean(
        each.expected_speedup(result["steps_by_nodes"], emitted, result["steps_by_depth"], context)
        for each in (tuning, replace(tuning, curve=later))
    )
    step_us = sum(result["stages_us"].values())
    kept = {key: value for key, value in result.items() if key != "text_pairs"}
    return {
        "plain_tokens_per_s": result["plain"]["tokens_per_s"],
        "drafted_tokens_per_s": result["drafted"]["tokens_per_s"],
        "expected_speedup": expected,
        "of_expected": result["speedup"] / expected,
        "nodes": result["tree_nodes"],
        "draft_share": result["stages_us"]["draft"] / step_us,
        "equal": f"{result['equal_sequences']}/{result['sequences']}",
        **kept,
        "tuning": tuning.to_json(),
        "later_curve": later.to_json(),
    }


def peer_rows(loaded: LoadedModel, amount: Amount, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure llama-cpp-python on the prompts of a row."""
    requests = requests_for(
        loaded, row["prompts"], row["temperature"], amount.n_prompts, amount.max_tokens
    )
    empty = {key: "" for key, _ in COLUMNS}
    labels = {key: row[key] for key in ("type", "temperature", "prompts", "command")}
    plain, rates = peer_rates(loaded, requests)
    rows = list[dict[str, Any]]()
    for name, rate in rates.items():
        measured = {
            "drafted_by": name,
            "plain_tokens_per_s": plain,
            "drafted_tokens_per_s": rate,
            "speedup": rate / plain,
        }
        rows.append(with_all_keys({**empty, **labels, **measured}))
        click.echo(cells(rows[-1]))
    return rows


def load_pair(
    kind: str, shape: str, options: LoadOptions, against: Path | None
) -> tuple[LoadedModel, LoadedModel | None]:
    """Load the model of a type, and once more with the heads of --against, where there are some."""
    model = BUNDLED
    heads = None
    if shape != "tiny":
        main_type, _, output_type = kind.partition("+")
        scaled = build(shape, main_type.upper(), output_type.upper() or None)
        model = scaled.model
        heads = scaled.heads
    loaded = LoadedModel(model, options, heads_path=heads)
    if against is None:
        return loaded, None
    if shape != "tiny":
        grown = model.with_suffix(".against")
        grow_heads(against, GGUFFile(BUNDLED), GGUFFile(model), grown)
        against = grown
    return loaded, LoadedModel(model, options, heads_path=against)


@click.command()
@click.option(
    "--types",
    default=",".join(TYPES),
    show_default=True,
    help="TYPE or TYPE+OUTPUT_TYPE, with commas.",
)
@click.option("--temperatures", default="0,0.8", show_default=True)
@click.option(
    "--shape",
    default="1b",
    show_default=True,
    help="Of scale_up.py; tiny: the bundled model itself.",
)
@click.option("--n_prompts", default=12, show_default=True)
@click.option("--max_tokens", default=160, show_default=True)
@click.option(
    "--runs", default=1, show_default=True, help="How often each decoder continues every prompt."
)
@click.option("--what", type=click.Choice(["usual", "worst", "sweep", "copying"]), default="usual")
@click.option(
    "--others/--no-others", "with_others", help="Time llama-cpp-python's own decoding too."
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="A folder of other heads for the bundled model.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Without suffix; default: benchmarks/results/speed…",
)
def main(
    types: str,
    temperatures: str,
    with_others: bool,
    against: Path | None,
    out: Path | None,
    **amounts: Any,
) -> None:
    """Measure every type at every temperature."""
    settings = Settings.load()
    amount = Amount(**amounts)
    name = "speed" if amount.what == "usual" else f"speed_{amount.what}"
    out = out or ROOT / "benchmarks" / "results" / name
    options = LoadOptions(
        n_threads=settings.n_threads,
        context_size=settings.model_context_size,
        n_gpu_layers=settings.n_gpu_layers,
        max_nodes=MAX_NODES,
    )
    rows = list[dict[str, Any]]()
    for kind in types.split(",") if amount.shape != "tiny" else [""]:
        loaded, rival = load_pair(kind, amount.shape, options, against)
        about = {**facts(loaded), **asdict(amount)}
        labels = {key: about.pop(key) for key in ("model", "quantization")}
        labels["type"] = kind or loaded.file.file_type
        about.pop("command")
        labels["command"] = " ".join(["python", "benchmarks/speed.py", *sys.argv[1:]])
        for temperature in map(float, temperatures.split(",")):
            rows += measure_rows(loaded, amount, temperature, rival, **labels)
            if with_others:
                rows += peer_rows(loaded, amount, rows[-1])
            write(out, about, rows)
        loaded.close()
        if rival is not None:
            rival.close()


if __name__ == "__main__":
    main()
