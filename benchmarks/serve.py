"""The server under load: drafts against `draft: none` in one server, in turn, by streams.

    python benchmarks/serve.py --requests 6 --rounds 4    # the bundled model, whole prompts
    # 1 B parameters (scale_up.py)
    python benchmarks/serve.py --type bf16 --max_tokens 32 --prompt_tokens 48 --cached

Starts `main.py` itself. Every stream is a client of its own that sends one request after the
other. Prompts are prefilled whole, or with `--cached` are in the prefix cache before the clock
starts, and stay there: the server has twice as many KV slots as there are streams, as a sequence
that starts evicts one that is kept. Clients and server share the machine's cores. One stream
through HTTP is also compared with the decoder of `main.py generate`, in turn. Writes
serve….json and .md under benchmarks/results/.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
    sys.path[0] = str(ROOT)

import click  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.server_process import server  # noqa: E402
from benchmarks.stream_client import Answer, ask, load  # noqa: E402
from commands.common import load_model, open_decoder  # noqa: E402
from config import Settings  # noqa: E402
from model.base.chat import chosen_template  # noqa: E402
from model.base.known_models import BUNDLED  # noqa: E402
from model.decoding.request import Request  # noqa: E402
from model.decoding.sampling import SamplingParams  # noqa: E402
from model.evaluation.report import facts, write_json  # noqa: E402
from model.evaluation.scaled_model import build  # noqa: E402
from model.evaluation.speed import TimedSequence  # noqa: E402
from model.loaded_model import LoadedModel  # noqa: E402
from model.planning.prompt_files import PYTHON, read_prompt_file  # noqa: E402

COLUMNS = (
    ("streams", "streams"),
    ("draft", "draft"),
    ("tokens_per_s", "tokens/s"),
    ("ratio", "against none"),
    ("acceptance_length", "tokens a step"),
    ("first_p50_ms", "first token p50 ms"),
    ("first_p99_ms", "p99"),
    ("token_p50_ms", "per token p50 ms"),
    ("token_p99_ms", "p99"),
)


def summary(answers: list[Answer], seconds: float) -> dict[str, Any]:
    """Return what a load came to; times in milliseconds."""
    tokens = sum(answer.tokens for answer in answers)
    first_ms = [1e3 * answer.first_s for answer in answers]
    token_ms = [1e3 * answer.rest_s / max(1, answer.tokens - 1) for answer in answers]
    return {
        "sequences": len(answers),
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "acceptance_length": tokens / sum(answer.timings["steps"] for answer in answers),
        "drafted": sum(answer.timings["drafted"] for answer in answers),
        "first_p50_ms": float(np.percentile(first_ms, 50)),
        "first_p99_ms": float(np.percentile(first_ms, 99)),
        "token_p50_ms": float(np.percentile(token_ms, 50)),
        "token_p99_ms": float(np.percentile(token_ms, 99)),
    }


def compare(
    address: str, prompts: list[list[int]], streams: int, rounds: int, **fields: Any
) -> list[dict[str, Any]]:
    """Continue all prompts without drafts and with them; the order changes in each round."""
    answers: dict[str, list[Answer]] = {"none": [], "auto": []}
    seconds = dict.fromkeys(answers, 0.0)
    if fields["cache_prompt"]:
        asyncio.run(load(address, prompts, 1, **{**fields, "max_tokens": 1}))
    for n in range(rounds):
        order = list(answers)
        if n % 2:
            order.reverse()
        for draft in order:
            more, spent = asyncio.run(load(address, prompts, streams, draft=draft, **fields))
            answers[draft] += more
            seconds[draft] += spent
    rows = list[dict[str, Any]]()
    for draft in answers:
        figures = summary(answers[draft], seconds[draft])
        rows.append({"streams": streams, "draft": draft, **figures})
    for row in rows:
        row["ratio"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
    return rows


def through_http(
    address: str,
    loaded: LoadedModel,
    prompts: list[list[int]],
    max_tokens: int,
    temperature: float,
) -> dict[str, float]:
    """Return the speed of single sequences through HTTP and from the decoder of `generate`.

    Behind the prompt, in turn.
    """
    tokens = {"generate": 0, "http": 0}
    seconds = {"generate": 0.0, "http": 0.0}
    template = chosen_template(loaded.file.metadata, "auto")
    with open_decoder(loaded, SamplingParams(temperature=temperature), template) as decoder:
        for seed, prompt in enumerate(prompts):
            sampling = SamplingParams(temperature=temperature, seed=seed)
            request = Request(prompt=prompt, max_tokens=max_tokens, sampling=sampling)
            timed = TimedSequence(decoder, request)
            timed.advance(max_tokens)
            tokens["generate"] += timed.sequence.n_new
            seconds["generate"] += timed.seconds
            answer = asyncio.run(
                ask(
                    address,
                    prompt=prompt,
                    max_tokens=max_tokens,
                    temperature=temperature,
                    seed=seed,
                )
            )
            tokens["http"] += answer.tokens
            seconds["http"] += answer.first_s + answer.rest_s - answer.timings["prompt_ms"] / 1e3
    rates = {name: tokens[name] / seconds[name] for name in tokens}
    return {**rates, "http_of_generate": rates["http"] / rates["generate"]}


def cells(row: dict[str, Any]) -> str:
    """Return a row as Markdown."""
    texts = list[str]()
    for key, _ in COLUMNS:
        value = row[key]
        texts.append(f"{value:.2f}" if isinstance(value, float) else str(value))
    return "| " + " | ".join(texts) + " |"


def markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the rows as a Markdown table under a line of facts."""
    lines = [
        f"{about['model']} ({about['quantization']}), {about['machine']}, "
        f"{about['threads']} threads. `{about['command']}`",
        "",
        "| " + " | ".join(title for _, title in COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *(cells(row) for row in rows),
    ]
    if "generate" in about:
        lines += [
            "",
            f"One stream: {about['http']:.1f} tokens/s through HTTP, {about['generate']:.1f} from "
            f"`generate`: {about['http_of_generate']:.2f}.",
        ]
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--type", "kind", help="Of scale_up.py's 1 B model; without it, the bundled model.")
@click.option("--streams", default="1,4,16", show_default=True)
@click.option(
    "--requests",
    "--texts",
    "n_requests",
    default=4,
    show_default=True,
    help="Requests of each stream; of a single one: twice as many. --texts is the older name.",
)
@click.option("--max_tokens", default=96, show_default=True)
@click.option("--prompt_tokens", default=512, show_default=True, help="Of each prompt at the most.")
@click.option("--temperature", default=0.0, show_default=True)
@click.option(
    "--rounds", default=2, show_default=True, help="How often every prompt is continued each way."
)
@click.option(
    "--cached", is_flag=True, help="Prompts are in the prefix cache before the clock starts."
)
@click.option(
    "--against_generate",
    default=4,
    show_default=True,
    help="Sequences that are also generated without HTTP.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Without suffix.")
def main(
    kind: str | None,
    streams: str,
    n_requests: int,
    max_tokens: int,
    prompt_tokens: int,
    temperature: float,
    rounds: int,
    cached: bool,
    against_generate: int,
    out: Path | None,
) -> None:
    """Measure every number of streams."""
    numbers = [int(n) for n in streams.split(",")]
    out = out or ROOT / "benchmarks" / "results" / f"serve_{kind or 'bundled'}"
    select_model(kind)
    loaded = load_model(Settings.load())
    prompts = [
        loaded.base_model.tokenize(text).tolist()[:prompt_tokens]
        for text in read_prompt_file(PYTHON)
    ]
    about = {**facts(loaded), "temperature": temperature, "max_tokens": max_tokens}
    about["command"] = " ".join(["python", "benchmarks/serve.py", *sys.argv[1:]])
    n_slots = max(numbers)
    if cached:
        n_slots *= 2
    rows = list[dict[str, Any]]()
    with server(N_PARALLEL=str(n_slots)) as running:
        if against_generate:
            some = prompts[:against_generate]
            about |= through_http(running.address, loaded, some, max_tokens, temperature)
            click.echo(
                f"HTTP {about['http']:.1f}, generate {about['generate']:.1f}: "
                f"{about['http_of_generate']:.2f}"
            )
        loaded.close()
        usable = prompts[: max(numbers)]  # all of them stay in the prefix cache
        for n in numbers:
            wanted = [usable[i % len(usable)] for i in range(max(n, 2) * n_requests)]
            fields = {"max_tokens": max_tokens, "temperature": temperature, "cache_prompt": cached}
            new_rows = compare(running.address, wanted, n, rounds, **fields)
            rows += new_rows
            for row in new_rows:
                click.echo(cells(row))
            write_json(out.with_suffix(".json"), {**about, "rows": rows})
            out.with_suffix(".md").write_text(markdown(rows, about), encoding="utf-8")


def select_model(kind: str | None) -> None:
    """Let the environment name the 1 B model of a type, or the bundled one."""
    if kind:
        scaled = build("1b", kind.upper())
        os.environ |= {"MODEL_PATH": str(scaled.model), "MEDUSA_WEIGHTS_PATH": str(scaled.heads)}
    else:
        os.environ |= {"MODEL_PATH": str(BUNDLED), "MEDUSA_WEIGHTS_PATH": ""}


if __name__ == "__main__":
    main()
