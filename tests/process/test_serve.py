"""`python main.py` without a command, and OpenAI's own client against a real socket."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from asgi import on_a_socket
from fake_worker import FakeWorker

from commands.serve import banner, shown_host
from config import ROOT
from model.errors import UsageError
from model.serving.http.app import ServerOptions, create_app
from model.serving.http.connections import listen

KEY = "sk-1"
SCRIPT = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from fake_worker import FakeWorker
import commands.serve
def start_worker(settings):
    worker = FakeWorker(slots=settings.n_parallel, max_queue=settings.max_queue, step_s=0.02)
    worker.refusal = {refusal!r}
    return worker
commands.serve.start_worker = start_worker
from main import cli
cli([])
"""


@pytest.fixture(scope="module")
def worker() -> FakeWorker:
    return FakeWorker(step_s=0.001)


@pytest.fixture(scope="module")
def address(worker: FakeWorker) -> Iterator[str]:
    with on_a_socket(create_app(worker, ServerOptions(api_key=KEY)), worker) as address:
        yield address
    assert worker.closed_with == 0.5


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def ask(**fields: Any) -> Any:
    return {
        "model": "any",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 40,
        "seed": 1,
        **fields,
    }


def test_openais_client_completes(client: openai.OpenAI) -> None:
    whole = client.completions.create(
        model="any", prompt="hello", max_tokens=40, seed=1, logprobs=2, n=2
    )
    assert (
        [c.index for c in whole.choices] == [0, 1]
        and whole.usage
        and whole.usage.completion_tokens == 80
    )
    assert whole.choices[0].logprobs and len(whole.choices[0].logprobs.tokens or []) == 40
    streamed = client.completions.create(
        model="any", prompt="hello", max_tokens=40, seed=1, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text


def test_openais_client_chats(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**ask(logprobs=True, top_logprobs=2))
    assert whole.choices[0].logprobs and len(whole.choices[0].logprobs.content or []) == 40
    chunks = list(
        client.chat.completions.create(**ask(stream=True, stream_options={"include_usage": True}))
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and chunks[-1].usage == whole.usage
    assert chunks[-1].model_extra and chunks[-1].model_extra["timings"]["acceptance_length"] > 1
    with client.chat.completions.stream(**ask(stop="a")) as helper:
        assert (
            helper.get_final_completion().choices[0].message.content == text.split("a")[0] != text
        )


def test_openais_client_takes_a_schema(client: openai.OpenAI, worker: FakeWorker) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    client.chat.completions.create(**ask(response_format=form))
    assert worker.requests[-1].json_schema == schema
    client.chat.completions.create(**ask(extra_body={"draft": "none", "grammar": "root ::= [a-z]"}))
    assert (worker.requests[-1].draft, worker.requests[-1].grammar) == ("none", "root ::= [a-z]")


def test_openais_client_knows_our_errors(client: openai.OpenAI, address: str) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature=3") as error:
        client.chat.completions.create(**ask(temperature=3))
    assert error.value.param == "temperature" and error.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    with pytest.raises(openai.RateLimitError, match="queue is full"):
        client.completions.create(model="any", prompt="a", n=50)
    with pytest.raises(openai.InternalServerError, match="the worker died"):
        client.completions.create(model="any", prompt="FAIL")
    with pytest.raises(openai.APIError, match="the worker died"):
        list(client.completions.create(model="any", prompt="FAIL LATER", stream=True))
    stranger = openai.OpenAI(base_url=f"{address}/v1", api_key="sk-2", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError, match="valid API key"):
        stranger.models.list()
    assert [model.id for model in client.models.list()] == ["fake"]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 2
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_client_that_hangs_up_frees_its_slot(client: openai.OpenAI, worker: FakeWorker) -> None:
    before = len(worker.cancelled)
    with client.completions.create(
        model="any", prompt="a", max_tokens=500, stream=True
    ) as streamed:
        next(iter(streamed))
        assert len(worker.alive) == 1
    wait_until(lambda: not worker.alive)
    assert len(worker.cancelled) == before + 1


def test_clients_that_vanish_free_all_slots(
    address: str, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "step_s", 0.02)
    host, port = address.removeprefix("http://").split(":")
    sockets = []
    for i in range(6):  # two run, four wait
        body = json.dumps({"prompt": "a", "max_tokens": 500, "stream": i % 2 == 0})
        sockets.append(socket.create_connection((host, int(port))))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
        sockets[-1].sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    wait_until(lambda: len(worker.alive) == 6)
    for one in sockets:
        one.close()
    wait_until(lambda: not worker.alive)


def test_main_without_a_command_serves_until_it_is_told_to_end() -> None:
    script = SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"), refusal="")
    env = {
        **os.environ,
        "PORT": "0",
        "HOST": "127.0.0.1",
        "SHUTDOWN_TIMEOUT": "5",
        "N_PARALLEL": "3",
    }
    command = [sys.executable, "-c", script]
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout and server.stderr
        assert server.stdout.readline() == (
            "fake (F32), 512 tokens of context, 3 sequences at once, KV cache of 1,536 tokens\n"
        )
        assert server.stdout.readline() == "drafts: three heads\n"
        address = server.stdout.readline().split()[-1]
        assert server.stdout.readline().startswith(f"  curl {address}/v1/completions -H ")
        body = json.dumps({"prompt": "a", "max_tokens": 60}).encode()
        request = urllib.request.Request(
            f"{address}/v1/completions", body, {"Content-Type": "application/json"}
        )
        answers: list[Any] = []
        thread = threading.Thread(
            target=lambda: answers.append(json.load(urllib.request.urlopen(request)))
        )
        thread.start()
        time.sleep(0.3)  # it is being answered
        server.send_signal(signal.SIGTERM)
        thread.join(10)
        assert answers[0]["usage"]["completion_tokens"] == 60, "what runs is finished"
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(f"{address}/health")
        assert server.wait(10) in (0, -signal.SIGTERM)
        assert server.stderr.read() == ""


def test_what_cannot_finish_before_the_deadline_fails() -> None:
    script = SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"), refusal="")
    env = {**os.environ, "PORT": "0", "HOST": "127.0.0.1", "SHUTDOWN_TIMEOUT": "1"}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout and server.stderr
        address = [server.stdout.readline() for _ in range(3)][-1].split()[-1]
        body = json.dumps({"prompt": "a", "max_tokens": 500, "stream": True}).encode()
        request = urllib.request.Request(
            f"{address}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as stream:
            first = stream.readline()
            server.send_signal(signal.SIGTERM)
            rest = stream.read().decode()
        assert (
            b"choices" in first and "the server is shutting down" in rest.strip().splitlines()[-1]
        )
        assert server.wait(10) in (0, -signal.SIGTERM)
        assert server.stderr.read() == ""


def test_a_client_that_keeps_silent_is_disconnected(worker: FakeWorker) -> None:
    waiting = FakeWorker(step_s=0.02)
    with on_a_socket(create_app(waiting, ServerOptions()), waiting, head_s=0.3) as address:
        host, port = address.removeprefix("http://").split(":")
        since, body = time.monotonic(), b'{"prompt": "a", "max_tokens": 60}'
        with (
            socket.create_connection((host, int(port))) as silent,
            socket.create_connection((host, int(port))) as slow,
        ):
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
            request = urllib.request.Request(
                f"{address}/v1/completions", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request) as answer:  # takes longer than a silent client has
                assert json.load(answer)["usage"]["completion_tokens"] == 60
            assert time.monotonic() - since > 0.3
            assert silent.recv(1) == b"" and slow.recv(1) == b""


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    script = SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"), refusal="the heads don't fit")
    command, env = [sys.executable, "-c", script], {**os.environ, "PORT": "0"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (2, "error: the heads don't fit\n")


def test_a_taken_port_is_reported_in_one_line() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(
            UsageError,
            match=f"cannot listen on HOST=127.0.0.1, PORT={port}: Address already in use",
        ):
            listen("127.0.0.1", port)
    with pytest.raises(UsageError, match=r"HOST=no\.such\.host\.invalid"):
        listen("no.such.host.invalid", 0)


def test_addresses_and_greeting() -> None:
    assert [shown_host(h) for h in ("0.0.0.0", "::", "::1", "box")] == [
        "127.0.0.1",
        "[::1]",
        "[::1]",
        "box",
    ]
    assert '-H "Authorization: Bearer $API_KEY"' in banner(FakeWorker(), "http://a", key=True)
    assert "Authorization" not in banner(FakeWorker(), "http://a", key=False)


def test_an_open_door_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import commands.serve as module

    async def nothing(*_: object) -> None: ...

    monkeypatch.setattr(module, "run", nothing)
    monkeypatch.setattr("model.serving.http.connections.listen", lambda *_: socket.socket())
    for host, key, warned in (
        ("0.0.0.0", "", True),
        ("0.0.0.0", "sk-1", False),
        ("127.0.0.1", "", False),
    ):
        monkeypatch.setenv("HOST", host)
        monkeypatch.setenv("API_KEY", key)
        module.serve.main([], standalone_mode=False)
        assert ("no API_KEY" in capsys.readouterr().err) is warned


def test_the_bundled_model_is_served_and_ends_without_a_trace(bundled_gguf: Path) -> None:
    env = {
        **os.environ,
        "PORT": "0",
        "HOST": "127.0.0.1",
        "N_PARALLEL": "2",
        "MODEL_CONTEXT_SIZE": "256",
    }
    command = [sys.executable, str(ROOT / "main.py"), "serve"]
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout and server.stderr
        greeting = [server.stdout.readline() for _ in range(4)]
        address = greeting[2].split()[-1]
        with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
            ask_for: dict[str, Any] = {
                "model": "any",
                "prompt": "import os\n",
                "max_tokens": 24,
                "temperature": 0,
            }
            whole = client.completions.create(**ask_for)
            streamed = client.completions.create(**ask_for, stream=True)
            assert (
                "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text != ""
            )
            assert whole.usage and whole.usage.completion_tokens == 24
            schema = {
                "type": "object",
                "properties": {"a": {"type": "boolean"}, "b": {"enum": [1, 2]}},
            }
            form: Any = {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {**schema, "required": ["a", "b"]}},
            }
            chat = client.chat.completions.create(
                **ask(temperature=0, max_tokens=60, response_format=form)
            )
            answer = json.loads(chat.choices[0].message.content or "")
            assert type(answer["a"]) is bool and answer["b"] in (1, 2)
        server.send_signal(signal.SIGINT)
        assert server.wait(20) in (0, -signal.SIGINT, 130)


def test_a_model_that_cannot_be_served_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py")],
        env={**os.environ, "PORT": "0", "MODEL_PATH": "nowhere.gguf"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and "nowhere.gguf" in done.stderr
    )
    assert done.stderr.count("\n") == 1
