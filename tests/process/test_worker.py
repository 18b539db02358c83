"""The process that owns the model, with the bundled GGUF: jobs side by side, cancelled, stopped; the process killed."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from config import HEADS_FOLDER
from model.decoding.batching import Batch
from model.decoding.generation import Generation
from model.decoding.ngram import NgramIndex
from model.decoding.planning import Draft, FixedPlan
from model.decoding.sampling import Sampler, SamplingParams, log_softmax
from model.decoding.slot import Slot
from model.engine import Engine, EngineOptions
from model.errors import MedusaError, UsageError
from model.measuring.choosing import Wish
from model.measuring.replay import NOISE, causal, noise_floor, replay
from model.serving.jobs import Event, Failed, Finished, Job, Piece, Sampling, Started
from model.serving.model_process import ModelOptions
from model.serving.protocol import Overloaded, Worker
from model.serving.worker import ModelWorker
from model.trees.tree import Tree

T = TypeVar("T")
PROMPTS = ["import os\n\n\ndef ", "class Stack:\n    def push(self", "for i in range(", "x = [1, 2, 3, 4, 5, 6, 7, 8"]
KINDS: list[Draft] = ["none", "auto"]
GREEDY = Sampling(temperature=0.0)


def options(gguf: Path, **more: Any) -> ModelOptions:
    engine = EngineOptions(n_threads=1, context_size=more.pop("context", 512), max_nodes=16)
    wish = Wish(more.pop("draft", "both"), more.pop("tree", "2,2,1"))
    return ModelOptions(gguf, engine, None, HEADS_FOLDER, wish=wish, **{"slots": 3, **more})


@dataclass
class Served:
    """A worker and the loop that it lives on."""

    worker: ModelWorker
    loop: asyncio.AbstractEventLoop

    def run(self, work: Awaitable[T]) -> T:
        async def soon() -> T:
            return await asyncio.wait_for(work, 240)  # torch alone may take a minute to load on a busy machine

        return self.loop.run_until_complete(soon())

    def write(self, *jobs: Job) -> list[Done]:
        """Write all jobs side by side."""

        async def all_of() -> list[Done]:
            return await asyncio.gather(*(read(self.worker, job) for job in jobs))

        return self.run(all_of())


@dataclass
class Done:
    events: list[Event]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Piece))

    @property
    def ids(self) -> list[int]:
        return [token.id for event in self.events if isinstance(event, Piece) for token in event.tokens]

    @property
    def last(self) -> Any:
        return self.events[-1]


async def read(worker: ModelWorker, job: Job) -> Done:
    return Done([event async for event in worker.submit(job)])


def serve(options: ModelOptions, **more: Any) -> Iterator[Served]:
    loop = asyncio.new_event_loop()
    worker = ModelWorker(options, **more)

    async def start() -> None:
        worker.start()
        await worker.wait_ready()

    served = Served(worker, loop)
    served.run(start())
    yield served
    served.run(worker.close(0.0))
    loop.close()


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what the process remembers out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def served(bundled_gguf: Path) -> Iterator[Served]:
    """With heads and the text so far."""
    yield from serve(options(bundled_gguf))


@pytest.fixture(scope="module")
def served_f32(bundled_f32: Path) -> Iterator[Served]:
    yield from serve(options(bundled_f32))


@pytest.fixture(scope="module")
def engine(bundled_gguf: Path) -> Iterator[Engine]:
    engine = Engine(bundled_gguf, options(bundled_gguf).engine, None, HEADS_FOLDER)
    yield engine
    engine.model.close()


def test_it_is_a_worker_and_tells_of_its_model(served: Served) -> None:
    worker: Worker = served.worker
    info = worker.info
    assert worker.ready and (info.context, info.slots, info.file_type) == (512, 3, "Q4_0")
    assert "heads" in info.draft and "text so far" in info.draft and info.vocabulary == 4096


def test_texts_side_by_side_stand_their_replay(served: Served, engine: Engine) -> None:
    sampled = Sampling(temperature=0.8, seed=5)
    jobs = [Job(f"j{i}", p, 24, GREEDY if i % 2 else sampled) for i, p in enumerate(PROMPTS)]
    done = served.write(*jobs)
    drafted = sum(d.last.accepted for d in done)
    assert drafted > 12, "drafts must be accepted, or nothing was tested"
    decoder = engine.decoder()
    with decoder, engine.base(FixedPlan(), sequences=2) as replayer:
        requests = [engine.request(p, 24, sampling=SamplingParams()) for p in PROMPTS]
        plain = list[Generation]()
        for request in requests:
            plain.append(decoder.start(request))
            plain[-1].run()
        bound = 2 * NOISE * noise_floor(replayer, plain[:2])
        for job, text, request in zip(jobs, done, requests, strict=True):
            assert isinstance(text.last, Finished) and text.last.new_tokens == 24 == len(text.ids)
            assert text.text == engine.model.detokenize(text.ids)
            tokens = request.prompt + text.ids
            sampler = Sampler(SamplingParams(job.sampling.temperature, seed=job.sampling.seed or 0))
            rows = causal(replayer, tokens, len(request.prompt), 1)
            margins = [sampler.margin(row, t, i) for i, (row, t) in enumerate(zip(rows, text.ids, strict=True))]
            assert max(margins) <= bound
            wrong = [
                sampler.margin(row, (t + 1) % 4096, i) for i, (row, t) in enumerate(zip(rows, text.ids, strict=True))
            ]
            assert max(wrong) > bound, "the control: other tokens do not stand it"


BESIDE = (*PROMPTS[:2], PROMPTS[0] + "main", PROMPTS[2])


def write_beside(engine: Engine, prompts: Sequence[str]) -> list[Slot]:
    """Write all texts in one batch of three places, with trees and branches, their logits kept."""
    tree = Tree.product([2, 2])
    plan = FixedPlan(tree, 3)
    slots = []
    with engine.base(plan, sequences=3 * plan.lanes, context=1500) as base:
        drafter = engine.drafter(tree)
        batch = Batch(base, plan, places=3, cells=base.n_ctx, chunk=8, keep=True)
        for request in [engine.request(prompt, 32) for prompt in prompts]:
            slot = Slot(list(request.prompt), len(request.prompt) + 24, Sampler(SamplingParams()), lambda t: False)
            slot.drafter, slot.ngrams, slot.trace = drafter, NgramIndex(slot.tokens), []
            slots.append(slot)
        left = list(slots)
        while left or len(batch):
            while left and batch.admit(left[0]):
                left.pop(0)
            batch.step()
    return slots


@pytest.mark.parametrize("fault", ["", "cells of another text"])
def test_on_f32_every_text_beside_others_is_its_text_alone(
    bundled_f32: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, alone = Engine(bundled_f32, options(bundled_f32).engine, None, HEADS_FOLDER), list[Generation]()
    with engine.decoder() as plain:
        for prompt in BESIDE:
            alone.append(plain.start(engine.request(prompt, 24)))
            alone[-1].run()
    if fault:
        monkeypatch.setattr("model.decoding.batching._common", lambda a, b, most: most)
    slots = write_beside(engine, BESIDE)
    equal = [a.slot.tokens == b.tokens[: len(a.slot.tokens)] for a, b in zip(alone, slots, strict=True)]
    assert all(equal) != bool(fault), equal
    engine.model.close()


def test_on_f32_concurrent_requests_get_what_they_get_alone(served_f32: Served) -> None:
    jobs = [Job(f"f{i}", p, 32, GREEDY, draft=KINDS[i % 3 > 0]) for i, p in enumerate((*BESIDE, *PROMPTS, PROMPTS[3]))]
    together = served_f32.write(*jobs)
    alone = [served_f32.write(replace(job, fresh=True))[0] for job in jobs]
    assert [t.ids for t in together] == [t.ids for t in alone]
    assert sum(t.last.accepted for t in together) > 24, "drafts must be accepted, or nothing was tested"
    assert any(e.cached for t in together for e in t.events if isinstance(e, Started)), "cells were shared"


@pytest.mark.parametrize("fault", ["", "cells of another text"])
def test_logits_beside_other_texts_are_those_of_the_text_alone(
    engine: Engine, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault:
        monkeypatch.setattr("model.decoding.batching._common", lambda a, b, most: most)
    slots = write_beside(engine, BESIDE)
    assert slots[2].reused > 3, "it begins as the first"
    assert sum(sum(slot.stats.accepted) for slot in slots) > 12
    texts: list[Any] = [SimpleNamespace(slot=slot, tokens=slot.tokens[slot.prompt_length :]) for slot in slots]
    with engine.base(FixedPlan(), sequences=2) as replayer:
        floor = noise_floor(replayer, texts[:2])
        stand = [replay(replayer, text, floor).holds for text in texts]
    assert all(stand) != bool(fault), stand


def test_a_job_whose_prompt_is_known_reads_only_what_is_new(served: Served) -> None:
    job = Job("a", PROMPTS[0] + "first(self):\n    return", 8, GREEDY)
    first, second = served.write(job)[0], served.write(replace(job, id="b"))[0]
    started = second.events[0]
    assert isinstance(started, Started) and started.cached == started.prompt_tokens - 1
    assert first.text == second.text


def test_events_come_in_order_and_add_up(served: Served) -> None:
    done = served.write(Job("a", PROMPTS[1], 30, GREEDY, echo=True, logprobs=3))[0]
    started, *pieces, finished = done.events
    assert isinstance(started, Started) and done.text.startswith(PROMPTS[1])
    assert isinstance(finished, Finished) and finished.reason == "length" and finished.new_tokens == 30
    assert finished.steps + finished.accepted == 30 and sum(finished.accepted_per_depth) == finished.accepted
    assert finished.predicted_s > 0 and finished.prompt_s > 0
    tokens = [token for piece in pieces if isinstance(piece, Piece) for token in piece.tokens]
    tokens = tokens[started.prompt_tokens :]
    assert len(tokens) == 30 and sum(token.drafted for token in tokens) == finished.accepted > 0
    assert PROMPTS[1] + "".join(token.text for token in tokens) == done.text
    for token in tokens:
        assert token.logprob is not None and len(token.top) == 3
        assert token.logprob == pytest.approx(token.top[0][1]), "greedy takes the likeliest"
        assert [p for _, p in token.top] == sorted((p for _, p in token.top), reverse=True)


def test_a_prompt_is_judged(served: Served, engine: Engine) -> None:
    """With echo and logprobs, alone (no new token) or before a text; nothing is taken from the cache then."""
    served.write(Job("x", PROMPTS[1], 4, GREEDY))
    judged, followed = served.write(
        Job("a", PROMPTS[1], 0, GREEDY, echo=True, logprobs=2), Job("b", PROMPTS[1], 4, GREEDY, echo=True, logprobs=2)
    )
    assert judged.text == PROMPTS[1] and judged.last.new_tokens == judged.last.steps == 0
    assert judged.last.reason == "length" and followed.last.new_tokens == 4
    ids = engine.request(PROMPTS[1], 1).prompt
    with engine.base() as base:
        rows = causal(base, [*ids, 0], 2, 1)  # the logits behind the second token and each later one
    for done in (judged, followed):
        first, _, *rest = [t for e in done.events if isinstance(e, Piece) for t in e.tokens][: len(ids)]
        assert [first.id, *(t.id for t in rest)] == [ids[0], *ids[2:]] and first.logprob is None
        for row, token in zip(rows, rest, strict=False):
            assert token.logprob == pytest.approx(float(log_softmax(row)[token.id]), abs=0.1)
            assert len(token.top) == 2 and token.top[0][1] >= (token.logprob or 0.0) - 1e-6
    others = [abs((t.logprob or 0.0) - float(log_softmax(r)[t.id - 1])) for r, t in zip(rows, rest, strict=False)]
    assert max(others) > 1, "the control: another token's is not taken for it"


def test_the_cache_is_told_of(served: Served) -> None:
    served.write(Job("a", PROMPTS[1], 8, GREEDY))
    assert 8 < served.worker.cached <= served.worker.info.cells


def test_a_seed_repeats_a_text_whoever_drafts(served_f32: Served) -> None:
    served = served_f32
    sampling = Sampling(temperature=0.9, seed=11, min_p=0.02, frequency_penalty=0.3, repeat_penalty=1.1)
    kinds: list[Draft] = ["auto", "medusa", "ngram", "none"]
    texts = [served.write(Job("x", PROMPTS[2], 12, sampling, draft=kind))[0] for kind in kinds]
    assert len({text.text for text in texts}) == 1
    assert texts[-1].last.drafted == 0 < texts[0].last.drafted
    none = served.write(Job("y", PROMPTS[2], 12, replace(sampling, seed=None)))[0]
    assert none.last.new_tokens > 0


def test_a_stop_string_ends_the_text_before_it(served: Served) -> None:
    whole = served.write(Job("a", PROMPTS[1], 40, GREEDY))[0].text
    stop = whole[13:17]
    done = served.write(Job("a", PROMPTS[1], 40, GREEDY, stop=("never there", stop)))[0]
    assert done.text == whole[: whole.index(stop)] and done.last.reason == "stop"
    tokens = [t for e in done.events if isinstance(e, Piece) for t in e.tokens]
    assert "".join(t.text for t in tokens) == done.text, "nothing of the stop string in the tokens either"


def test_characters_are_never_split(served: Served) -> None:
    """The euro sign is three tokens of this vocabulary; biases make the model write nothing else."""
    ids = served.run(served.worker.tokenize("€", add_special=False, parse_special=False))
    ids = ids[-3:]
    texts = []
    for kind in KINDS:
        bias = {ids[0]: 50.0, ids[1]: 50.0, ids[2]: 50.0}
        sampling = Sampling(temperature=0.0, logit_bias=bias, presence_penalty=2.0, frequency_penalty=10.0)
        done = served.write(Job("a", "# 5 €", 31, sampling, draft=kind))[0]
        texts.append(done.text)
        pieces = [event.text for event in done.events if isinstance(event, Piece)]
        assert "€" in done.text and all(p == p.encode().decode() for p in pieces)
        assert "".join(t.text for e in done.events if isinstance(e, Piece) for t in e.tokens) in (
            done.text,
            done.text[:-1],
        )
    assert texts[0] == texts[1]


def test_what_cannot_be_written_is_the_clients_fault(served: Served) -> None:
    bad = [
        Job("a", "x " * 600, 5),
        Job("b", [5000], 5),
        Job("c", "x", 5, Sampling(top_p=2.0)),
        Job("d", "x", 5, stop=("",)),
        Job("e", "x", 5, grammar="root ::= ("),
        Job("f", "x", 0),
        Job("g", [], 5),
        Job("h", "x", 5, Sampling(logit_bias={9999: 1.0})),
        Job("i", "x", 5, grammar="root ::= " + "(" * 5000 + "1" + ")" * 5000),
        Job("j", "x", 5, json_schema={"type": "no such type"}),
    ]
    words = ["1201|600", "5000", "top_p", "stop", "grammar", "max_tokens", "empty", "9999", "parentheses", "schema"]
    for done, word in zip(served.write(*bad), words, strict=True):
        assert isinstance(done.last, Failed) and done.last.kind == "bad_request"
        assert any(w in done.last.message for w in word.split("|")) or word == "1201|600", done.last.message
    assert "512" in served.write(bad[0])[0].last.message


def test_a_full_context_ends_a_text_with_length(served: Served) -> None:
    done = served.write(Job("a", [17] * 500, None, Sampling(seed=1)), Job("b", [18] * 509, 99, GREEDY))
    for text in done:
        if text.last.reason == "length":
            assert text.last.prompt_tokens + text.last.new_tokens == 512
    assert any(text.last.reason == "length" for text in done)


def test_tokenizer_and_template(served: Served) -> None:
    worker = served.worker
    ids = served.run(worker.tokenize("import os", add_special=True, parse_special=False))
    assert served.run(worker.detokenize(ids)).strip() == "import os"
    text = served.run(worker.apply_template([{"role": "user", "content": "Hello"}]))
    assert "Hello" in text
    with pytest.raises(MedusaError, match="9999"):
        served.run(worker.detokenize([9999]))
    chat = served.write(Job("a", [{"role": "user", "content": "Hello"}], 4, GREEDY))[0]
    assert isinstance(chat.last, Finished)


def test_a_grammar_holds_whoever_drafts(served: Served) -> None:
    gbnf = 'root ::= "yes " ("a" | "b")+ "!" '
    texts = []
    for kind in KINDS:
        job = Job("a", PROMPTS[0], 30, Sampling(temperature=0.7, seed=2), grammar=gbnf, draft=kind)
        texts.append(served.write(job)[0])
    assert texts[0].text == texts[1].text
    assert texts[0].text.startswith("yes ") and set(texts[0].text[4:]) <= set("ab!")


def test_typical_acceptance_writes(served: Served) -> None:
    done = served.write(Job("a", PROMPTS[1], 30, Sampling(temperature=0.8, seed=4), typical=True))[0]
    exact = served.write(Job("a", PROMPTS[1], 30, Sampling(temperature=0.8, seed=4)))[0]
    assert done.last.new_tokens == 30 and done.last.accepted >= exact.last.accepted


def test_a_schema_becomes_json(served: Served) -> None:
    import json

    schema = {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"enum": [1, 2]}}, "required": ["a", "b"]}
    done = served.write(Job("a", "{", 60, GREEDY, json_schema=schema))[0]
    assert done.last.reason == "stop"
    assert set(json.loads(done.text)) == {"a", "b"}


def test_a_cancelled_job_frees_its_place_at_once(served: Served) -> None:
    worker = served.worker

    async def leave() -> float:
        streams = [worker.submit(Job(f"l{i}", PROMPTS[i], None, Sampling(seed=i))) for i in range(3)]
        for stream in streams:
            async for event in stream:
                if isinstance(event, Piece):
                    break
        waiting = asyncio.create_task(read(worker, Job("w", PROMPTS[3], 3, GREEDY)))
        await asyncio.sleep(0)
        since = time.perf_counter()
        worker.cancel("l0")
        worker.cancel("l1")
        await streams[2].aclose()  # type: ignore[attr-defined]
        done = await waiting
        assert isinstance(done.last, Finished)
        return time.perf_counter() - since

    assert served.run(leave()) < 2.0
    assert worker.running == worker.queue_length == 0
    worker.cancel("unknown")


def test_a_full_queue_says_so(served: Served) -> None:
    worker = served.worker

    async def crowd() -> None:
        streams = [worker.submit(Job(f"c{i}", "x", 2, GREEDY)) for i in range(3 + worker._max_queue)]
        with pytest.raises(Overloaded) as error:
            worker.submit(Job("more", "x", 2))
        assert error.value.retry_after_s >= 1 and worker.queue_length == len(streams)
        for stream in streams:
            assert isinstance([event async for event in stream][-1], Finished), "nothing read meanwhile was lost"

    served.run(crowd())


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture
def second(bundled_gguf: Path) -> Iterator[Served]:
    """A worker that may be killed; without heads, so it loads fast."""
    yield from serve(options(bundled_gguf, draft="ngram", tree="1"))


def test_a_killed_process_is_replaced(second: Served) -> None:
    worker = second.worker

    def pid() -> int:
        assert worker._life is not None and worker._life.process.pid
        return worker._life.process.pid

    async def kill(at: Callable[[], None]) -> list[Done]:
        tasks = [
            asyncio.create_task(read(worker, Job(f"k{i}", PROMPTS[i % 4], None, Sampling(seed=i)))) for i in range(9)
        ]
        asked = asyncio.create_task(worker.tokenize("x" * 10_000, add_special=True, parse_special=True))
        while not worker.running:
            await asyncio.sleep(0.005)
        at()
        done = await asyncio.gather(*tasks)
        assert isinstance((await asyncio.gather(asked, return_exceptions=True))[0], (list, MedusaError))
        assert not worker.ready
        with pytest.raises(Overloaded):
            worker.submit(Job("meanwhile", "x", 2))
        await worker.wait_ready()
        return done

    before = pid()
    done = second.run(kill(lambda: os.kill(before, signal.SIGKILL)))
    failed = [d.last for d in done if isinstance(d.last, Failed)]
    assert len(failed) >= 6 and all(f.kind == "internal" for f in failed)
    assert worker.ready and pid() != before and gone(before)
    assert second.write(Job("again", PROMPTS[0], 5, GREEDY))[0].last.new_tokens == 5
    last = pid()
    os.kill(last, signal.SIGTERM)  # as a terminal or systemd sends it to the whole group

    async def close() -> Done:
        task = asyncio.create_task(read(worker, Job("last", PROMPTS[1], 30, GREEDY)))
        await asyncio.sleep(0.01)
        closing = asyncio.create_task(worker.close(20.0))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            worker.submit(Job("new", "x", 2))
        await closing
        return await task

    assert second.run(close()).last.new_tokens == 30, "what runs is finished"
    assert gone(last) and last not in [process.pid for process in multiprocessing.active_children()]


def test_a_process_that_says_nothing_is_replaced(bundled_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.serving.worker.STUCK_S", 4.0)  # more than SIGN_OF_LIFE_S
    for second in serve(options(bundled_gguf, draft="ngram", tree="1")):
        assert second.worker._life is not None
        pid = second.worker._life.process.pid
        assert pid is not None
        time.sleep(1.0)
        assert second.write(Job("a", PROMPTS[0], 3, GREEDY))[0].last.new_tokens == 3
        os.kill(pid, signal.SIGSTOP)  # it hangs, as in a grammar that llama.cpp never comes to an end with
        since = time.perf_counter()
        (done,) = second.write(Job("b", PROMPTS[0], 3, GREEDY))
        assert isinstance(done.last, Failed) and 3.0 < time.perf_counter() - since < 20 and gone(pid)
        second.run(second.worker.wait_ready())
        assert second.write(Job("c", PROMPTS[0], 3, GREEDY))[0].last.new_tokens == 3


def test_a_deadline_ends_what_still_runs(second: Served) -> None:
    worker = second.worker

    async def close() -> tuple[Done, float]:
        task = asyncio.create_task(read(worker, Job("long", PROMPTS[1], None, Sampling(seed=1, logit_bias={2: -1e6}))))
        while not worker.running:
            await asyncio.sleep(0.005)
        since = time.perf_counter()
        await worker.close(0.05)
        return await task, time.perf_counter() - since

    done, took = second.run(close())
    assert isinstance(done.last, Failed) and "shutting down" in done.last.message and took < 4


def test_a_model_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF nothing")

    async def start() -> None:
        worker = ModelWorker(options(bad))
        worker.start()
        try:
            await worker.wait_ready()
        finally:
            await worker.close(0.0)

    with pytest.raises(MedusaError, match=r"bad\.gguf"):
        asyncio.run(start())
    assert issubclass(UsageError, MedusaError)
