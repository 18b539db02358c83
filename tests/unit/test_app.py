"""The server around a worker without a model: answers, streams, errors, metrics."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asgi import Connection
from fake_worker import FakeWorker
from starlette.testclient import TestClient

from model.serving.http.app import ServerOptions, create_app

ROOT = Path(__file__).resolve().parents[2]
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def worker() -> FakeWorker:
    return FakeWorker()


@pytest.fixture
def client(worker: FakeWorker) -> Iterator[TestClient]:
    with open_client(worker) as client:
        yield client


def open_client(worker: FakeWorker, **options: Any) -> TestClient:
    app = create_app(worker, ServerOptions(**options))
    return TestClient(app, base_url="http://localhost:8000", raise_server_exceptions=False)


def complete(client: TestClient, prompt: Any = "a", status: int = 200, **fields: Any) -> Any:
    response = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 40, **fields})
    assert response.status_code == status, response.text
    return response.json()


def chat(client: TestClient, status: int = 200, **fields: Any) -> Any:
    response = client.post(
        "/v1/chat/completions", json={"messages": HELLO, "max_tokens": 40, **fields}
    )
    assert response.status_code == status, response.text
    return response.json()


def stream(client: TestClient, path: str, **fields: Any) -> list[dict[str, Any]]:
    """Return a stream's chunks, read as the strictest and the laxest of clients would cut lines."""
    response = client.post(path, json={"max_tokens": 40, "stream": True, **fields})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.splitlines() == response.text.split("\n")[:-1]
    events = response.text.split("\n\n")
    assert events[-1] == "" and events[-2] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def error_of(answer: Any, kind: str) -> str:
    assert set(answer) == {"error"} and set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == kind
    message = answer["error"]["message"]
    assert (
        isinstance(message, str) and message and "Traceback" not in message and "\n" not in message
    )
    return message


def test_a_completion(client: TestClient, worker: FakeWorker) -> None:
    answer = complete(client, "abcd", seed=1)
    assert answer["id"].startswith("cmpl-") and (answer["object"], answer["model"]) == (
        "text_completion",
        "fake",
    )
    (choice,) = answer["choices"]
    assert len(choice.pop("text")) == 40
    assert choice == {"index": 0, "logprobs": None, "finish_reason": "length"}
    details = {"cached_tokens": 2}
    assert answer["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 40,
        "total_tokens": 44,
        "prompt_tokens_details": details,
    }
    t = answer["timings"]
    assert (t["cache_n"], t["prompt_n"], t["prompt_per_second"]) == (2, 2, 8.0)
    assert (t["predicted_n"], t["predicted_per_second"]) == (40, 80.0)
    assert t["accepted"] == 40 - t["steps"] and t["drafted"] == 2 * t["steps"]
    assert t["acceptance_length"] == round(40 / t["steps"], 3)
    assert sum(t["accepted_per_depth"]) == t["accepted"] > t["accepted_per_depth"][0] > 0
    assert t["drafted_by_source"] == {"heads": t["steps"], "ngram": t["steps"]}
    by_depth = dict(zip(("heads", "ngram"), t["accepted_per_depth"], strict=True))
    assert t["accepted_by_source"] == by_depth
    assert worker.cancelled == [] and "lossy" not in answer


def test_a_chat(client: TestClient) -> None:
    answer = chat(client)
    assert answer["id"].startswith("chatcmpl-") and answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant" and len(choice["message"]["content"]) == 40
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    assert answer["usage"]["prompt_tokens"] == len("user: hello\nassistant:")


def test_the_same_seed_gives_the_same_text_and_choices_differ(client: TestClient) -> None:
    texts = [c["text"] for c in complete(client, n=3, seed=5)["choices"]]
    assert len(set(texts)) == 3
    assert [complete(client, seed=5 + i)["choices"][0]["text"] for i in range(3)] == texts
    answer = complete(client, ["a", "b"], n=2, seed=5)
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in answer["choices"][:2]] == texts[:2]
    assert answer["usage"]["prompt_tokens"] == 2 and answer["usage"]["completion_tokens"] == 160
    assert complete(client, [ord("a")], seed=5)["choices"][0]["text"] == texts[0]


@pytest.mark.parametrize(
    "fields", [{}, {"stop": ["ab", "\n"]}, {"echo": True}, {"n": 3}, {"logprobs": 2, "echo": True}]
)
def test_streamed_completions_equal_whole_ones(client: TestClient, fields: dict[str, Any]) -> None:
    whole = complete(client, "hello", seed=3, **fields)
    chunks = stream(client, "/v1/completions", prompt="hello", seed=3, **fields)
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [
            choice["finish_reason"]
        ]
        if choice["logprobs"]:
            told = [part["logprobs"] for part in parts if part["logprobs"]]
            assert {
                key: [x for part in told for x in part[key]] for key in choice["logprobs"]
            } == choice["logprobs"]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"} and len(
        {c["id"] for c in chunks}
    ) == 1
    assert all("usage" not in chunk for chunk in chunks)
    assert sum("timings" in chunk for chunk in chunks) == len(whole["choices"])


