"""What any `Worker` must keep to: checks that the fake and the real one both pass.

CHECKS leave the worker as it was; each of CLOSING_CHECKS closes the one that it is given.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import pytest

from model.decoding.sampling import SamplingParams
from model.decoding.sequence import TokenOutput
from model.serving.worker.messages import (
    Event,
    Failed,
    Finished,
    SequenceRequest,
    Started,
    TextChunk,
)
from model.serving.worker.protocol import Overloaded, Worker

PROMPT = "class Stack:\n    def push(self"
OTHER_PROMPT = "import os\n\n\ndef "
SAMPLED = SamplingParams(temperature=0.8, seed=5)
# The bundled model's end of text is token 2: these go on until they are ended.
ENDLESS: dict[str, Any] = {
    "max_tokens": None,
    "sampling": SamplingParams(temperature=0.8, seed=1, logit_bias={2: -100.0}),
}
# Without drafts and prefix cache all steps have the same shapes: so a seed repeats to the bit.
SAME_SHAPES: dict[str, Any] = {"draft": "none", "use_prefix_cache": False}
MAX_SEQUENCES = 1000  # no worker under test has room for so many

Check = Callable[[Worker], Awaitable[None]]
_ids = count()


def request(prompt: Any = PROMPT, max_tokens: int | None = 30, **fields: Any) -> SequenceRequest:
    """Return a request with an id of its own."""
    return SequenceRequest(
        id=f"contract-{next(_ids)}", prompt=prompt, max_tokens=max_tokens, **fields
    )


@dataclass
class Submitted:
    """A sequence, and what was delivered of it so far."""

    request: SequenceRequest
    events: list[Event] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def deliver(self, event: Event) -> None:
        self.events.append(event)
        self.changed.set()

    async def until(self, kinds: Any) -> Any:
        """Wait for an event of these kinds; return the first one."""
        while True:
            found = [event for event in self.events if isinstance(event, kinds)]
            if found:
                return found[0]
            self.changed.clear()
            await self.changed.wait()

    async def end(self) -> Any:
        """Wait for the last event and return it."""
        return await self.until((Finished, Failed))

    @property
    def last(self) -> Any:
        """The last event so far."""
        return self.events[-1]

    @property
    def chunks(self) -> list[TextChunk]:
        return [event for event in self.events if isinstance(event, TextChunk)]

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def tokens(self) -> list[TokenOutput]:
        return [token for chunk in self.chunks for token in chunk.tokens]

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


def submit(worker: Worker, request: SequenceRequest) -> Submitted:
    """Submit a request."""
    submitted = Submitted(request)
    worker.submit(request, submitted.deliver)
    return submitted


async def generate(worker: Worker, request: SequenceRequest) -> Submitted:
    """Submit a request and wait for its last event."""
    submitted = submit(worker, request)
    await submitted.end()
    return submitted


async def events_come_in_order(worker: Worker) -> None:
    """One Started, chunks, one Finished, of this sequence alone, beside others too."""
    prompts = (PROMPT, OTHER_PROMPT, PROMPT + "x")
    together = [submit(worker, request(prompt)) for prompt in prompts]
    for one in together:
        await one.end()
    await generate(worker, request(max_tokens=1))  # time for what comes too late
    for one in together:
        kinds = [type(event) for event in one.events]
        assert kinds[0] is Started and kinds[-1] is Finished
        assert set(kinds[1:-1]) == {TextChunk}
        assert {event.id for event in one.events} == {one.request.id}
    assert worker.running == worker.queue_length == 0


async def counts_add_up(worker: Worker) -> None:
    """What Finished counts is what the chunks hold."""
    one = await generate(worker, request())
    started = one.events[0]
    end = await one.end()
    assert isinstance(started, Started) and isinstance(end, Finished)
    assert end.reason == "length" and end.new_tokens == 30 == len(one.tokens)
    assert end.prompt_tokens == started.prompt_tokens >= started.cached_tokens
    assert end.steps + end.accepted == end.new_tokens
    assert sum(token.drafted for token in one.tokens) == end.accepted
    assert sum(end.accepted_per_depth) == end.accepted <= end.drafted
    assert sum(end.drafted_by_source.values()) == end.drafted
    assert sum(end.accepted_by_source.values()) == end.accepted
    assert end.predicted_s > 0 and end.prompt_s > 0
    assert "".join(token.text for token in one.tokens) == one.text


async def without_drafts_nothing_is_drafted(worker: Worker) -> None:
    """`draft` none: a token a step."""
    one = await generate(worker, request(draft="none"))
    end = await one.end()
    assert end.drafted == end.accepted == 0 and end.steps == end.new_tokens
    assert not any(token.drafted for token in one.tokens)


async def a_seed_repeats_a_text(worker: Worker) -> None:
    """The same seed gives the same text; the control: another one another text."""
    first = await generate(worker, request(sampling=SAMPLED, **SAME_SHAPES))
    again = await generate(worker, request(sampling=SAMPLED, **SAME_SHAPES))
    other = await generate(worker, request(sampling=replace(SAMPLED, seed=6), **SAME_SHAPES))
    assert first.text == again.text != other.text


async def a_stop_string_ends_the_text_before_it(worker: Worker) -> None:
    """Neither the text nor the tokens hold any of it."""
    whole = (await generate(worker, request(sampling=SAMPLED, **SAME_SHAPES))).text
    stop = whole[5:8]
    stops = ("never there", stop)
    one = await generate(worker, request(sampling=SAMPLED, stop=stops, **SAME_SHAPES))
    end = await one.end()
    assert one.text == whole[: whole.index(stop)] and end.reason == "stop"
    assert "".join(token.text for token in one.tokens) == one.text


async def an_echo_begins_with_the_prompt(worker: Worker) -> None:
    """With log probabilities of all tokens but the first; without new tokens where so wished."""
    for max_tokens in (0, 4):
        one = await generate(worker, request(max_tokens=max_tokens, echo=True, logprobs=2))
        end = await one.end()
        assert one.text.startswith(PROMPT) and (one.text == PROMPT) == (max_tokens == 0)
        assert end.new_tokens == max_tokens and end.reason == "length"
        assert len(one.tokens) == end.prompt_tokens + max_tokens
        first, *rest = one.tokens
        assert first.logprob is None
        assert all(token.logprob is not None and len(token.top) == 2 for token in rest)


async def bad_requests_fail(worker: Worker) -> None:
    """They are the client's fault, are told in a line, and leave nothing behind."""
    too_long = [5] * worker.info.context
    for bad in (request(too_long), request(max_tokens=0)):
        one = await generate(worker, bad)
        (event,) = one.events
        assert isinstance(event, Failed) and event.kind == "bad_request" and event.message
    assert worker.running == worker.queue_length == 0


