"""An endpoint that fails, times out or answers nonsense: retried, reported; the rest goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fake_endpoint import KEY, Server, serving

from model.decoding.sampling import SamplingParams
from model.errors import DataError
from model.training.distillation.endpoint import (
    LONGEST_PAUSE_S,
    Endpoint,
    Exchange,
    _BoundedRetry,
    answer_with_endpoint,
)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def continuation(text: str, sampling: SamplingParams, max_tokens: int) -> Exchange:
    return Exchange(id=text, turns=(), text=text, sampling=[sampling], max_tokens=max_tokens)


def ask(
    server: Server, prompts: list[str], concurrency: int = 4, **more: Any
) -> dict[str, Exchange]:
    options = {"timeout_s": 0.25, "retries": 2, "pause_s": 0.005, **more}
    endpoint = Endpoint(url=server.url, model="m", key=KEY, **options)
    sampling = SamplingParams(temperature=0.7, top_p=0.9, seed=5)
    exchanges = (continuation(prompt, sampling, 50) for prompt in prompts)
    return {one.id: one for one in answer_with_endpoint(endpoint, exchanges, concurrency)}


def test_what_fails_is_retried_then_reported_and_the_rest_goes_on(server: Server) -> None:
    bad = {
        "fails": "status 500 (3 attempts)",
        "slow": "no answer within 0.25 s (3 attempts)",
        "nonsense": "nonsense: <html>",
        "empty": "an empty answer",
        "list": "nonsense",
        "null": "nonsense",
        "hangup": "no connection",
    }
    # Answered at the n-th attempt.
    mended = {"flaky": 3, "late": 2, "busy": 2, "mad": 2, "torn": 2}
    prompts = [
        f"{kind} {i}" for i, kind in enumerate([*bad, "good", *mended, "good", "long", "good"])
    ]
    ended = ask(server, prompts)
    assert set(ended) == set(prompts)
    for prompt, one in ended.items():
        kind = prompt.split()[0]
        attempts = server.prompts().count(prompt)
        if kind in bad:
            assert bad[kind] in one.problem and attempts == 3, one.problem
        else:
            assert not one.problem and attempts == mended.get(kind, 1)
            assert one.messages[-1]["content"] == f"answer to {prompt}"
            assert one.reasons == ["length" if kind == "long" else "stop"]
    assert all("\n" not in one.problem and len(one.problem) < 230 for one in ended.values())


@pytest.mark.parametrize("form", ["seconds", "date", "nonsense"])
def test_a_server_says_when_to_come_again(server: Server, form: str) -> None:
    """By seconds or by an HTTP date; what is neither is no reason to give up."""
    began = time.monotonic()
    one = ask(server, [f"wait {form}"], timeout_s=5.0)[f"wait {form}"]
    seconds = time.monotonic() - began
    assert not one.problem and len(server.asked) == 2
    if form == "nonsense":
        assert seconds < 0.5
    else:
        assert (
            0.9 < seconds < 4
        )  # 1 s; or a date, which knows whole seconds only: more than 1, at most 2


def test_no_pause_is_longer_than_a_minute() -> None:
    assert _BoundedRetry().parse_retry_after("86400") == LONGEST_PAUSE_S
    assert _BoundedRetry().parse_retry_after("5") == 5


def test_requests_carry_what_was_asked_for_and_no_more_than_agreed_run_at_once(
    server: Server,
) -> None:
    ask(server, [f"good {i}" for i in range(12)], concurrency=3)
    path, body, key = server.asked[0]
    assert path == "/v1/completions" and key == f"Bearer {KEY}"
    assert body == {
        "prompt": body["prompt"],
        "model": "m",
        "max_tokens": 50,
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 5,
    }
    assert server.most == 3 and len(server.asked) == 12


def test_the_key_shows_nowhere(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    one = ask(server, ["refused 0"])["refused 0"]
    assert one.problem == "status 401: bad key ***", "nor is a refusal tried again"
    assert len(server.asked) == 1
    assert KEY not in caplog.text and KEY not in repr(Endpoint(url=server.url, model="m", key=KEY))


def test_turns_build_on_the_answers(server: Server) -> None:
    turns = tuple(
        {"role": role, "content": f"{role} {i}"}
        for i, role in enumerate(["system", "user", "user"])
    )
    exchange = Exchange(
        id="a", turns=turns, text="", max_tokens=9,
        sampling=[SamplingParams(), SamplingParams(seed=2**40 + 1)],
    )  # fmt: skip
    endpoint = Endpoint(url=server.url + "/", model="m", timeout_s=5)
    (one,) = answer_with_endpoint(endpoint, [exchange], 1)
    assert [m["content"] for m in one.messages] == [
        "system 0",
        "user 1",
        "answer to user 1",
        "user 2",
        "answer to user 2",
    ]
    (path, first, key), (_, second, _) = server.asked
    assert path == "/v1/chat/completions" and key is None
    assert len(first["messages"]) == 2 and second["messages"] == one.messages[:4]
    assert (first["seed"], second["seed"]) == (0, 1)


def test_where_nobody_answers_the_run_ends(server: Server) -> None:
    for kind in ("fails", "refused"):
        server.asked.clear()
        with pytest.raises(DataError, match="20 prompts in a row"):
            ask(server, [f"{kind} {i}" for i in range(100)], concurrency=2, retries=0)
        assert 20 <= len(server.asked) <= 22
    mixed = [f"{'good' if i % 5 == 0 else 'fails'} {i}" for i in range(60)]
    assert len(ask(server, mixed, concurrency=2, retries=0)) == 60, (
        "as long as some are answered, the rest goes on"
    )
    assert len(ask(server, [f"unfit {i}" for i in range(60)])) == 60, (
        "these say nothing of the endpoint"
    )


def test_closing_ends_the_threads(server: Server) -> None:
    before = threading.active_count()
    endpoint = Endpoint(url=server.url, model="m", timeout_s=5)
    exchanges = (continuation(f"good {i}", SamplingParams(), 9) for i in range(99))
    asked = answer_with_endpoint(endpoint, exchanges, 4)
    next(asked)
    asked.close()
    end = time.monotonic() + 5
    while any(thread.name.startswith("endpoint") for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert threading.active_count() <= before + 5  # the server's own threads may still be ending
