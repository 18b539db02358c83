"""What the served model does with its sequences when a step fails."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from fake_base import FakeBase
from fake_vocabulary import Numbers
from oracles import plain

from model.decoding.decoder import Decoder
from model.decoding.draft_policy import FixedPolicy
from model.decoding.sampling import SamplingParams
from model.serving.worker.messages import Event, Failed, Finished, SequenceRequest, TextChunk
from model.serving.worker.served_model import ServedModel


def served(base: FakeBase) -> ServedModel:
    """A served model without a GGUF: one sequence at a time on the fake base."""
    model = ServedModel.__new__(ServedModel)
    parts: dict[str, Any] = {
        "_model": None,  # prompts are ids
        "_template": None,
        "_decoder": Decoder(base, Numbers(), FixedPolicy(), context=100),
        "_sequences": {},
        "_started": set(),
        "_failed": [],
        "_slices": None,
    }
    vars(model).update(parts)
    return model


def work(model: ServedModel) -> list[Event]:
    events = list[Event]()
    while model.busy:
        events += model.work()
    return events


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> FakeBase:
    """A base model whose second step fails, and no other."""
    base = FakeBase(n_ctx=100)
    decode = base.decode_placed
    steps = list[int]()

    def failing(n: int) -> None:
        steps.append(n)
        if len(steps) == 2:
            raise RuntimeError("planted")
        decode(n)

    monkeypatch.setattr(base, "decode_placed", failing)
    caplog.set_level(logging.CRITICAL)
    return base


def test_a_failed_step_fails_what_runs_and_leaves_what_waits(base: FakeBase) -> None:
    model = served(base)
    for id, prompt in (("runs", [1, 2, 3]), ("waits", [4, 5]), ("waits too", [6])):
        model.submit(SequenceRequest(id=id, prompt=prompt, max_tokens=5))
    events = work(model)
    assert [event.id for event in events if isinstance(event, Failed)] == ["runs"]
    assert [event.id for event in events if isinstance(event, Finished)] == ["waits", "waits too"]
    chunks = [event for event in events if isinstance(event, TextChunk) and event.id == "waits"]
    tokens = [token.id for chunk in chunks for token in chunk.tokens]
    assert tokens == plain(base, [4, 5], 5, SamplingParams())[2:]


def test_where_no_sequence_can_be_admitted_all_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the model would be busy for ever."""
    model = served(FakeBase(n_ctx=100))

    def acquire(*_: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr("model.decoding.kv_slots.KVSlots.acquire", acquire)
    for id in ("a", "b"):
        model.submit(SequenceRequest(id=id, prompt=[1], max_tokens=5))
    events = work(model)
    assert [event.id for event in events if isinstance(event, Failed)] == ["a", "b"]
