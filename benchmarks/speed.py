"""The whole comparison: one behaviour at several costs, plain against drafted, measured beside what was predicted.

    python benchmarks/speed.py                                    # make bench: all types, temperatures 0 and 0.8
    python benchmarks/speed.py --what worst --types q4_0          # useless heads, foreign text, long prompts
    python benchmarks/speed.py --what sweep --types bf16          # every size beside the tuned one
    python benchmarks/speed.py --what copying --types bf16        # a text of the prompt is written once more
    python benchmarks/speed.py --what others --types q4_0         # llama-cpp-python's own loop and prompt lookup

The model is the one of scale_up.py: it writes what the bundled model writes, at the cost of 1 B parameters. Plain
decoding has a context of its own; both take turns in one process. Writes speed.json and speed.md under
benchmarks/results/, after every case.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.path[0] = str(ROOT)

import click  # noqa: E402
import llama_cpp  # noqa: E402
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding  # noqa: E402

from benchmarks.scale_up import BUNDLED, build  # noqa: E402
from config import HEADS_FOLDER, Settings  # noqa: E402
from model.decoding.drafting import RandomDrafter  # noqa: E402
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


def prompts_for(engine: Engine, what: str) -> list[str]:
    """Return the texts to go on with."""
    held_out = read_prompts(PROMPTS / "python.jsonl")
    if what == "copying":  # a text, and its beginning once more
        return [f"{p}\n\n\n{p[: len(p) // 3]}" for p in held_out]
    if what == "foreign":  # English, for a model of Python
        return [t for t in (ROOT / "README.md").read_text(encoding="utf-8").split("\n\n") if len(t) > 200]
    if what == "long":
        return ["\n\n\n".join(held_out[i : i + 4]) for i in range(0, len(held_out), 2)]
    return read_prompts(PROMPTS / "trial.jsonl") if what == "trial" else held_out


def requests_for(engine: Engine, what: str, temperature: float, n: int, tokens: int) -> list[Request]:
    """Return requests for the first n texts, each with a seed of its own; long ones are cut to fit the context."""
    room = engine.context - tokens
    requests = [
        engine.request(p, tokens, sampling=SamplingParams(temperature, seed=i))
        for i, p in enumerate(prompts_for(engine, what)[:n])
    ]
    return [replace(r, prompt=r.prompt[:room]) for r in requests]


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


def cases(engine: Engine, tuning: Tuning, what: str) -> Iterator[tuple[str, str, Decoder]]:
    """Yield who drafts, the kind of prompts and the decoder; each is closed before the next is made."""
    context, most = tuning.curve.contexts[0], engine.options.max_nodes
    best, without = tuning.best(context, most), replace(tuning, draft_s=[], accuracies=[])
    if what == "sweep":
        for choice in tuning.choices(context, min(most, 16))[1:]:
            mark = ", the tuned one" if choice.tree.paths == best.tree.paths else ""
            yield f"heads, {len(choice.tree) - 1} fixed{mark}", "python", engine.decoder(choice.tree)
    elif what == "worst":
        for ngrams in (False, True):
            useless = live_decoder(engine, tuning, ngrams=ngrams)
            if useless.drafter is not None:
                useless.drafter = RandomDrafter(engine.file.n_vocab)
            yield f"useless heads{' and text so far' * ngrams}", "python", useless
        yield "both, foreign text", "foreign", live_decoder(engine, tuning, ngrams=True)
        yield "both, long prompts", "long", live_decoder(engine, tuning, ngrams=True)
    else:
        if what == "usual" and len(best.tree) > 1:
            yield f"heads, {len(best.tree) - 1} fixed", "python", engine.decoder(best.tree)
        kind = "copying" if what == "copying" else "python"
        yield "heads", kind, live_decoder(engine, tuning, ngrams=False)
        yield "text so far", kind, live_decoder(engine, without, ngrams=True)
        yield "both", kind, live_decoder(engine, tuning, ngrams=True)


def others(path: Path, requests: list[Request], threads: int) -> dict[str, float]:
    """Return tokens/s of llama-cpp-python's own loop, without and with its prompt lookup, on the same prompts."""
    lookups = {
        "llama-cpp-python": None,
        "llama-cpp-python, prompt lookup of 10": LlamaPromptLookupDecoding(num_pred_tokens=10),
        "llama-cpp-python, prompt lookup of 3": LlamaPromptLookupDecoding(num_pred_tokens=3),
    }
    rates = {}
    for name, lookup in lookups.items():
        llm = llama_cpp.Llama(
            str(path), n_ctx=0, n_threads=threads, n_threads_batch=threads, draft_model=lookup, verbose=False
        )
        tokens, seconds = 0, 0.0
        for request in requests:
            pieces = llm.generate(request.prompt, temp=request.sampling.temperature, top_k=0, top_p=1.0, min_p=0.0)
            next(pieces)  # the prompt
            since = perf_counter()
            tokens += sum(1 for _ in zip(range(request.max_tokens - 1), pieces, strict=False))
            seconds += perf_counter() - since
        llm.close()
        rates[name] = tokens / seconds
    return rates


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
@click.option("--what", type=click.Choice(["usual", "worst", "sweep", "copying", "others"]), default="usual")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Without suffix.", show_default="benchmarks/results/speed…"
)
def main(
    types: str,
    temperatures: str,
    shape: str,
    n_prompts: int,
    max_tokens: int,
    runs: int,
    what: str,
    out: Path | None,
) -> None:
    """Measure every type at every temperature."""
    settings, rows = Settings.load(), list[dict[str, Any]]()
    out = out or ROOT / "benchmarks" / "results" / f"speed{'' if what == 'usual' else f'_{what}'}"
    options = EngineOptions(settings.n_threads, settings.model_context_size, settings.n_gpu_layers, max_nodes=32)
    for kind in types.split(",") if shape != "tiny" else [""]:
        model, heads = BUNDLED, None
        if shape != "tiny":
            main_type, _, output_type = kind.partition("+")
            scaled = build(shape, main_type.upper(), output_type.upper() or None)
            model, heads = scaled.model, scaled.heads
        engine = Engine(model, options, heads, HEADS_FOLDER)
        about = {**facts(engine), "command": " ".join(["python", "benchmarks/speed.py", *sys.argv[1:]])}
        for temperature in map(float, temperatures.split(",")):
            labels = {"type": kind or engine.file.file_type, "temperature": temperature}
            trial = requests_for(engine, "trial", temperature, 5, 64)
            tuning = measure(engine, trial, heads=True, budget_s=4.0)
            for who, texts, decoder in cases(engine, tuning, "usual" if what == "others" else what):
                requests = requests_for(engine, texts, temperature, n_prompts, max_tokens)
                rows.append(measured(engine, requests, decoder, tuning, runs, **labels, who=who))
                click.echo(markdown(rows[-1:], about).splitlines()[-1])
            if what == "others":
                requests = requests_for(engine, "python", temperature, n_prompts, max_tokens)
                for who, rate in others(model, requests, settings.n_threads).items():
                    plain = rows[-1]["plain_tokens_per_s"]
                    row = dict.fromkeys((key for key, _ in COLUMNS), "")
                    rows.append(
                        row
                        | labels
                        | {
                            "who": who,
                            "medusa_tokens_per_s": rate,
                            "speedup": rate / plain,
                            "plain_tokens_per_s": plain,
                        }
                    )
            write_json(out.with_suffix(".json"), {**about, "shape": shape, "rows": rows})
            out.with_suffix(".md").write_text(markdown(rows, about), encoding="utf-8")
        engine.model.close()


if __name__ == "__main__":
    main()
