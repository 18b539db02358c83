"""Clients that leave, stall or send anything at all."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from asgi import Connection
from fake_worker import FakeWorker

from model.serving.app import ServerOptions, create_app

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def worker() -> FakeWorker:
    return FakeWorker()


async def turns() -> None:
    """Let every task that can go on do so; no timer needs to fire, so no step of the worker passes."""
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
def test_a_client_that_leaves_frees_its_places_at_once(streaming: bool, worker: FakeWorker) -> None:
    async def leave() -> None:
        worker.step_s = 0.01
        app = create_app(worker, ServerOptions())
        connection = Connection(app, {"prompt": "a", "max_tokens": 500, "stream": streaming, "n": 3})
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


def test_a_slow_reader_keeps_no_place_and_its_time_is_limited(worker: FakeWorker) -> None:
    async def stall() -> None:
        app = create_app(worker, ServerOptions(request_timeout_s=1))
        connection = Connection(app, {"prompt": "a", "max_tokens": 50, "stream": True})
        connection.reading.clear()
        await until(lambda: len(worker.jobs) == 1 and not worker.alive)
        assert not connection.task.done(), "the text is finished though nobody has read it"
        await asyncio.wait_for(connection.task, 10)
        assert connection.sent == []

    asyncio.run(stall())


def test_slots_show_what_runs(worker: FakeWorker) -> None:
    async def look() -> Any:
        worker.step_s = 0.01
        app = create_app(worker, ServerOptions())
        connection = Connection(app, {"prompt": "secret", "max_tokens": 500, "draft": "medusa"})
        await until(lambda: bool(worker.jobs))
        while True:
            _, slots = await Connection(app, b"", "/slots").answer()
            if json.loads(slots)[0].get("n_decoded"):
                break
        connection.left.set()
        await connection.task
        return json.loads(slots)

    busy, idle = asyncio.run(look())
    assert busy["is_processing"] and busy["n_decoded"] >= 1 and busy["draft"] == "medusa"
    assert (busy["n_prompt_tokens"], busy["n_prompt_tokens_cached"]) == (6, 3) and "secret" not in json.dumps(busy)
    assert idle == {"id": 1, "is_processing": False}


def test_thousands_of_random_bodies_never_make_a_5xx() -> None:
    """Fields of the right name with values of all kinds, whole and broken, on every route that takes a body."""
    dice = random.Random(0)
    worker = FakeWorker(max_queue=1000, context=64)
    names = [
        "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed",
        "stop", "stream", "stream_options", "n", "logprobs", "top_logprobs", "echo", "logit_bias", "presence_penalty",
        "frequency_penalty", "repeat_penalty", "user", "response_format", "grammar", "draft", "typical_acceptance",
        "token_details", "best_of", "suffix", "chat_template", "tools", "content", "tokens", "model", "\ud800", "",
    ]  # fmt: skip
    values: list[Any] = [
        None, True, False, 0, 1, 2, -1, 0.5, 1e308, -1e-308, 2**31, 2**63, 2**70, "", "a", "none", "auto", "\x00",
        "\ud800", "😀\u2028", "a" * 70, [], {}, [1], [[1, 2], [3]], ["a", "b"], [True], [None], [0x10FFFF, 0x110000],
        [0xD800], {"1": 5}, {"-1": 5}, {"include_usage": True}, {"type": "json_object"}, {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"schema": {}}}, HELLO, [{"role": "user"}],
        [{"role": "tool", "content": ""}], [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
    ]  # fmt: skip
    paths = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/apply-template"]
    seen: dict[int, int] = {}

    async def ask_all() -> None:
        app = create_app(worker, ServerOptions())
        for _ in range(3000):
            body: dict[str, Any] = {name: dice.choice(values) for name in dice.sample(names, dice.randint(0, 3))}
            if dice.random() < 0.8:
                body = {"prompt": "a", "messages": HELLO, "content": "a", "tokens": [1], "max_tokens": 3} | body
            raw = json.dumps(body).encode()
            if dice.random() < 0.2:
                at = dice.randrange(len(raw))
                raw = raw[:at] + bytes([dice.randrange(256)]) + raw[at + dice.randint(0, 3) :]
            status, answer = await Connection(app, raw, dice.choice(paths)).answer()
            seen[status] = seen.get(status, 0) + 1
            assert status in (200, 400), (raw, answer)
            if status == 400:
                assert json.loads(answer)["error"]["type"] == "invalid_request_error"

    asyncio.run(ask_all())
    assert not worker.alive and min(seen[200], seen[400]) > 500, seen
