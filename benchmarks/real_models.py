"""Real models through HTTP: plain and drafted, beside a current llama-server, in turn.

    pip install xllamacpp    # the peer; needed by this benchmark alone
    python benchmarks/real_models.py MODEL.gguf ... [--temperature 0,0.8] [--before 300]

Every server runs all the time and is asked in turn, one request after the other, who goes first
changes; so slow spells hit all of them. Requests are chats (texts, where the model has no chat
template), streamed; a rate is that of the tokens behind the first one, as the client sees them.
Ratios are medians over requests of this server's rate ÷ the peer's without speculation, or ÷ its
own plain one. `--before`: so many requests of all lengths first, which a server must not be slower
for, and a second server of ours with one slot, which saw none of them. Prompts come from a file of
them by kind. Writes real_models.json and .md under benchmarks/results/.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
    sys.path[0] = str(ROOT)

import click  # noqa: E402
import requests  # noqa: E402

from benchmarks.peer_server import SPECULATION, peer  # noqa: E402
from benchmarks.server_process import Server, server  # noqa: E402
from benchmarks.stream_client import Answer, ask  # noqa: E402
from model.base.chat import user_turn  # noqa: E402
from model.base.cores import usable_cores  # noqa: E402
from model.base.gguf_file import GGUFFile  # noqa: E402
from model.evaluation.report import write_json  # noqa: E402
from model.planning.prompt_files import TASKS, Task, in_turn, read_tasks  # noqa: E402

CONTEXT = 2048
MEASURED_WITHIN_S = 300  # of a first start


class Way(NamedTuple):
    """One way to answer: a server, and what it is told to draft from."""

    name: str
    address: str
    fields: dict[str, Any]


def memory_mib(pid: int) -> float:
    """Return the resident memory of a process and its children, together."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    total = 0.0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            total = float(line.split()[1]) / 1024
    return total + sum(memory_mib(int(child)) for child in children)


async def answer(way: Way, prompt: str, chat: bool, **fields: Any) -> Answer:
    """Have a prompt answered."""
    if chat:
        messages = [user_turn(prompt)]
        path = "/v1/chat/completions"
        return await ask(way.address, path, messages=messages, **fields, **way.fields)
    return await ask(way.address, prompt=prompt, **fields, **way.fields)


def rate(found: Answer) -> float:
    """Return the tokens/s behind the first token."""
    return (found.tokens - 1) / found.rest_s if found.tokens > 1 else 0.0


async def measure(
    ways: list[Way], prompts: list[str], chat: bool, temperature: float, max_tokens: int
) -> dict[str, list[Answer]]:
    """Ask all ways in turn for the same answers."""
    answers: dict[str, list[Answer]] = {way.name: [] for way in ways}
    for number, prompt in enumerate(prompts):
        first = number % len(ways)
        for way in ways[first:] + ways[:first]:
            found = await answer(
                way, prompt, chat, temperature=temperature, max_tokens=max_tokens, seed=number
            )
            answers[way.name].append(found)
    return answers


async def wear(way: Way, prompts: list[str], n_requests: int) -> None:
    """Send requests of all lengths, up to four at a time."""
    rng = random.Random(0)
    waiting = list(range(n_requests))

    async def client() -> None:
        while waiting:
            number = waiting.pop()
            text = prompts[number % len(prompts)][: rng.randrange(10, 600)]
            prompt = f"{number} {text}"  # nobody begins alike
            await ask(way.address, prompt=prompt, max_tokens=rng.randrange(1, 12), temperature=0.0)

    await asyncio.gather(*(client() for _ in range(4)))


def wait_until_measured(ours: Server) -> None:
    """Wait until the server has measured this machine, so that it drafts what pays."""
    for _ in range(MEASURED_WITHIN_S):
        state = requests.get(f"{ours.address}/props", timeout=60).json()
        if not state.get("measuring"):
            return
        asyncio.run(asyncio.sleep(1.0))


def row(
    name: str, answers: dict[str, list[Answer]], kinds: list[str], baseline: str, plain: str
) -> dict[str, Any]:
    """Return what a way came to. kinds: of the prompts."""
    mine = answers[name]
    by_kind = dict[str, float]()
    for kind in dict.fromkeys(kinds):
        chosen = [i for i, each in enumerate(kinds) if each == kind]
        ratios = [rate(mine[i]) / (rate(answers[plain][i]) or float("inf")) for i in chosen]
        by_kind[kind] = median(ratios)
    paired = [
        (rate(a), rate(b), rate(c))
        for a, b, c in zip(mine, answers[baseline], answers[plain], strict=True)
        if min(rate(a), rate(b), rate(c)) > 0
    ]
    return {
        "way": name,
        "tokens_per_s": sum(a.tokens for a in mine) / sum(a.rest_s for a in mine),
        "against_peer": median(a / b for a, b, _ in paired),
        "against_plain": median(a / c for a, _, c in paired),
        "first_token_ms": 1e3 * median(a.first_s for a in mine),
        "against_plain_by_kind": by_kind,
    }


