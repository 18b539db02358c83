"""The server under load: Medusa against `draft: none` in one server, in turn, by streams at a time.

    python benchmarks/serve.py --texts 6 --rounds 4    # the bundled model, whole prompts
    python benchmarks/serve.py --type bf16 --max_tokens 32 --prompt_tokens 48 --cached    # 1 B parameters (scale_up.py)

Starts `main.py` itself. Every stream is a client of its own that has one text after the other written. Prompts are read
whole, or with `--cached` are in the cache before the clock starts, and stay there: the server has twice as many places
as there are streams, as a text that starts takes the place of one that is kept. Clients and server share the machine's
cores. One stream through HTTP is also held against the decoder of `main.py generate`, in turn. Writes serve….json and
.md under benchmarks/results/.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
    sys.path[0] = str(ROOT)

import click  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.scale_up import BUNDLED, build  # noqa: E402
from commands.common import PROMPTS, open_decoder, open_engine  # noqa: E402
from config import Settings  # noqa: E402
from model.decoding.generation import Request  # noqa: E402
from model.decoding.sampling import SamplingParams  # noqa: E402
from model.engine import Engine  # noqa: E402
from model.measuring.report import facts, read_prompts, write_json  # noqa: E402
from model.measuring.speed import TimedText  # noqa: E402

COLUMNS = (
    ("streams", "streams"), ("draft", "draft"), ("tokens_per_s", "tokens/s"), ("ratio", "against none"),
    ("acceptance_length", "tokens a step"), ("first_p50_ms", "first token p50 ms"), ("first_p99_ms", "p99"),
    ("token_p50_ms", "per token p50 ms"), ("token_p99_ms", "p99"),
)  # fmt: skip


@dataclass
class Answer:
    """One text as its client saw it, in seconds: to its first piece, from there to its last; and what it says of it."""

    first_s: float
    rest_s: float
    timings: dict[str, Any]

    @property
    def tokens(self) -> int:
        return int(self.timings["predicted_n"])


@dataclass(frozen=True)
class Server:
    """`main.py` at work."""

    address: str
    pid: int


@contextmanager
def server(**variables: str) -> Iterator[Server]:
    """Start `main.py` on a free port, and end it."""
    env = {**os.environ, "HOST": "127.0.0.1", "PORT": "0", **variables}
    command = [sys.executable, str(ROOT / "main.py")]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address = next((line.split()[-1] for line in process.stdout if line.startswith("page and API")), None)
            if address is None:
                raise click.ClickException("the server did not start")
            yield Server(address, process.pid)
        finally:
            process.send_signal(signal.SIGTERM)


async def ask(address: str, **fields: Any) -> Answer:
    """Have one text written, streaming. By hand: a client library would take more time than the server."""
    place = urlsplit(address)
    body = json.dumps({"stream": True, **fields}).encode()
    reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=1 << 20)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    since, first, last, timings = perf_counter(), 0.0, 0.0, None
    writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
    async for line in reader:
        if line.startswith(b"data: {"):
            first, last = first or perf_counter(), perf_counter()
            if b'"timings"' in line:
                timings = json.loads(line[6:])["timings"]
        elif line.startswith(b"{"):
            raise click.ClickException(line.decode())
    writer.close()
    if timings is None:
        raise click.ClickException("a text was not finished")
    return Answer(first - since, last - first, timings)


async def load(address: str, prompts: list[list[int]], streams: int, **fields: Any) -> tuple[list[Answer], float]:
    """Have all prompts continued, so many at a time; return the answers, and the seconds from first to last."""
    waiting, answers = list(enumerate(prompts)), list[Answer]()

    async def stream() -> None:
        while waiting:
            seed, prompt = waiting.pop(0)
            answers.append(await ask(address, prompt=prompt, seed=seed, **fields))

    since = perf_counter()
    await asyncio.gather(*(stream() for _ in range(streams)))
    return answers, perf_counter() - since


def summary(answers: list[Answer], seconds: float) -> dict[str, Any]:
    """Return what a load came to; times in milliseconds."""
    tokens = sum(a.tokens for a in answers)
    first = np.percentile([1e3 * a.first_s for a in answers], [50, 99])
    each = np.percentile([1e3 * a.rest_s / max(1, a.tokens - 1) for a in answers], [50, 99])
    return {
        "texts": len(answers),
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "acceptance_length": tokens / sum(a.timings["steps"] for a in answers),
        "drafted": sum(a.timings["drafted"] for a in answers),
        **dict(zip(("first_p50_ms", "first_p99_ms"), first.tolist(), strict=True)),
        **dict(zip(("token_p50_ms", "token_p99_ms"), each.tolist(), strict=True)),
    }


def compare(address: str, prompts: list[list[int]], streams: int, rounds: int, **fields: Any) -> list[dict[str, Any]]:
    """Write all prompts without drafts and with them, in turn; the order changes from round to round."""
    seen: dict[str, tuple[list[Answer], list[float]]] = {"none": ([], []), "auto": ([], [])}
    if fields["cache_prompt"]:
        asyncio.run(load(address, prompts, 1, **{**fields, "max_tokens": 1}))
    for n in range(rounds):
        for draft in ("none", "auto") if n % 2 == 0 else ("auto", "none"):
            answers, seconds = asyncio.run(load(address, prompts, streams, draft=draft, **fields))
            seen[draft][0].extend(answers)
            seen[draft][1].append(seconds)
    rows = [{"streams": streams, "draft": d, **summary(a, sum(s))} for d, (a, s) in seen.items()]
    for row in rows:
        row["ratio"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
    return rows


def through_http(
    address: str, engine: Engine, prompts: list[list[int]], tokens: int, temperature: float
) -> dict[str, Any]:
    """Return the speed of single texts through HTTP and from the decoder of `generate`: behind the prompt, in turn."""
    spent, written = [0.0, 0.0], [0, 0]
    with open_decoder(engine, SamplingParams(temperature)) as decoder:
        for seed, prompt in enumerate(prompts):
            text = TimedText(decoder, Request(prompt, tokens, SamplingParams(temperature, seed=seed)))
            text.write()
            answer = asyncio.run(ask(address, prompt=prompt, max_tokens=tokens, temperature=temperature, seed=seed))
            behind_prompt = answer.first_s + answer.rest_s - answer.timings["prompt_ms"] / 1e3
            for i, (n, s) in enumerate(((len(text.generation.tokens), text.seconds), (answer.tokens, behind_prompt))):
                written[i] += n
                spent[i] += s
    rates = {name: n / s for name, n, s in zip(("generate", "http"), written, spent, strict=True)}
    return {**rates, "http_of_generate": rates["http"] / rates["generate"]}


def markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the rows as a Markdown table under a line of facts."""
    lines = [f"{about['model']} ({about['quantization']}), {about['machine']}, {about['threads']} threads. ", ""]
    lines[0] += f"`{about['command']}`"
    lines += ["| " + " | ".join(title for _, title in COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        cells = [f"{row[key]:.2f}" if isinstance(row[key], float) else str(row[key]) for key, _ in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    if "generate" in about:
        lines += [
            "",
            f"One stream: {about['http']:.1f} tokens/s through HTTP, {about['generate']:.1f} from `generate`: ",
        ]
        lines[-1] += f"{about['http_of_generate']:.2f}."
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--type", "kind", help="Of scale_up.py's 1 B model; without it, the bundled model.")
@click.option("--streams", default="1,4,16", show_default=True)
@click.option("--texts", default=4, show_default=True, help="Texts of each stream; of a single one: twice as many.")
@click.option("--max_tokens", default=96, show_default=True)
@click.option("--prompt_tokens", default=512, show_default=True, help="Of each prompt at the most.")
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--rounds", default=2, show_default=True, help="How often every text is written each way.")
@click.option("--cached", is_flag=True, help="Prompts are in the cache before the clock starts.")
@click.option("--against_generate", default=4, show_default=True, help="Texts that are also written without HTTP.")
@click.option("--out", type=click.Path(path_type=Path), help="Without suffix.")
def main(
    kind: str | None,
    streams: str,
    texts: int,
    max_tokens: int,
    prompt_tokens: int,
    temperature: float,
    rounds: int,
    cached: bool,
    against_generate: int,
    out: Path | None,
) -> None:
    """Measure every number of streams."""
    numbers, rows = [int(n) for n in streams.split(",")], list[dict[str, Any]]()
    out = out or ROOT / "benchmarks" / "results" / f"serve_{kind or 'bundled'}"
    if kind:
        scaled = build("1b", kind.upper())
        os.environ |= {"MODEL_PATH": str(scaled.model), "MEDUSA_WEIGHTS_PATH": str(scaled.heads)}
    else:
        os.environ |= {"MODEL_PATH": str(BUNDLED), "MEDUSA_WEIGHTS_PATH": ""}
    engine = open_engine(Settings.load())
    prompts = [engine.model.tokenize(text).tolist()[:prompt_tokens] for text in read_prompts(PROMPTS / "python.jsonl")]
    about = {**facts(engine), "temperature": temperature, "max_tokens": max_tokens}
    about["command"] = " ".join(["python", "benchmarks/serve.py", *sys.argv[1:]])
    with server(N_PARALLEL=str(max(numbers) * (1 + cached))) as running:
        address = running.address
        if against_generate:
            about |= through_http(address, engine, prompts[:against_generate], max_tokens, temperature)
            click.echo(f"HTTP {about['http']:.1f}, generate {about['generate']:.1f}: {about['http_of_generate']:.2f}")
        engine.model.close()
        for n in numbers:
            wanted = [prompts[i % min(len(prompts), max(numbers))] for i in range(max(n, 2) * texts)]
            fields = {"max_tokens": max_tokens, "temperature": temperature, "cache_prompt": cached}
            rows += compare(address, wanted, n, rounds, **fields)
            click.echo("\n".join(markdown(rows[-2:], about).splitlines()[4:6]))
            write_json(out.with_suffix(".json"), {**about, "rows": rows})
            out.with_suffix(".md").write_text(markdown(rows, about), encoding="utf-8")


if __name__ == "__main__":
    main()
