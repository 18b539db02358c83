"""The whole comparison: one behaviour at several costs, plain against drafted, measured beside what was predicted.

    python benchmarks/speed.py                      # make bench: all types, temperatures 0 and 0.8
    python benchmarks/speed.py --types bf16 --temperatures 0

The model is the one of scale_up.py: it writes what the bundled model writes, at the cost of 1 B parameters. Plain
decoding has a context of its own; both take turns in one process. Writes speed.json and speed.md under
benchmarks/results/, after every case.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.path[0] = str(ROOT)

import click  # noqa: E402

from benchmarks.scale_up import BUNDLED, build  # noqa: E402
from config import HEADS_FOLDER, Settings  # noqa: E402
from model.decoding.generation import Request  # noqa: E402
from model.decoding.sampling import SamplingParams  # noqa: E402
from model.engine import Decoder, Engine, EngineOptions  # noqa: E402
from model.measuring.report import facts, read_prompts, write_json  # noqa: E402
from model.measuring.speed import compare  # noqa: E402
from model.measuring.tuning import Tuning, live_decoder, measure  # noqa: E402

PROMPTS = ROOT / "benchmarks" / "prompts"
TYPES = ("bf16", "q4_0+q4_0", "q4_0", "q4_k_m")  # type, + the LM head's where it differs from llama.cpp's choice
COLUMNS = (
    ("type", "type"), ("temperature", "T"), ("who", "drafted by"), ("plain_tokens_per_s", "plain tok/s"),
    ("medusa_tokens_per_s", "drafted tok/s"), ("speedup", "speedup"), ("expected_speedup", "predicted"),
    ("acceptance_length", "tokens a step"), ("nodes", "nodes a step"), ("draft_share", "drafting"),
    ("repeated_8grams", "looping 8-grams"), ("equal", "same text"),
)  # fmt: skip


def requests_for(engine: Engine, file: str, temperature: float, n: int, tokens: int) -> list[Request]:
    """Return requests for the first prompts of a file, each with a seed of its own.

    "copying": a text of the held-out ones, and its beginning once more, which the model is to go on with.
    """
    if file == "copying":
        prompts = [f"{p}\n\n\n{p[: len(p) // 3]}" for p in read_prompts(PROMPTS / "python.jsonl")[:n]]
    else:
        prompts = read_prompts(PROMPTS / f"{file}.jsonl")[:n]
    return [engine.request(p, tokens, sampling=SamplingParams(temperature, seed=i)) for i, p in enumerate(prompts)]


def measured(
    engine: Engine, requests: list[Request], decoder: Decoder, tuning: Tuning, runs: int, **labels: Any
) -> dict[str, Any]:
    """Compare one way to draft with plain decoding; return a row for the table."""
    with decoder:
        result = compare(engine, requests, decoder, runs=runs)
    del result["text_pairs"]
    steps, length = sum(result["steps_by_nodes"].values()), result["acceptance_length"]
    context = sum(len(r.prompt) + r.max_tokens / 2 for r in requests) / len(requests)
    step_us = sum(result[f"{part}_us"] for part in ("draft", "decode", "verify", "other"))
    return {
        **labels,
        "plain_tokens_per_s": result["plain"]["tokens_per_s"],
        "medusa_tokens_per_s": result["medusa"]["tokens_per_s"],
        "expected_speedup": tuning.expected_speedup(
            result["steps_by_nodes"], round(length * steps), result["head_steps"], context
        ),
        "nodes": result["tree_nodes"],
        "draft_share": result["draft_us"] / step_us,
        "equal": f"{result['equal_sequences']}/{result['sequences']}",
        **result,
    }


def cases(engine: Engine, tuning: Tuning, ngrams_only: Tuning) -> dict[str, Decoder]:
    """Return the ways to draft: the best tree in every step, and the live plan with each kind and both."""
    best = tuning.best(tuning.curve.contexts[0], engine.options.max_nodes)
    ways = {} if len(best.tree) == 1 else {f"heads, {len(best.tree) - 1} fixed": engine.decoder(best.tree)}
    return ways | {
        "heads": live_decoder(engine, tuning, ngrams=False),
        "text so far": live_decoder(engine, ngrams_only, ngrams=True),
        "both": live_decoder(engine, tuning, ngrams=True),
    }


def markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the rows as a Markdown table under a line of facts."""
    lines = [f"{about['machine']}, {about['threads']} threads, {about['versions']}. `{about['command']}`", ""]
    lines += ["| " + " | ".join(title for _, title in COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        cells = [f"{row[key]:.2f}" if isinstance(row[key], float) else str(row[key]) for key, _ in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--types", default=",".join(TYPES), show_default=True, help="TYPE or TYPE+OUTPUT_TYPE, with commas.")
@click.option("--temperatures", default="0,0.8", show_default=True)
@click.option("--shape", default="1b", show_default=True, help="Of scale_up.py; tiny: the bundled model itself.")
@click.option("--n_prompts", default=12, show_default=True)
@click.option("--max_tokens", default=160, show_default=True)
@click.option("--runs", default=1, show_default=True, help="How often every text is written each way.")
@click.option("--copying", is_flag=True, help="Prompts that hold a file which is being written once more.")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "benchmarks" / "results" / "speed")
def main(
    types: str, temperatures: str, shape: str, n_prompts: int, max_tokens: int, runs: int, copying: bool, out: Path
) -> None:
    """Measure every type at every temperature."""
    settings, rows = Settings.load(), list[dict[str, Any]]()
    options = EngineOptions(settings.n_threads, settings.model_context_size, settings.n_gpu_layers, max_nodes=32)
    for kind in types.split(",") if shape != "tiny" else [""]:
        model, heads = BUNDLED, None
        if shape != "tiny":
            main_type, _, output_type = kind.partition("+")
            scaled = build(shape, main_type.upper(), output_type.upper() or None)
            model, heads = scaled.model, scaled.heads
        engine = Engine(model, options, heads, HEADS_FOLDER)
        for temperature in map(float, temperatures.split(",")):
            file = "copying" if copying else "python"
            requests = requests_for(engine, file, temperature, n_prompts, max_tokens)
            trial = requests_for(engine, "trial", temperature, 5, 64)
            tuning = measure(engine, trial, heads=True, budget_s=4.0)
            for who, decoder in cases(engine, tuning, replace(tuning, draft_s=[], accuracies=[])).items():
                labels = {"type": kind or engine.file.file_type, "temperature": temperature, "who": who}
                rows.append(measured(engine, requests, decoder, tuning, runs, **labels))
                click.echo(markdown(rows[-1:], facts(engine)).splitlines()[-1])
                about = {**facts(engine), "command": " ".join(["python", "benchmarks/speed.py", *sys.argv[1:]])}
                write_json(out.with_suffix(".json"), {**about, "shape": shape, "rows": rows})
                out.with_suffix(".md").write_text(markdown(rows, about), encoding="utf-8")
        engine.model.close()


if __name__ == "__main__":
    main()
