"""What the served model does when a step fails, and with what it measures while nothing runs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from fake_base import FakeBase
from fake_vocabulary import Numbers
from oracles import plain

from model.decoding.decoder import Decoder
from model.decoding.draft_policy import FixedPolicy
from model.decoding.drafters.drafter import Drafters
from model.decoding.sampling import SamplingParams
from model.planning.choice import Drafting
from model.serving.worker.messages import (
    Event,
    Failed,
    Finished,
    ModelInfo,
    SequenceRequest,
    TextChunk,
)
from model.serving.worker.served_model import UNMEASURED, ServedModel
from model.trees.slices import Slices


def served(base: FakeBase) -> ServedModel:
    """A served model without a GGUF: one sequence at a time on the fake base."""
    model = ServedModel.__new__(ServedModel)
    info = ModelInfo(
        name="numbers",
        file_type="F32",
        context=100,
        vocabulary=64,
        draft=UNMEASURED,
        slots=1,
        cells=100,
        has_chat_template=False,
        measuring=True,
    )
    parts: dict[str, Any] = {
        "info": info,
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


class Measurement:
    """Two slices, then a policy that drafts n-grams. told: what it was told of each slice."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.told = list[bool | None]()
        self.fault = fault

    def slices(self) -> Slices[Drafting]:
        for _ in range(2):
            self.told.append((yield))
        if self.fault is not None:
            raise self.fault
        return Drafting(FixedPolicy(continuation=3), Drafters(), "n-grams")


def measuring(monkeypatch: pytest.MonkeyPatch, measurement: Measurement) -> ServedModel:
    """A served model whose measurement has begun."""
    model = served(FakeBase(n_ctx=100))

    def new_decoder(self: ServedModel, drafting: Drafting) -> Decoder:
        return Decoder(FakeBase(n_ctx=103), Numbers(), drafting.policy, context=100)

    monkeypatch.setattr(ServedModel, "_new_decoder", new_decoder)
    model._slices = measurement.slices()
    next(model._slices)
    return model


def test_drafts_begin_when_all_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measurement = Measurement()
    model = measuring(monkeypatch, measurement)
    before = model._decoder
    assert model.measuring and not model.busy
    assert not model.measure(disturbed=True)
    model.submit(SequenceRequest(id="between", prompt=[1, 2, 3], max_tokens=4))
    assert isinstance(work(model)[-1], Finished) and model._decoder is before
    assert model.measure(disturbed=False), "that was the last slice"
    assert measurement.told == [True, False]
    assert not model.measuring and model._decoder.policy.max_nodes == 4
    assert (model.info.measuring, model.info.draft, model.info.cells) == (False, "n-grams", 103)
    model.submit(SequenceRequest(id="afterwards", prompt=[1, 2, 3], max_tokens=4))
    assert isinstance(work(model)[-1], Finished)


def test_a_measurement_that_fails_leaves_plain_decoding(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    model = measuring(monkeypatch, Measurement(RuntimeError("planted")))
    before = model._decoder
    assert not model.measure(disturbed=False) and model.measure(disturbed=False)
    assert not model.measuring and model._decoder is before
    assert (model.info.measuring, model.info.draft) == (False, "nothing")
    model.submit(SequenceRequest(id="afterwards", prompt=[1, 2, 3], max_tokens=4))
    assert isinstance(work(model)[-1], Finished)