def test_streamed_chats_equal_whole_ones(client: TestClient) -> None:
    fields = {"seed": 4, "n": 2, "logprobs": True, "top_logprobs": 3}
    whole = chat(client, **fields)
    chunks = stream(client, "/v1/chat/completions", messages=HELLO, **fields)
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert (
            parts[0]["delta"] == {"role": "assistant", "content": ""} and parts[-1]["delta"] == {}
        )
        assert (
            "".join(part["delta"].get("content", "") for part in parts)
            == choice["message"]["content"]
        )
        told = [
            entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]
        ]
        assert told == choice["logprobs"]["content"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_usage_comes_last_where_asked_for(client: TestClient) -> None:
    whole = complete(client, "hello", seed=3, n=2)
    chunks = stream(
        client,
        "/v1/completions",
        prompt="hello",
        seed=3,
        n=2,
        stream_options={"include_usage": True},
    )
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert chunks[-1]["timings"] == whole["timings"]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_logprobs_in_both_forms(client: TestClient) -> None:
    text, told = (
        complete(client, "é€", logprobs=3, echo=True)["choices"][0][key]
        for key in ("text", "logprobs")
    )
    assert "".join(told["tokens"]) == text and len(told["text_offset"]) == 42
    assert [
        text[at : at + len(t)] for at, t in zip(told["text_offset"], told["tokens"], strict=True)
    ] == told["tokens"]
    assert (told["token_logprobs"][0], told["top_logprobs"][0]) == (None, None)
    assert told["token_logprobs"][1:] == [-0.5] * 41
    assert told["top_logprobs"][5] == {told["tokens"][5]: -0.5, "x": -1.5, "y": -9999.0}
    none_but_own = complete(client, logprobs=0)["choices"][0]["logprobs"]
    assert none_but_own["top_logprobs"][3] == {none_but_own["tokens"][3]: -0.5}
    entries = chat(client, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    for entry in entries:
        assert bytes(entry["bytes"]).decode() == entry["token"] and entry["logprob"] == -0.5
        assert [t["token"] for t in entry["top_logprobs"]] == [entry["token"], "x"]


def test_token_details_say_what_was_drafted(client: TestClient) -> None:
    choice = complete(client, token_details=True)["choices"][0]
    assert "".join(t["text"] for t in choice["tokens"]) == choice["text"]
    assert {t["drafted"] for t in choice["tokens"]} == {True, False}
    chunks = stream(client, "/v1/chat/completions", messages=HELLO, token_details=True)
    parts = [c for chunk in chunks for c in chunk["choices"] if c.get("tokens")]
    assert all(
        "".join(t["text"] for t in part["tokens"]) == part["delta"]["content"] for part in parts
    )
    plain = complete(client, token_details=True, draft="none")["choices"][0]["tokens"]
    assert not any(t["drafted"] for t in plain)


def test_typical_acceptance_is_marked_lossy(client: TestClient, worker: FakeWorker) -> None:
    assert complete(client, typical_acceptance=True)["lossy"] is True
    assert all(
        c["lossy"] for c in stream(client, "/v1/completions", prompt="a", typical_acceptance=True)
    )
    assert all(request.typical_acceptance for request in worker.requests)


def test_stop_strings_end_a_text(client: TestClient) -> None:
    (choice,) = complete(client, "hello", stop=["a", "b"], max_tokens=400)["choices"]
    assert choice["finish_reason"] == "stop" and not {"a", "b"} & set(choice["text"])


def test_models_props_slots_health(client: TestClient, worker: FakeWorker) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "fake" and model["object"] == "model"
    assert client.get("/v1/models/fake").json() == model
    assert "no model 'gpt'" in error_of(client.get("/v1/models/gpt").json(), "not_found_error")
    assert client.get("/props").json() == {
        "model": "fake",
        "file_type": "F32",
        "n_ctx": 512,
        "n_vocab": 0x110000,
        "total_slots": 2,
        "max_queue": 64,
        "kv_cells": 1024,
        "draft": "three heads",
        "measuring": False,
        "chat_template": True,
    }
    assert client.get("/slots").json() == [{"id": i, "is_processing": False} for i in (0, 1)]
    assert client.get("/health").json() == {"status": "ok"}


def test_get_routes_answer_head_and_slashes_lead_on(client: TestClient) -> None:
    assert client.head("/health").status_code == client.head("/").status_code == 200
    assert client.head("/health").content == b""
    assert client.get("/health/").json() == {"status": "ok"}


def test_tokenize_and_back(client: TestClient) -> None:
    def post(path: str, status: int = 200, **body: Any) -> Any:
        response = client.post(path, json=body)
        assert response.status_code == status
        return response.json()

    assert post("/tokenize", content="é\n") == {"tokens": [233, 10]}
    assert post("/tokenize", content="a", add_special=True) == {"tokens": [1, 97]}
    assert post("/detokenize", tokens=[233, 10]) == {"content": "é\n"}
    assert post("/apply-template", messages=HELLO) == {"prompt": "user: hello\nassistant:"}
    refused = post("/apply-template", 400, messages=[{"role": "tool", "content": "x"}])
    assert "chat template refuses" in error_of(refused, "invalid_request_error")
    assert "has died" in error_of(post("/detokenize", 503, tokens=[666]), "server_error")
    assert "1114112" in error_of(
        post("/detokenize", 400, tokens=[0x110000]), "invalid_request_error"
    )
    assert "content is missing" in error_of(post("/tokenize", 400), "invalid_request_error")


def test_errors_of_clients(client: TestClient, worker: FakeWorker) -> None:
    answer = complete(client, temperature=9, status=400)
    assert error_of(answer, "invalid_request_error").startswith("temperature=9: ")
    assert answer["error"]["param"] == "temperature"
    for fields in (
        {},
        {"stream": True},
    ):  # before a stream's first event a status is still possible
        message = error_of(
            complete(client, "a" * 600, status=400, **fields), "invalid_request_error"
        )
        assert message.startswith("the prompt has 600 tokens, the context 512; ")
    missing = client.get("/v1/nothing%0A")
    assert missing.status_code == 404 and "there is no '/v1/nothing" in error_of(
        missing.json(), "not_found_error"
    )
    wrong = client.get("/v1/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    assert error_of(wrong.json(), "invalid_request_error") == "GET is not allowed here"
    assert client.get("/docs").status_code == client.get("/openapi.json").status_code == 404
    assert worker.cancelled == []


def test_faults_of_ours_show_no_traceback(client: TestClient, worker: FakeWorker) -> None:
    assert error_of(complete(client, "FAIL", status=500), "server_error") == "the worker died"
    assert error_of(complete(client, "RAISE", status=500), "server_error").startswith(
        "internal error"
    )
    assert (
        error_of(complete(client, "FAIL", status=500, stream=True), "server_error")
        == "the worker died"
    )
    assert error_of(complete(client, "RAISE", status=500, stream=True), "server_error").startswith(
        "internal error"
    )
    assert not worker.alive


def test_a_failure_in_mid_stream_is_an_event(client: TestClient) -> None:
    response = client.post("/v1/completions", json={"prompt": "FAIL LATER", "stream": True})
    *chunks, last = response.text.strip().split("\n\n")
    assert len(chunks) >= 3 and "[DONE]" not in response.text
    assert error_of(json.loads(last.removeprefix("data: ")), "server_error") == "the worker died"


def test_one_failed_choice_cancels_the_others(worker: FakeWorker) -> None:
    worker.step_s = 0.001
    with open_client(worker) as client:
        complete(client, ["FAIL LATER", "b"], status=500, max_tokens=500)
    assert len(worker.cancelled) == 1 and not worker.alive


def test_a_full_queue_is_429(worker: FakeWorker) -> None:
    with open_client(worker, max_queue=10) as client:
        response = client.post("/v1/completions", json={"prompt": "a", "n": 7})
        assert response.status_code == 429 and response.headers["retry-after"] == "3"
        assert "queue is full" in error_of(response.json(), "rate_limit_error")
        assert len(worker.cancelled) == 6 and not worker.alive
        assert (
            client.post("/v1/completions", json={"prompt": "a", "n": 7, "stream": True}).status_code
            == 429
        )
        assert "more than 12 sequences" in error_of(
            complete(client, n=13, status=400), "invalid_request_error"
        )
        metrics = client.get("/metrics").text
        assert 'medusa_sequences_total{outcome="cancelled"} 12.0' in metrics
        assert 'medusa_texts_total{outcome="cancelled"} 12.0' in metrics


def test_a_worker_that_is_not_ready_is_503(client: TestClient, worker: FakeWorker) -> None:
    worker.ready = False
    health = client.get("/health")
    assert health.status_code == 503 and health.json()["status"] == "loading"
    for method, path in [
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/props"),
        ("GET", "/slots"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("POST", "/apply-template"),
    ]:
        body = (
            {"prompt": "a", "messages": HELLO, "content": "a", "tokens": [1]}
            if method == "POST"
            else None
        )
        response = client.request(method, path, json=body)
        assert response.status_code == 503 and response.headers["retry-after"] == "5", path
        error_of(response.json(), "server_error")
    assert "medusa_ready 0.0" in client.get("/metrics").text
    worker.ready = True
    complete(client)


def test_time_is_limited(worker: FakeWorker) -> None:
    worker.step_s = 0.02
    with open_client(worker, request_timeout_s=0.5) as client:
        response = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 400})
        assert response.status_code == 504 and response.headers["x-should-retry"] == "false"
        assert "after 0.5 s" in error_of(response.json(), "server_error")
        streamed = client.post(
            "/v1/completions", json={"prompt": "a", "max_tokens": 400, "stream": True}
        ).text
        *chunks, last = streamed.strip().split("\n\n")
        assert len(chunks) >= 2 and "after 0.5 s" in error_of(json.loads(last[6:]), "server_error")
    assert len(worker.cancelled) == 2 and not worker.alive


def test_a_client_that_leaves_while_it_sends_is_no_fault_of_ours(worker: FakeWorker) -> None:
    class Leaving(Connection):
        async def _receive(self) -> Any:
            if self._body is None:
                return {"type": "http.disconnect"}
            body = self._body
            self._body = None
            return {"type": "http.request", "body": body[:5], "more_body": True}

    async def leave() -> int:
        status, _ = await Leaving(create_app(worker, ServerOptions()), {"prompt": "a"}).answer()
        return status

    assert asyncio.run(leave()) == 499 and not worker.requests


def test_metrics_count(client: TestClient, worker: FakeWorker) -> None:
    worker.cells_used = 77
    answers = [complete(client, "abcd", max_tokens=n, echo=n > 10) for n in (10, 20)]
    complete(client, n=0, status=400)
    complete(client, "a" * 600, status=400)
    stream(client, "/v1/chat/completions", messages=HELLO, max_tokens=5, n=2)
    client.get("/nowhere")
    lines = dict(
        line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#"
    )
    value = {name: float(number) for name, number in lines.items()}
    assert value['medusa_requests_total{path="/v1/completions",status="200"}'] == 2
    assert value['medusa_requests_total{path="/v1/completions",status="400"}'] == 2
    assert value['medusa_requests_total{path="/v1/chat/completions",status="200"}'] == 1
    assert value['medusa_requests_total{path="other",status="404"}'] == 1
    for name in ("medusa_sequences_total", "medusa_texts_total"):
        assert value[f'{name}{{outcome="length"}}'] == 4
        assert value[f'{name}{{outcome="refused"}}'] == 1
    chat_prompt = len("user: hello\nassistant:")
    assert value["medusa_prompt_tokens_total"] == 8 + 2 * chat_prompt
    assert value["medusa_prompt_tokens_cached_total"] == 4 + 2 * (chat_prompt // 2)
    assert value["medusa_generated_tokens_total"] == 40
    accepted = value["medusa_accepted_tokens_total"]
    for label, names in {
        "at_depth_total{depth": "12",
        "tokens_by_source_total{source": ("heads", "ngram"),
    }.items():
        parts = [value[f'medusa_accepted_{label}="{name}"}}'] for name in names]
        assert sum(parts) == accepted > parts[0] > 0
    assert (
        value['medusa_drafted_tokens_by_source_total{source="heads"}']
        == value["medusa_steps_total"]
    )
    assert value["medusa_steps_total"] + value["medusa_accepted_tokens_total"] == 40
    assert value["medusa_drafted_tokens_total"] == 2 * value["medusa_steps_total"]
    for name in (
        "time_per_output_token_seconds",
        "acceptance_length",
        "sequence_seconds",
        "text_seconds",
    ):
        assert value[f"medusa_{name}_count"] == 4
    assert value["medusa_time_to_first_token_seconds_count"] == 3, (
        "an echo is no token of the model's"
    )
    per_token = 0.5 / 10 + 0.5 / 20 + 2 * 0.5 / 5
    assert value["medusa_time_per_output_token_seconds_sum"] == pytest.approx(per_token)
    assert (value["medusa_queue_length"], value["medusa_running"], value["medusa_slots"]) == (
        0,
        0,
        2,
    )
    assert (value["medusa_kv_cells"], value["medusa_kv_cells_used"]) == (1024, 77)
    assert sum(a["usage"]["completion_tokens"] for a in answers) == 30


def test_the_web_server_loads_neither_torch_nor_llama_cpp() -> None:
    """Only the process that owns the model does, and what starts it."""
    code = (
        "import sys, model.serving.http.app; "
        "print({'torch', 'llama_cpp', 'model.serving.worker.model_process'} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
