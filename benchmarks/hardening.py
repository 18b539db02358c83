"""The trials that must not bring the server down.

Senseless bodies, clients that vanish, crowds, the death of its model's process.

    python benchmarks/hardening.py

Starts `main.py` with the bundled model on one thread, does all of it, and writes hardening.json
under benchmarks/results/. The tests make smaller shares of the same. Knows nothing of speed.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
    sys.path[0] = str(ROOT)

import click  # noqa: E402

from benchmarks.fuzz import bodies  # noqa: E402
from benchmarks.server_process import Server, server  # noqa: E402
from model.evaluation.report import write_json  # noqa: E402

LONG: dict[str, Any] = {
    "prompt": "import os\n",
    "max_tokens": 900,
    "logit_bias": {"2": -100},  # no end of generation
    "stream": True,
}
SHORT: dict[str, Any] = {"prompt": "x", "max_tokens": 1}
PATIENCE_S = 60.0


class Response(NamedTuple):
    """What a client got. status: 0 where it was no HTTP."""

    status: int
    body: bytes


def request_head(method: str, path: str, n_bytes: int) -> bytes:
    """Return the head of a request whose connection is not kept."""
    headers = f"Host: localhost\r\nConnection: close\r\nContent-Length: {n_bytes}"
    return f"{method} {path} HTTP/1.1\r\n{headers}\r\n\r\n".encode()


async def call(
    address: str, method: str, path: str, body: bytes = b"", *, leave_after: int = 0
) -> Response:
    """Return status and body of a response, whatever it is.

    leave_after: bytes after which the client leaves; 0: it stays.
    """
    url = urlsplit(address)
    reader, writer = await asyncio.open_connection(url.hostname, url.port, limit=1 << 22)
    try:
        writer.write(request_head(method, path, len(body)) + body)
        reading = reader.read(leave_after or -1)
        answer = await asyncio.wait_for(reading, PATIENCE_S)
    finally:
        if leave_after:
            writer.transport.abort()
        else:
            writer.close()
    status, _, rest = answer.partition(b"\r\n")
    return Response(int(status.split()[1]), rest.partition(b"\r\n\r\n")[2])


async def complete(address: str, fields: dict[str, Any], *, leave_after: int = 0) -> Response:
    """Ask for a completion; see `call`."""
    body = json.dumps(fields).encode()
    return await call(address, "POST", "/v1/completions", body, leave_after=leave_after)


def count_statuses(answers: Iterable[Response | BaseException]) -> dict[str, int]:
    """Return how often each status or error came."""
    seen = Counter[str]()
    for answer in answers:
        name = repr(answer) if isinstance(answer, BaseException) else str(answer.status)
        seen[name] += 1
    return dict(seen)


async def fuzz(address: str, n: int, seed: int = 0, at_once: int = 8) -> dict[str, Any]:
    """Send n bodies; return how often each status came, and the bodies that made a 5xx."""
    waiting = islice(bodies(seed), n)
    statuses = Counter[int]()
    bad = list[str]()

    async def client() -> None:
        for path, body in waiting:
            try:
                response = await call(address, "POST", path, body)
            except (OSError, IndexError, asyncio.TimeoutError) as error:
                response = Response(0, repr(error).encode())
            status, answer = response
            statuses[status] += 1
            if status == 0 or status >= 500 or b'"server_error"' in answer:
                bad.append(f"{status} {path} {body[:300]!r} {answer[:300]!r}")

    await asyncio.gather(*(client() for _ in range(at_once)))
    return {"bodies": n, "statuses": dict(sorted(statuses.items())), "bad": bad}


async def busy(address: str) -> int:
    """Return how many sequences run or wait."""
    metrics = await call(address, "GET", "/metrics")
    n = 0
    for line in metrics.body.decode().splitlines():
        name, value, *_ = line.split()
        if name in ("medusa_running", "medusa_queue_length"):
            n += int(float(value))
    return n


async def freed(address: str) -> float:
    """Return the seconds until a short completion is there, behind all that still run or wait."""
    began = perf_counter()
    while True:
        response = await complete(address, SHORT)
        seconds = perf_counter() - began
        if response.status != 429 or seconds >= PATIENCE_S:
            return seconds
        await asyncio.sleep(0.01)


async def vanish(address: str, n: int) -> dict[str, Any]:
    """Let n clients ask for long streams and leave in the middle.

    Returns the seconds until all slots are free.
    """
    began = perf_counter()
    answers = await asyncio.gather(
        *(complete(address, LONG, leave_after=64) for _ in range(n)), return_exceptions=True
    )
    all_s = perf_counter() - began
    return {
        "clients": n,
        "statuses": count_statuses(answers),
        "all_s": all_s,
        "free_after_s": await freed(address),
    }


async def leave_at_once(address: str, n: int, after_s: float) -> dict[str, Any]:
    """Let n clients ask for long streams and leave at the same time.

    Returns the seconds until all slots are free.
    """
    url = urlsplit(address)
    body = json.dumps(LONG).encode()
    clients = await asyncio.gather(
        *(asyncio.open_connection(url.hostname, url.port) for _ in range(n))
    )
    for _, writer in clients:
        writer.write(request_head("POST", "/v1/completions", len(body)) + body)
    await asyncio.sleep(after_s)
    n_busy = await busy(address)
    for _, writer in clients:
        writer.transport.abort()
    return {"clients": n, "sequences": n_busy, "free_after_s": await freed(address)}


async def crowd(address: str, n: int, tokens: int) -> dict[str, Any]:
    """Let n clients ask at once; return how often each status came."""
    fields = {"prompt": "import os\n", "max_tokens": tokens}
    answers = await asyncio.gather(
        *(complete(address, fields) for _ in range(n)), return_exceptions=True
    )
    return {"clients": n, "statuses": count_statuses(answers)}


async def kill_under_load(address: str, pid: int, n: int) -> dict[str, Any]:
    """Kill the model's process while n sequences are generated.

    Returns what their clients got, and when the server was ready again.
    """
    fields = LONG | {"stream": False}
    asked = [asyncio.create_task(complete(address, fields)) for _ in range(n)]
    while await busy(address) < n:
        await asyncio.sleep(0.01)
    (child,) = children(pid)
    os.kill(child, signal.SIGKILL)

    # Ready again?
    began = perf_counter()
    answers = [await each for each in asked]
    ready = False
    while not ready and perf_counter() - began < PATIENCE_S:
        ready = (await call(address, "GET", "/health")).status == 200
        if not ready:
            await asyncio.sleep(0.02)
    ready_after_s = perf_counter() - began
    (new,) = children(pid)
    afterwards = await complete(address, SHORT)
    return {
        "clients": n,
        "statuses": dict(Counter(answer.status for answer in answers)),
        "structured": all(set(json.loads(answer.body)) == {"error"} for answer in answers),
        "ready_after_s": ready_after_s,
        "another_process": new != child,
        "generates_again": afterwards.status == 200,
    }


def children(pid: int) -> list[int]:
    """Return the running children of a process; of the server: its model's process."""
    found = list[int]()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = stat.read_text().rpartition(") ")[2].split()[:2]
            command = (stat.parent / "cmdline").read_text()
            of_multiprocessing = "resource_tracker" in command
            if int(parent) == pid and state != "Z" and not of_multiprocessing:
                found.append(int(stat.parent.name))
    return found


