"""What must not bring the server down: senseless bodies, clients that vanish, crowds, the death of its model's process.

    python benchmarks/hardening.py

Starts `main.py` with the bundled model on one thread, does all of it, and writes hardening.json under
benchmarks/results/. The tests make smaller shares of the same.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
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

from benchmarks.fuzz import bodies  # noqa: E402
from benchmarks.serve import Server, server  # noqa: E402
from model.measuring.report import write_json  # noqa: E402

LONG = {"prompt": "import os\n", "max_tokens": 900, "logit_bias": {"2": -100}, "stream": True}
PATIENCE_S = 60.0


async def call(address: str, method: str, path: str, body: bytes = b"", *, leave_after: int = 0) -> tuple[int, bytes]:
    """Return status and body of an answer, whatever it is; a client that is to leave does so after so many bytes."""
    place = urlsplit(address)
    reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=1 << 22)
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    try:
        writer.write(head.encode() + body)
        answer = await asyncio.wait_for(reader.read(leave_after) if leave_after else reader.read(), PATIENCE_S)
    finally:
        writer.transport.abort() if leave_after else writer.close()
    status, _, rest = answer.partition(b"\r\n")
    return int(status.split()[1]), rest.partition(b"\r\n\r\n")[2]


async def fuzz(address: str, n: int, seed: int = 0, at_once: int = 8) -> dict[str, Any]:
    """Send n bodies; return how often each status came, and the bodies that the server could not cope with."""
    waiting, statuses, bad = islice(bodies(seed), n), Counter[int](), list[str]()

    async def client() -> None:
        for path, body in waiting:
            try:
                status, answer = await call(address, "POST", path, body)
            except (OSError, IndexError, asyncio.TimeoutError) as error:
                status, answer = 0, repr(error).encode()
            statuses[status] += 1
            if status == 0 or status >= 500 or b'"server_error"' in answer:
                bad.append(f"{status} {path} {body[:300]!r} {answer[:300]!r}")

    await asyncio.gather(*(client() for _ in range(at_once)))
    return {"bodies": n, "statuses": dict(sorted(statuses.items())), "bad": bad}


async def busy(address: str) -> int:
    """Return how many texts run or wait."""
    _, page = await call(address, "GET", "/metrics")
    lines = [line.split() for line in page.decode().splitlines()]
    return sum(int(float(line[1])) for line in lines if line[0] in ("medusa_running", "medusa_queue_length"))


async def freed(address: str) -> float:
    """Return the seconds until a short text has been written: behind all that still run or wait in the process."""
    since, body = perf_counter(), json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    while (await call(address, "POST", "/v1/completions", body))[0] == 429 and perf_counter() - since < PATIENCE_S:
        await asyncio.sleep(0.01)
    return perf_counter() - since


async def vanish(address: str, n: int) -> dict[str, Any]:
    """Let n clients ask for long streams and leave in the middle; return the seconds until all places are free."""
    body, began = json.dumps(LONG).encode(), perf_counter()
    statuses = await asyncio.gather(
        *(call(address, "POST", "/v1/completions", body, leave_after=64) for _ in range(n)), return_exceptions=True
    )
    all_s = perf_counter() - began
    seen = Counter(s[0] if isinstance(s, tuple) else repr(s) for s in statuses)
    return {"clients": n, "statuses": dict(seen), "all_s": all_s, "free_after_s": await freed(address)}


async def leave_at_once(address: str, n: int, after_s: float) -> dict[str, Any]:
    """Let n clients ask for long streams and leave at the same time; return the seconds until all places are free."""
    place, body = urlsplit(address), json.dumps(LONG).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    clients = await asyncio.gather(*(asyncio.open_connection(place.hostname, place.port) for _ in range(n)))
    for _, writer in clients:
        writer.write(head + body)
    await asyncio.sleep(after_s)
    most = await busy(address)
    for _, writer in clients:
        writer.transport.abort()
    return {"clients": n, "texts": most, "free_after_s": await freed(address)}


async def crowd(address: str, n: int, tokens: int) -> dict[str, Any]:
    """Let n clients ask at once; return how often each status came."""
    body = json.dumps({"prompt": "import os\n", "max_tokens": tokens}).encode()
    answers = await asyncio.gather(
        *(call(address, "POST", "/v1/completions", body) for _ in range(n)), return_exceptions=True
    )
    seen = Counter(a[0] if isinstance(a, tuple) else repr(a) for a in answers)
    return {"clients": n, "statuses": {str(k): v for k, v in seen.items()}}


async def kill_under_load(address: str, pid: int, n: int) -> dict[str, Any]:
    """Kill the model's process while n texts are written; return what their clients got and when all was well again."""
    body = json.dumps(LONG | {"stream": False}).encode()
    asked = [asyncio.create_task(call(address, "POST", "/v1/completions", body)) for _ in range(n)]
    while await busy(address) < n:
        await asyncio.sleep(0.01)
    (child,) = children(pid)
    os.kill(child, signal.SIGKILL)
    since = perf_counter()
    answers = [await a for a in asked]
    while (await call(address, "GET", "/health"))[0] != 200 and perf_counter() - since < PATIENCE_S:
        await asyncio.sleep(0.02)
    back = perf_counter() - since
    (new,) = children(pid)
    after = await call(address, "POST", "/v1/completions", json.dumps({"prompt": "x", "max_tokens": 4}).encode())
    told = all(set(json.loads(answer)) == {"error"} for _, answer in answers)
    return {
        "clients": n, "statuses": dict(Counter(status for status, _ in answers)), "structured": told,
        "ready_after_s": back, "another_process": new != child, "writes_again": after[0] == 200,
    }  # fmt: skip


def children(pid: int) -> list[int]:
    """Return the processes that a process has started and that still run; of the server: its model's."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = stat.read_text().rpartition(") ")[2].split()[:2]
            tracker = "resource_tracker" in (stat.parent / "cmdline").read_text()  # of multiprocessing
            if int(parent) == pid and state != "Z" and not tracker:
                found.append(int(stat.parent.name))
    return found


def memory_mb(pid: int) -> float:
    """Return the resident memory of a process and of its children."""
    pages = sum(int(Path(f"/proc/{p}/statm").read_text().split()[1]) for p in (pid, *children(pid)))
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def trials(running: Server, n_fuzz: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Do everything in turn; yield names and results."""
    address, pid = running.address, running.pid
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
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "benchmarks" / "results" / "hardening.json")
def main(n_fuzz: int, out: Path) -> None:
    """Try to bring the server down."""
    results: dict[str, Any] = {"command": " ".join(["python", "benchmarks/hardening.py", *sys.argv[1:]])}
    with server(N_PARALLEL="4", MAX_QUEUE="250", N_THREADS="1") as running:
        for name, result in trials(running, n_fuzz):
            results[name] = result
            click.echo(f"{name}: {json.dumps(result)}")
            write_json(out, results)


if __name__ == "__main__":
    main()
