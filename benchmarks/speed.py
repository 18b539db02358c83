"""The whole comparison: one behaviour at several costs, plain against drafted, measured beside what was predicted.

    python benchmarks/speed.py                                    # make bench: all types, temperatures 0 and 0.8
    python benchmarks/speed.py --what worst --types q4_0          # useless heads, foreign text, long prompts
    python benchmarks/speed.py --what sweep --types bf16          # every size beside the tuned one
    python benchmarks/speed.py --what copying --types bf16        # a text of the prompt is written once more
    python benchmarks/speed.py --others --types q4_0              # llama-cpp-python's own loop and prompt lookup too
    python benchmarks/speed.py --against build/heads              # other heads for the bundled model take turns too

The model is the one of scale_up.py: it writes what the bundled model writes, at the cost of 1 B parameters. Plain
decoding has a context of its own; all ways to draft and it take turns in one process. Writes speed.json and speed.md
under benchmarks/results/ after every type and temperature; others that were measured there in the same way stay, so
that an hour's run can be made in parts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
    sys.path[0] = str(ROOT)

import click  # noqa: E402
import llama_cpp  # noqa: E402
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding  # noqa: E402

from benchmarks.scale_up import BUNDLED, build, grow_heads  # noqa: E402
from benchmarks.speed_table import COLUMNS, TYPES, cells, write  # noqa: E402
from config import HEADS_FOLDER, Settings  # noqa: E402
from model.base.gguf_file import GGUFFile  # noqa: E402
from model.decoding.drafting import RandomDrafter  # noqa: E402
from model.decoding.generation import Request  # noqa: E402
from model.decoding.sampling import SamplingParams  # noqa: E402
from model.engine import Decoder, Engine, EngineOptions  # noqa: E402
from model.measuring.report import facts, read_prompts  # noqa: E402
from model.measuring.speed import TimedText, compare, take_turns, turn_tokens  # noqa: E402
from model.measuring.step_times import step_curve  # noqa: E402
from model.measuring.tuning import Tuning, live_decoder, measure  # noqa: E402
from model.trees.costs import CostCurve  # noqa: E402

PROMPTS = ROOT / "benchmarks" / "prompts"
BUDGET_S = 20.0  # seconds for the curve: the median of three rounds is off by up to a tenth


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


def labelled(
    result: dict[str, Any], requests: list[Request], tuning: Tuning, later: CostCurve, **labels: Any
) -> dict[str, Any]:
    """Return the figures of one way to draft, with what is predicted for the steps that were made.

    By the tuning's curve, measured before, and one measured after: the mean of both.
    """
    steps, length = sum(result["steps_by_nodes"].values()), result["acceptance_length"]
    context = sum(len(r.prompt) + r.max_tokens / 2 for r in requests) / len(requests)
    step_us = sum(result[f"{part}_us"] for part in ("draft", "decode", "verify", "other"))
    done = (result["steps_by_nodes"], round(length * steps), result["head_steps"], context)
    expected = mean(t.expected_speedup(*done) for t in (tuning, replace(tuning, curve=later)))
    del result["text_pairs"]
    return {
        **labels,
        "plain_tokens_per_s": result["plain"]["tokens_per_s"],
        "medusa_tokens_per_s": result["medusa"]["tokens_per_s"],
        "expected_speedup": expected,
        "of_expected": result["speedup"] / expected,
        "nodes": result["tree_nodes"],
        "draft_share": result["draft_us"] / step_us,
        "equal": f"{result['equal_sequences']}/{result['sequences']}",
        **result,
        "tuning": tuning.to_json(),
        "later_curve": later.to_json(),
    }


def fixed_tree(engine: Engine, tuning: Tuning, label: str = "") -> dict[str, Decoder]:
    """Return the heads' best tree as a way to draft; nothing where none pays."""
    tree = tuning.best(tuning.curve.contexts[0], engine.options.max_nodes).tree
    return {f"heads{label}, {len(tree) - 1} fixed": engine.decoder(tree)} if len(tree) > 1 else {}


