"""Answers from an OpenAI-compatible server: requests with retries, several at a time. Knows neither tokens nor files.

Threads that die with the process ask; what fails for good comes back as a problem of its prompt, and the rest goes on.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

import requests

from model.base.chat import Message
from model.decoding.sampling import SamplingParams
from model.errors import DataError

RETRIED = {408, 409, 425, 429}  # and all from 500 on: the same request may succeed later
LONGEST_PAUSE_S = 60.0
UNFIT = {400, 413, 422}  # says something of the prompt, nothing of the endpoint
HOPELESS = 20  # prompts in a row, and 3 for each under way, without an answer: nobody is there


class _RetryError(Exception):
    """An answer that cannot be used; pause: seconds that the server asks for."""

    def __init__(self, problem: str, pause: float = 0.0) -> None:
        super().__init__(problem)
        self.pause = pause


class _UnfitError(DataError):
    """A prompt that the endpoint refuses."""


@dataclass(frozen=True)
class Endpoint:
    """Where and whom to ask. url: ends with the version, such as http://localhost:8000/v1."""

    url: str
    model: str
    key: str = field(default="", repr=False)
    timeout_s: float = 120.0
    retries: int = 4
    pause_s: float = 0.5  # before the first retry; doubled each time


@dataclass
class Exchange:
    """A prompt's turns, and what became of them. messages: with the answers; reasons: how each of them ended.

    text: the beginning of a text to go on with, where there are no turns.
    """

    id: str
    turns: tuple[Message, ...]
    text: str
    sampling: list[SamplingParams]  # one per question
    max_tokens: int
    messages: list[Message] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    problem: str = ""
    unfit: bool = False  # the endpoint answers, but not this


Exchanges = Generator[Exchange, None, None]


class _Bearer(requests.auth.AuthBase):
    """The key as a header; a .netrc file would replace a header that was simply set."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


class Client:
    """One connection to the endpoint. stop: waiting for a retry ends when it is set."""

    def __init__(self, endpoint: Endpoint, stop: threading.Event) -> None:
        self._endpoint, self._stop = endpoint, stop
        self._session = requests.Session()
        self._session.auth = _Bearer(endpoint.key)

    def converse(self, exchange: Exchange) -> None:
        """Have all turns of an exchange answered. Raises DataError where one finds no answer."""
        if not exchange.turns:
            text, reason = self._ask("completions", {"prompt": exchange.text}, exchange, exchange.sampling[0])
            exchange.messages = [_message("user", exchange.text), _message("assistant", text)]
            exchange.reasons = [reason]
            return
        for turn in exchange.turns:
            exchange.messages.append(turn)
            if turn["role"] == "user":
                sampling = exchange.sampling[len(exchange.reasons)]
                text, reason = self._ask("chat/completions", {"messages": exchange.messages}, exchange, sampling)
                exchange.messages.append(_message("assistant", text.strip()))
                exchange.reasons.append(reason)

    def _ask(self, path: str, what: dict[str, Any], exchange: Exchange, sampling: SamplingParams) -> tuple[str, str]:
        """Return an answer and how it ended: "stop" or "length"."""
        end = self._endpoint
        body = {
            **what, "model": end.model, "max_tokens": exchange.max_tokens, "temperature": sampling.temperature,
            "top_p": sampling.top_p, "seed": sampling.seed % 2**31,
        }  # fmt: skip
        pause = end.pause_s
        for left in range(end.retries, -1, -1):
            try:
                return self._once(f"{end.url.rstrip('/')}/{path}", body)
            except _RetryError as error:
                if not left or self._stop.wait(min(max(pause, error.pause), LONGEST_PAUSE_S)):
                    raise DataError(f"{self.clean(str(error))} ({end.retries + 1 - left} attempts)") from None
                pause *= 2
        raise AssertionError

    def _once(self, url: str, body: dict[str, Any]) -> tuple[str, str]:
        try:
            response = self._session.post(url, json=body, timeout=self._endpoint.timeout_s)
        except requests.Timeout:
            raise _RetryError(f"no answer within {self._endpoint.timeout_s:g} s") from None
        except requests.RequestException as error:
            raise _RetryError(f"no connection: {type(error).__name__}") from None
        if response.status_code >= 500 or response.status_code in RETRIED:
            wait = response.headers.get("Retry-After", "")
            raise _RetryError(f"status {response.status_code}", float(wait) if wait.isdigit() else 0.0)
        if response.status_code in UNFIT:
            raise _UnfitError(self.clean(f"status {response.status_code}: {response.text}"))
        if response.status_code != 200:
            raise DataError(self.clean(f"status {response.status_code}: {response.text}"))
        try:
            choice = response.json()["choices"][0]
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            reason = choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise _RetryError(f"nonsense: {response.text}") from None
        if not isinstance(text, str) or not text.strip():
            raise _RetryError(f"an empty answer: {response.text}")
        return text, "length" if reason == "length" else "stop"

    def clean(self, message: str) -> str:
        """Return a message as one line, without the key that a server may have quoted."""
        line = " ".join(message.split())
        return (line.replace(self._endpoint.key, "***") if self._endpoint.key else line)[:200]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def answer_with_endpoint(endpoint: Endpoint, exchanges: Iterable[Exchange], concurrency: int) -> Exchanges:
    """Yield the exchanges as they end, answered or with a problem; `concurrency` of them are under way.

    Raises DataError when so many in a row find no answer that nobody can be there.
    """
    stop = threading.Event()
    asked: queue.Queue[Exchange | None] = queue.Queue()
    ended: queue.Queue[Exchange] = queue.Queue()

    def work() -> None:
        client = Client(endpoint, stop)
        while (exchange := asked.get()) is not None and not stop.is_set():
            try:
                client.converse(exchange)
            except DataError as error:
                exchange.problem, exchange.unfit = str(error), isinstance(error, _UnfitError)
            except Exception as error:  # whatever a server provokes: one prompt is lost, not the run
                exchange.problem = client.clean(f"{type(error).__name__}: {error}")
            ended.put(exchange)

    for number in range(concurrency):
        threading.Thread(target=work, name=f"endpoint-{number}", daemon=True).start()
    todo, under_way, failed = iter(exchanges), 0, 0
    try:
        while True:
            while under_way < concurrency and (exchange := next(todo, None)) is not None:
                asked.put(exchange)
                under_way += 1
            if not under_way:
                return
            exchange = ended.get()
            under_way -= 1
            if not exchange.unfit:
                failed = failed + 1 if exchange.problem else 0
            yield exchange
            if failed >= max(HOPELESS, 3 * concurrency):
                raise DataError(f"{endpoint.url}: {failed} prompts in a row found no answer; is it there?")
    finally:
        stop.set()
        for _ in range(concurrency):
            asked.put(None)
