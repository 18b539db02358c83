"""Clients that leave, stall or send anything at all."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
from asgi import Connection
from fake_worker import FakeWorker

from benchmarks.fuzz import bodies
from model.serving.http.app import ServerOptions, create_app

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def worker() -> FakeWorker:
    return FakeWorker()


async def turns() -> None:
    """Let every task go on that can: no timer fires, so no step of the worker passes."""
    for _ in range(25):
        await asyncio.sleep(0)


async def until(holds: Callable[[], bool]) -> None:
    """Wait for what must come to be within ten seconds."""
    for _ in range(2000):
        if holds():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come to be")


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_leaves_frees_its_slots_at_once(streaming: bool, worker: FakeWorker) -> None:
    async def leave() -> None:
        worker.step_s = 0.01
        app = create_app(worker, ServerOptions())
        connection = Connection(
            app, {"prompt": "a", "max_tokens": 500, "stream": streaming, "n": 3}
        )
        await until(lambda: len(worker.alive) == 3)
        assert worker.running == 2 and worker.queue_length == 1
        connection.left.set()
        await turns()
        assert not worker.alive and len(worker.cancelled) == 3
        await asyncio.wait_for(connection.task, 10)
        assert not any(b"[DONE]" in m.get("body", b"") for m in connection.sent)

    asyncio.run(leave())


def test_a_client_that_waits_in_the_queue_may_leave_too(worker: FakeWorker) -> None:
    async def leave() -> None:
        worker.step_s = 0.01
        app = create_app(worker, ServerOptions())
        body = {"prompt": "a", "max_tokens": 500, "stream": True}
        connections = [Connection(app, body) for _ in range(3)]
        await until(lambda: worker.queue_length == 1 and bool(connections[0].sent))
        assert not connections[2].sent
        connections[2].left.set()
        await turns()
        assert worker.queue_length == 0 and worker.running == 2 and len(worker.cancelled) == 1
        for connection in connections:
            connection.left.set()
        await asyncio.gather(*(c.task for c in connections))

    asyncio.run(leave())


def test_a_slow_reader_keeps_no_slot_and_its_time_is_limited(worker: FakeWorker) -> None:
    async def stall() -> None:
        app = create_app(worker, ServerOptions(request_timeout_s=1))
        connection = Connection(app, {"prompt": "a", "max_tokens": 50, "stream": True})
        connection.reading.clear()
        await until(lambda: len(worker.requests) == 1 and not worker.alive)
        assert not connection.task.done(), "the text is finished though nobody has read it"
        await asyncio.wait_for(connection.task, 10)
        assert connection.sent == []

    asyncio.run(stall())


def test_slots_show_what_runs(worker: FakeWorker) -> None:
    async def look() -> Any:
        worker.step_s = 0.01
        app = create_app(worker, ServerOptions())
        connection = Connection(
            app, {"prompt": "secret", "max_tokens": 500, "draft": "medusa"}
        )  # an alias
        await until(lambda: bool(worker.requests))
        while True:
            _, slots = await Connection(app, b"", "/slots").answer()
            if json.loads(slots)[0].get("n_decoded"):
                break
        connection.left.set()
        await connection.task
        return json.loads(slots)

    busy, idle = asyncio.run(look())
    assert busy["is_processing"] and busy["n_decoded"] >= 1 and busy["draft"] == "heads"
    assert (busy["n_prompt_tokens"], busy["n_prompt_tokens_cached"]) == (
        6,
        3,
    ) and "secret" not in json.dumps(busy)
    assert (
        0 <= busy["n_accepted"] < busy["n_decoded"] and busy["n_remain"] == 500 - busy["n_decoded"]
    )
    assert busy["tokens_per_second"] > 0 == busy["temperature"] - 1
    assert idle == {"id": 1, "is_processing": False}


def test_thousands_of_random_bodies_never_make_a_5xx() -> None:
    """The fuzz of benchmarks/hardening.py, on every route that takes a body."""
    worker, seen = FakeWorker(max_queue=1000, context=64), Counter[int]()

    async def ask_all() -> None:
        app = create_app(worker, ServerOptions())
        for path, body in islice(bodies(0), 3000):
            status, answer = await Connection(app, body, path).answer()
            seen[status] += 1
            assert status in (200, 400), (path, body, answer)
            if status == 400:
                assert json.loads(answer)["error"]["type"] == "invalid_request_error"

    asyncio.run(ask_all())
    assert not worker.alive and min(seen[200], seen[400]) > 500, seen