def cases(engine: Engine, tuning: Tuning, what: str) -> Iterator[tuple[str, dict[str, Decoder]]]:
    """Yield the kind of prompts and the ways to draft that take turns on them."""
    if what == "sweep":
        context, most = tuning.curve.contexts[0], engine.options.max_nodes
        best = tuning.best(context, most)
        trees = [choice.tree for choice in tuning.choices(context, min(most, 16))[1:]]
        marks = [", the tuned one" * (tree.paths == best.tree.paths) for tree in trees]
        yield "python", {f"heads, {len(t) - 1} fixed{m}": engine.decoder(t) for t, m in zip(trees, marks, strict=True)}
    elif what == "worst":
        useless = {}
        for ngrams in (False, True):
            way = useless["useless heads" + ngrams * " and text so far"] = live_decoder(engine, tuning, ngrams=ngrams)
            if way.drafter is not None:
                way.drafter = RandomDrafter(engine.file.n_vocab)
        yield "python", useless
        for kind in ("foreign", "long"):
            yield kind, {f"both, {kind} text": live_decoder(engine, tuning, ngrams=True)}
    elif what == "copying":
        ways = {
            "heads": live_decoder(engine, tuning, ngrams=False),
            "text so far": live_decoder(engine, replace(tuning, draft_s=[], accuracies=[]), ngrams=True),
            "both": live_decoder(engine, tuning, ngrams=True),
        }
        yield "copying", ways
    else:
        yield "python", {**fixed_tree(engine, tuning), "both": live_decoder(engine, tuning, ngrams=True)}


class ForeignText:
    """A text that llama-cpp-python writes; see Timed. The prompt and the first token are done when it is made."""

    def __init__(self, llm: llama_cpp.Llama, request: Request) -> None:
        temperature = request.sampling.temperature
        self._pieces = llm.generate(request.prompt, temp=temperature, top_k=0, top_p=1.0, min_p=0.0)
        next(self._pieces)
        self._most, self.tokens, self.seconds = request.max_tokens, 1, 0.0

    def write(self, tokens: int | None = None) -> bool:
        """See Timed."""
        since, goal = perf_counter(), min(tokens or self._most, self._most)
        while self.tokens < goal and next(self._pieces, None) is not None:
            self.tokens += 1
        self.seconds += perf_counter() - since
        return self.tokens < goal or goal == self._most


def others(engine: Engine, requests: list[Request]) -> tuple[float, dict[str, float]]:
    """Return tokens/s of plain decoding, and of llama-cpp-python with and without its prompt lookup, in turn."""
    threads = engine.options.n_threads
    looking = {
        "llama-cpp-python": 0,
        "llama-cpp-python, prompt lookup of 10": 10,
        "llama-cpp-python, prompt lookup of 3": 3,
    }
    llms = {
        name: llama_cpp.Llama(
            str(engine.file.path),
            n_ctx=0,
            n_threads=threads,
            n_threads_batch=threads,
            draft_model=LlamaPromptLookupDecoding(num_pred_tokens=n) if n else None,
            verbose=False,
        )
        for name, n in looking.items()
    }
    spent, tokens = dict.fromkeys(("", *llms), 0.0), dict.fromkeys(("", *llms), 0)
    with engine.decoder() as plain:
        piece = turn_tokens(plain, requests[0])
        for request in requests:
            own, theirs = TimedText(plain, request), {name: ForeignText(llm, request) for name, llm in llms.items()}
            take_turns([own, *theirs.values()], piece)
            spent[""] += own.seconds
            tokens[""] += len(own.generation.tokens)
            for name, text in theirs.items():
                spent[name] += text.seconds
                tokens[name] += text.tokens - 1  # the first came with the prompt
    for llm in llms.values():
        llm.close()
    rates = {name: tokens[name] / seconds for name, seconds in spent.items()}
    return rates.pop(""), rates


@dataclass(frozen=True)
class Amount:
    """What is measured, on how many texts of how many tokens, how often."""

    what: str
    shape: str
    n_prompts: int
    max_tokens: int
    runs: int