async def a_cancelled_sequence_is_silent(worker: Worker) -> None:
    """Nothing is delivered after `cancel`, and others take its slot."""
    n_slots = worker.info.slots
    long = [submit(worker, request(PROMPT + "x" * i, **ENDLESS)) for i in range(n_slots + 1)]
    await long[0].until(TextChunk)
    counts = []
    for one in long:
        worker.cancel(one.request.id)
        counts.append(len(one.events))
    assert worker.running == worker.queue_length == 0
    end = await (await generate(worker, request())).end()
    assert isinstance(end, Finished)
    assert [len(one.events) for one in long] == counts
    assert not any(isinstance(one.events[-1], Finished) for one in long if one.events)
    worker.cancel(long[0].request.id)
    worker.cancel("unknown")


async def a_full_queue_refuses(worker: Worker) -> None:
    """Overloaded says when to come again; what was taken is finished."""
    taken = list[Submitted]()

    def submit_all() -> None:
        for _ in range(MAX_SEQUENCES):
            taken.append(submit(worker, request(max_tokens=2)))

    with pytest.raises(Overloaded) as refused:
        submit_all()
    assert refused.value.retry_after_s >= 1
    assert len(taken) > worker.info.slots
    assert worker.running + worker.queue_length == len(taken)
    for one in taken:
        assert isinstance(await one.end(), Finished)
    assert worker.running == worker.queue_length == 0


async def text_and_tokens_are_translated(worker: Worker) -> None:
    """Tokens give the text again; a template holds what was said; ids and chats are prompts."""
    tokens = await worker.tokenize("import os", add_special=False, parse_special=False)
    assert (await worker.detokenize(tokens)).strip() == "import os"
    begun = await worker.tokenize("import os", add_special=True, parse_special=False)
    assert begun[-len(tokens) :] == tokens
    messages = [{"role": "user", "content": "Hello"}]
    assert "Hello" in await worker.apply_template(messages)
    for prompt in (tokens, messages):
        one = await generate(worker, request(prompt, max_tokens=2))
        assert isinstance(await one.end(), Finished)


CHECKS: list[Check] = [
    events_come_in_order,
    counts_add_up,
    without_drafts_nothing_is_drafted,
    a_seed_repeats_a_text,
    a_stop_string_ends_the_text_before_it,
    an_echo_begins_with_the_prompt,
    bad_requests_fail,
    a_cancelled_sequence_is_silent,
    a_full_queue_refuses,
    text_and_tokens_are_translated,
]


async def closing_finishes_what_runs(worker: Worker) -> None:
    """And takes nothing new meanwhile."""
    one = submit(worker, request())
    closing = asyncio.create_task(worker.close(20.0))
    await asyncio.sleep(0)
    assert not worker.ready
    with pytest.raises(Overloaded):
        submit(worker, request())
    await closing
    assert isinstance(await one.end(), Finished)
    await worker.close(0.0)  # once more


async def a_deadline_fails_what_still_runs(worker: Worker) -> None:
    """Whoever waits for it is told so."""
    n_slots = worker.info.slots
    long = [submit(worker, request(PROMPT + "x" * i, **ENDLESS)) for i in range(n_slots + 1)]
    await long[0].until(Started)
    await worker.close(0.0)
    for one in long:
        assert one.events, "nobody waits for ever"
        end = one.events[-1]
        assert isinstance(end, Failed) and end.kind == "internal"
        assert "shutting down" in end.message
    assert worker.running == worker.queue_length == 0


CLOSING_CHECKS: list[Check] = [closing_finishes_what_runs, a_deadline_fails_what_still_runs]


def name_of(check: Check) -> str:
    """Return a check's name, for pytest's ids."""
    return getattr(check, "__name__", "check")
