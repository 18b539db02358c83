"""Answers from an OpenAI-compatible server: requests with retries, several at a time.

Threads that die with the process ask; what fails for good comes back as a problem of its prompt,
and the rest goes on. Knows neither tokens nor files.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import InvalidHeader, ReadTimeoutError
from urllib3.util import Retry

from model.base.chat import Message
from model.decoding.sampling import SamplingParams
from model.errors import DataError

RETRIED = {408, 409, 425, 429, *range(500, 600)}  # the same request may succeed later
UNFIT = {400, 413, 422}  # says something of the prompt, nothing of the endpoint
LONGEST_PAUSE_S = 60.0
HOPELESS = 20  # prompts in a row, and 3 for each under way, without an answer: nobody is there

# It would report each retry; a prompt's problem says once what came of them.
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


class _NoAnswerError(DataError):
    """A response that holds no whole answer; the next one may."""


class _UnfitError(DataError):
    """A prompt that the endpoint refuses."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where and whom to ask. url: ends with the version, such as http://localhost:8000/v1."""

    url: str
    model: str
    key: str = field(default="", repr=False)
    timeout_s: float = 120.0
    retries: int = 4
    pause_s: float = 0.5  # the first retry comes at once, the next after twice this, then doubled


@dataclass(kw_only=True)
class Exchange:
    """A prompt's turns, and what became of them.

    messages: with the answers; reasons: how each of them ended. text: the beginning of a text to go
    on with, where there are no turns.
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


class _BoundedRetry(Retry):
    """Retries whose pauses are bounded, and that survive a Retry-After which makes no sense."""

    def parse_retry_after(self, retry_after: str) -> float:
        """Return the seconds that a server asks for, in seconds or by an HTTP date."""
        try:
            return min(super().parse_retry_after(retry_after), LONGEST_PAUSE_S)
        except InvalidHeader:
            return 0.0


class _Bearer(requests.auth.AuthBase):
    """The key as a header; a .netrc file would replace a header that was simply set."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


class Client:
    """One connection to the endpoint."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        retries = _BoundedRetry(
            total=endpoint.retries,
            backoff_factor=endpoint.pause_s,
            backoff_max=LONGEST_PAUSE_S,
            status_forcelist=RETRIED,
            allowed_methods=None,  # all of them: a question may be asked twice
            raise_on_status=False,
        )
        self._session = requests.Session()
        self._session.auth = _Bearer(endpoint.key)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=retries))

    def converse(self, exchange: Exchange) -> None:
        """Have all turns of an exchange answered. Raises DataError where one finds no answer."""
        if not exchange.turns:
            prompt = {"prompt": exchange.text}
            text, reason = self._ask("completions", prompt, exchange, exchange.sampling[0])
            exchange.messages = [_message("user", exchange.text), _message("assistant", text)]
            exchange.reasons = [reason]
            return
        for turn in exchange.turns:
            exchange.messages.append(turn)
            if turn["role"] == "user":
                sampling = exchange.sampling[len(exchange.reasons)]
                talk = {"messages": exchange.messages}
                text, reason = self._ask("chat/completions", talk, exchange, sampling)
                exchange.messages.append(_message("assistant", text.strip()))
                exchange.reasons.append(reason)

    def _ask(
        self, path: str, what: dict[str, Any], exchange: Exchange, sampling: SamplingParams
    ) -> tuple[str, str]:
        """Return an answer and how it ended: "stop" or "length"."""
        body = {
            **what,
            "model": self._endpoint.model,
            "max_tokens": exchange.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if sampling.seed is not None:
            body["seed"] = sampling.seed % 2**31
        url = f"{self._endpoint.url.rstrip('/')}/{path}"
        # The session retries requests that fail; only here it shows that a response is no answer.
        for _ in range(self._endpoint.retries):
            with contextlib.suppress(_NoAnswerError):
                return self._answer_of(self._post(url, body))
        return self._answer_of(self._post(url, body))

    def _post(self, url: str, body: dict[str, Any]) -> requests.Response:
        """Return a response of status 200."""
        attempts = f"({self._endpoint.retries + 1} attempts)"
        timeout = self._endpoint.timeout_s
        try:
            response = self._session.post(url, json=body, timeout=timeout)
        except requests.exceptions.ChunkedEncodingError:
            raise _NoAnswerError("an answer that broke off") from None
        except requests.RequestException as error:
            cause = getattr(error.args[0], "reason", None) if error.args else None
            if isinstance(error, requests.Timeout) or isinstance(cause, ReadTimeoutError):
                raise DataError(f"no answer within {timeout:g} s {attempts}") from None
            raise DataError(f"no connection: {type(cause or error).__name__} {attempts}") from None
        status = response.status_code
        if status in RETRIED:
            raise DataError(f"status {status} {attempts}")
        if status != 200:
            kind = _UnfitError if status in UNFIT else DataError
            raise kind(self.clean(f"status {status}: {response.text}"))
        return response

    def _answer_of(self, response: requests.Response) -> tuple[str, str]:
        try:
            choice = response.json()["choices"][0]
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            reason = choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise _NoAnswerError(self.clean(f"nonsense: {response.text}")) from None
        if not isinstance(text, str) or not text.strip():
            raise _NoAnswerError(self.clean(f"an empty answer: {response.text}"))
        return text, "length" if reason == "length" else "stop"

    def clean(self, message: str) -> str:
        """Return a message as one line, without the key that a server may have quoted."""
        line = " ".join(message.split())
        if self._endpoint.key:
            line = line.replace(self._endpoint.key, "***")
        return line[:200]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def answer_with_endpoint(
    endpoint: Endpoint, exchanges: Iterable[Exchange], concurrency: int
) -> Exchanges:
    """Yield the exchanges as they end, answered or with a problem.

    concurrency: so many of them are under way. Raises DataError when so many in a row find no
    answer that nobody can be there.
    """
    # The threads: each asks one prompt after another.
    stop = threading.Event()
    asked: queue.Queue[Exchange | None] = queue.Queue()
    ended: queue.Queue[Exchange] = queue.Queue()

    def work() -> None:
        client = Client(endpoint)
        while (exchange := asked.get()) is not None and not stop.is_set():
            try:
                client.converse(exchange)
            except DataError as error:
                exchange.problem = str(error)
                exchange.unfit = isinstance(error, _UnfitError)
            except Exception as error:  # whatever a server causes: one prompt is lost, not the run
                exchange.problem = client.clean(f"{type(error).__name__}: {error}")
            ended.put(exchange)

    for number in range(concurrency):
        threading.Thread(target=work, name=f"endpoint-{number}", daemon=True).start()

    # Ask and yield.
    waiting = iter(exchanges)
    under_way = 0
    failed = 0  # in a row
    try:
        while True:
            # As many as may be under way at once are.
            while under_way < concurrency and (exchange := next(waiting, None)) is not None:
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
                raise DataError(
                    f"{endpoint.url}: {failed} prompts in a row found no answer; is it there?"
                )
    finally:
        stop.set()
        for _ in range(concurrency):
            asked.put(None)
