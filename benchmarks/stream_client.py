"""A client that streams completions and notes when their parts came. Knows no server."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import click


@dataclass
class Answer:
    """One completion as its client saw it.

    first_s, rest_s: seconds to its first text, and from there to its end. timings: the server's.
    """

    first_s: float
    rest_s: float
    timings: dict[str, Any]

    @property
    def tokens(self) -> int:
        """New tokens."""
        return int(self.timings["predicted_n"])


async def ask(address: str, path: str = "/v1/completions", **fields: Any) -> Answer:
    """Stream one completion. By hand: a client library would take more time than the server."""
    url = urlsplit(address)
    body = json.dumps({"stream": True, **fields}).encode()
    headers = f"Host: localhost\r\nContent-Length: {len(body)}\r\nConnection: close"
    head = f"POST {path} HTTP/1.1\r\n{headers}\r\n\r\n".encode()
    reader, writer = await asyncio.open_connection(url.hostname, url.port, limit=1 << 20)
    began = perf_counter()
    first = 0.0
    last = 0.0
    timings = None
    writer.write(head + body)
    async for line in reader:
        if line.startswith(b"data: {"):
            last = perf_counter()
            if not first and _has_text(json.loads(line[6:])):
                first = last
            if b'"timings"' in line:
                timings = json.loads(line[6:])["timings"]
        elif line.startswith(b"{"):
            raise click.ClickException(line.decode())
    writer.close()
    if timings is None:
        raise click.ClickException("a completion was not finished")
    first = first or last  # it came to nothing
    return Answer(first - began, last - first, timings)


def _has_text(event: dict[str, Any]) -> bool:
    """Say whether an event brings text: the first one of a chat names the role alone."""
    choice = event["choices"][0]
    return bool(choice.get("text") or choice.get("delta", {}).get("content"))


async def load(
    address: str, prompts: list[list[int]], streams: int, **fields: Any
) -> tuple[list[Answer], float]:
    """Continue all prompts, so many at a time.

    Returns the answers, and the seconds from first to last.
    """
    waiting = list(enumerate(prompts))
    answers = list[Answer]()

    async def stream() -> None:
        while waiting:
            seed, prompt = waiting.pop(0)
            answers.append(await ask(address, prompt=prompt, seed=seed, **fields))

    began = perf_counter()
    await asyncio.gather(*(stream() for _ in range(streams)))
    return answers, perf_counter() - began
