"""The fake worker keeps to the contract of workers; the contract's checks catch others."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import worker_contract as contract
from fake_worker import FakeWorker

from model.serving.worker.messages import Event, Finished, SequenceRequest, Started, TextChunk
from model.serving.worker.protocol import Deliver


async def within_ten_seconds(check: contract.Check, worker: FakeWorker) -> None:
    await asyncio.wait_for(check(worker), 10)


@pytest.mark.parametrize("check", contract.CHECKS + contract.CLOSING_CHECKS, ids=contract.name_of)
def test_the_fake_worker_keeps_the_contract(check: contract.Check) -> None:
    asyncio.run(within_ten_seconds(check, FakeWorker(step_s=0.001)))


class Altered(FakeWorker):
    """A worker whose events are changed on their way."""

    def submit(self, request: SequenceRequest, deliver: Deliver) -> None:
        def altered(event: Event) -> None:
            for one in self.alter(event):
                deliver(one)

        super().submit(request, altered)

    def alter(self, event: Event) -> list[Event]:
        raise NotImplementedError


class EndsTwice(Altered):
    def alter(self, event: Event) -> list[Event]:
        if isinstance(event, Finished):
            return [event, TextChunk(event.id, "late"), event]
        return [event]


class ForgetsToStart(Altered):
    def alter(self, event: Event) -> list[Event]:
        return [] if isinstance(event, Started) else [event]


class MixesSequences(Altered):
    def alter(self, event: Event) -> list[Event]:
        if isinstance(event, TextChunk):
            return [replace(event, id="another")]
        return [event]


class CountsOneMore(Altered):
    def alter(self, event: Event) -> list[Event]:
        if isinstance(event, Finished):
            return [replace(event, accepted=event.accepted + 1, steps=event.steps - 1)]
        return [event]


class AddsToTheText(Altered):
    def alter(self, event: Event) -> list[Event]:
        if isinstance(event, TextChunk):
            return [replace(event, text=event.text + "x")]
        return [event]


class DraftsAnyway(FakeWorker):
    def submit(self, request: SequenceRequest, deliver: Deliver) -> None:
        super().submit(replace(request, draft="auto"), deliver)


class ForgetsTheSeed(FakeWorker):
    def submit(self, request: SequenceRequest, deliver: Deliver) -> None:
        sampling = replace(request.sampling, seed=len(self.requests))
        super().submit(replace(request, sampling=sampling), deliver)


class GoesOnAfterCancel(FakeWorker):
    def cancel(self, id: str) -> None:
        self.cancelled.append(id)


class NeverFull(FakeWorker):
    def submit(self, request: SequenceRequest, deliver: Deliver) -> None:
        self.max_queue = len(self.alive) + 1
        super().submit(request, deliver)


class ClosesAtOnce(FakeWorker):
    async def close(self, deadline_s: float) -> None:
        await super().close(0.0)


class ClosesWithoutAWord(FakeWorker):
    async def close(self, deadline_s: float) -> None:
        self.ready = False
        for id in list(self.alive):
            self.cancel(id)


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        (EndsTwice, contract.events_come_in_order),
        (ForgetsToStart, contract.events_come_in_order),
        (MixesSequences, contract.events_come_in_order),
        (CountsOneMore, contract.counts_add_up),
        (AddsToTheText, contract.counts_add_up),
        (DraftsAnyway, contract.without_drafts_nothing_is_drafted),
        (ForgetsTheSeed, contract.a_seed_repeats_a_text),
        (AddsToTheText, contract.a_stop_string_ends_the_text_before_it),
        (AddsToTheText, contract.an_echo_begins_with_the_prompt),
        (GoesOnAfterCancel, contract.a_cancelled_sequence_is_silent),
        (NeverFull, contract.a_full_queue_refuses),
        (ClosesAtOnce, contract.closing_finishes_what_runs),
        (ClosesWithoutAWord, contract.a_deadline_fails_what_still_runs),
    ],
)
def test_a_worker_that_breaks_the_contract_is_caught(
    kind: type[FakeWorker], check: contract.Check
) -> None:
    async def run() -> None:
        await asyncio.wait_for(check(kind(step_s=0.001)), 5)

    with pytest.raises((AssertionError, pytest.fail.Exception)):
        asyncio.run(run())