def measure_model(
    model: Path, temperatures: list[float], tasks: list[Task], max_tokens: int, before: int
) -> dict[str, Any]:
    """Return all figures of a file."""
    prompts = [task.text for task in tasks]
    kinds = [task.kind for task in tasks]
    threads = usable_cores()
    chat = "tokenizer.chat_template" in GGUFFile(model).metadata
    with ExitStack() as running:
        variables = {
            "MODEL_PATH": str(model),
            "MODEL_CONTEXT_SIZE": str(CONTEXT),
            # The same prompts come again and again: nobody may know an answer from the last time.
            "SHARE_DRAFT_MEMORY": "false",
        }
        ours = running.enter_context(server(**variables))
        wait_until_measured(ours)
        props = requests.get(f"{ours.address}/props", timeout=60).json()
        sources = ["none", "ngram", "free"]
        if "heads" in str(props.get("draft", "")):
            sources += ["heads", "auto"]
        ways = [
            Way(f"this: {draft}", ours.address, {"draft": draft, "cache_prompt": False})
            for draft in sources
        ]
        if before:
            alone = running.enter_context(server(**variables, N_PARALLEL="1"))
            ways.append(
                Way("this, one slot: none", alone.address, {"draft": "none", "cache_prompt": False})
            )
        for speculation in SPECULATION:
            address = running.enter_context(
                peer(model, speculation, threads=threads, context=CONTEXT)
            )
            ways.append(Way(f"llama-server: {speculation}", address, {"cache_prompt": False}))
        asyncio.run(measure(ways, prompts[:1], chat, 0.0, 8))  # warms up
        if before:
            asyncio.run(wear(ways[0], prompts, before))
        found: dict[str, Any] = {}
        for temperature in temperatures:
            answers = asyncio.run(measure(ways, prompts, chat, temperature, max_tokens))
            rows = [
                row(way.name, answers, kinds, "llama-server: none", "this: none") for way in ways
            ]
            for line in rows:
                line["temperature"] = temperature
                click.echo(markdown_row(model.name, line))
            found[str(temperature)] = rows
        memory = memory_mib(ours.pid)
    return {"file": model.name, "rows": found, "memory_mib": memory, "requests_before": before}


def markdown_row(file: str, line: dict[str, Any]) -> str:
    """Return a line of the table."""
    return (
        f"| {file} | {line['temperature']} | {line['way']} | {line['tokens_per_s']:.1f} | "
        f"{line['against_peer']:.2f} | {line['against_plain']:.2f} | {line['first_token_ms']:.0f} |"
    )


HEADER = (
    "| file | T | way | tokens/s | ÷ llama-server | ÷ this, plain | first token ms |\n"
    "|---|---|---|---|---|---|---|"
)


@click.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--prompts", default=TASKS, type=click.Path(path_type=Path), show_default=True)
@click.option("--n_prompts", type=int, help="Only so many, of each kind in turn.")
@click.option("--temperature", default="0,0.8", show_default=True)
@click.option("--max_tokens", default=96, show_default=True)
@click.option("--before", default=0, show_default=True, help="Requests before measuring.")
def main(
    models: tuple[Path, ...],
    prompts: Path,
    n_prompts: int | None,
    temperature: str,
    max_tokens: int,
    before: int,
) -> None:
    """Measure files against llama-server."""
    tasks = in_turn(read_tasks(prompts))[:n_prompts]
    temperatures = [float(part) for part in temperature.split(",")]
    click.echo(HEADER)
    results = [measure_model(path, temperatures, tasks, max_tokens, before) for path in models]
    out = ROOT / "benchmarks" / "results"
    names = [Path(part).name if part.endswith(".gguf") else part for part in sys.argv[1:]]
    command = " ".join(["python benchmarks/real_models.py", *names])
    write_json(out / "real_models.json", {"command": command, "files": results})
    named = [
        (each["file"], line) for each in results for rows in each["rows"].values() for line in rows
    ]
    lines = [markdown_row(file, line) for file, line in named]
    kinds = list(dict.fromkeys(task.kind for task in tasks))
    by_kind = [
        f"| file | T | way, ÷ this, plain | {' | '.join(kinds)} |",
        "|---|---|---|" + "---|" * len(kinds),
    ]
    by_kind += [
        f"| {file} | {line['temperature']} | {line['way']} | "
        + " | ".join(f"{line['against_plain_by_kind'][kind]:.2f}" for kind in kinds)
        + " |"
        for file, line in named
    ]
    memory = [f"{each['file']}: {each['memory_mib']:.0f} MiB" for each in results]
    text = "\n".join(
        [f"`{command}`", "", HEADER, *lines, "", *by_kind, "", "Memory (PSS): " + "; ".join(memory)]
    )
    (out / "real_models.md").write_text(f"# Real models\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