def memory_mb(pid: int) -> float:
    """Return the resident memory of a process and of its children."""
    pages = sum(int(Path(f"/proc/{p}/statm").read_text().split()[1]) for p in (pid, *children(pid)))
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def trials(running: Server, n_fuzz: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Do everything in turn; yield names and results."""
    address = running.address
    pid = running.pid
    (before,) = children(pid)
    result = asyncio.run(fuzz(address, n_fuzz))
    yield "fuzz", {**result, "same_process": children(pid) == [before]}
    asyncio.run(crowd(address, 500, 4))  # memory that is taken once
    before_mb = memory_mb(pid)
    for _ in range(2):
        result = asyncio.run(crowd(address, 500, 4))
    yield "crowd", {**result, "memory_before_mb": before_mb, "memory_after_mb": memory_mb(pid)}
    yield "leave", asyncio.run(leave_at_once(address, 200, 1.0))
    yield "vanish", asyncio.run(vanish(address, 200))
    yield "kill", asyncio.run(kill_under_load(address, pid, 8))


@click.command()
@click.option("--bodies", "n_fuzz", default=10_000, show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=ROOT / "benchmarks" / "results" / "hardening.json",
)
def main(n_fuzz: int, out: Path) -> None:
    """Try to bring the server down."""
    results: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/hardening.py", *sys.argv[1:]])
    }
    with server(N_PARALLEL="4", MAX_QUEUE="250", N_THREADS="1") as running:
        for name, result in trials(running, n_fuzz):
            results[name] = result
            click.echo(f"{name}: {json.dumps(result)}")
            write_json(out, results)


if __name__ == "__main__":
    main()