def measure_rows(
    engine: Engine, amount: Amount, temperature: float, against: Engine | None, **labels: Any
) -> list[dict[str, Any]]:
    """Measure one model at one temperature. against: the same model with other heads, whose best tree takes turns."""
    rows = []
    trial = requests_for(engine, "trial", temperature, 5, 64)
    tuning = measure(engine, trial, heads=True, budget_s=BUDGET_S)
    for texts, ways in cases(engine, tuning, amount.what):
        tunings = dict.fromkeys(ways, tuning)
        if against:
            other = measure(against, trial, heads=True, budget_s=BUDGET_S, curve=tuning.curve)
            ways |= fixed_tree(against, other, f" of --against ({against.heads.config.head_type})")
            tunings |= dict.fromkeys(ways.keys() - tunings.keys(), other)
        requests = requests_for(engine, texts, temperature, amount.n_prompts, amount.max_tokens)
        with ExitStack() as stack:
            for decoder in ways.values():
                stack.enter_context(decoder)
            results = compare(engine, requests, *ways.values(), runs=amount.runs)
        later = step_curve(engine, BUDGET_S)
        for who, result in zip(ways, results, strict=True):
            labels |= {"temperature": temperature, "texts": texts, "who": who}
            rows.append(labelled(result, requests, tunings[who], later, **labels))
            click.echo(cells(rows[-1]))
    return rows


def other_rows(engine: Engine, amount: Amount, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure llama-cpp-python's own ways on the prompts of a row."""
    rows, temperature = list[dict[str, Any]](), row["temperature"]
    requests = requests_for(engine, row["texts"], temperature, amount.n_prompts, amount.max_tokens)
    labels = {key: "" for key, _ in COLUMNS} | {key: row[key] for key in ("type", "temperature", "texts", "command")}
    plain, rates = others(engine, requests)
    for who, rate in rates.items():
        figures = {"medusa_tokens_per_s": rate, "speedup": rate / plain, "plain_tokens_per_s": plain}
        rows.append({**labels, "who": who, **figures})
        click.echo(cells(rows[-1]))
    return rows


@click.command()
@click.option("--types", default=",".join(TYPES), show_default=True, help="TYPE or TYPE+OUTPUT_TYPE, with commas.")
@click.option("--temperatures", default="0,0.8", show_default=True)
@click.option("--shape", default="1b", show_default=True, help="Of scale_up.py; tiny: the bundled model itself.")
@click.option("--n_prompts", default=12, show_default=True)
@click.option("--max_tokens", default=160, show_default=True)
@click.option("--runs", default=1, show_default=True, help="How often every text is written each way.")
@click.option("--what", type=click.Choice(["usual", "worst", "sweep", "copying"]), default="usual")
@click.option("--others/--no-others", "with_others", help="Time llama-cpp-python's own ways too.")
@click.option("--against", type=click.Path(path_type=Path), help="A folder of other heads for the bundled model.")
@click.option("--out", type=click.Path(path_type=Path), help="Without suffix; default: benchmarks/results/speed…")
def main(
    types: str, temperatures: str, with_others: bool, against: Path | None, out: Path | None, **amounts: Any
) -> None:
    """Measure every type at every temperature."""
    settings, amount = Settings.load(), Amount(**amounts)
    rows = list[dict[str, Any]]()
    out = out or ROOT / "benchmarks" / "results" / ("speed" if amount.what == "usual" else f"speed_{amount.what}")
    options = EngineOptions(settings.n_threads, settings.model_context_size, settings.n_gpu_layers, max_nodes=32)
    for kind in types.split(",") if amount.shape != "tiny" else [""]:
        model, heads = BUNDLED, None
        if amount.shape != "tiny":
            main_type, _, output_type = kind.partition("+")
            scaled = build(amount.shape, main_type.upper(), output_type.upper() or None)
            model, heads = scaled.model, scaled.heads
        engine, rival = Engine(model, options, heads, HEADS_FOLDER), None
        if against:
            grown = against
            if amount.shape != "tiny":
                grown = model.with_suffix(".against")
                grow_heads(against, GGUFFile(BUNDLED), GGUFFile(model), grown)
            rival = Engine(model, options, grown, HEADS_FOLDER)
        command = " ".join(["python", "benchmarks/speed.py", *sys.argv[1:]])
        about = {**facts(engine), **asdict(amount)}
        own = {key: about.pop(key) for key in ("model", "quantization", "command")} | {"command": command}
        for temperature in map(float, temperatures.split(",")):
            label = kind or engine.file.file_type
            rows += measure_rows(engine, amount, temperature, rival, type=label, **own)
            if with_others:
                rows += other_rows(engine, amount, rows[-1])
            write(out, about, rows)
        engine.model.close()
        if rival:
            rival.model.close()


if __name__ == "__main__":
    main()
