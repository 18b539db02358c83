"""The process that owns the model: sequences side by side, cancelled, stopped; a killed process."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from worker_contract import Submitted, generate, submit

from model.decoding.draft_policy import FixedPolicy
from model.decoding.drafters.drafter import NGRAM
from model.decoding.drafters.sources import Sources
from model.decoding.sampling import Sampler, SamplingParams, log_softmax
from model.decoding.sequence import Sequence
from model.errors import MedusaError, UsageError
from model.evaluation.replay import NOISE, causal_logits, noise_floor, replay, replay_base
from model.loaded_model import LoadedModel, LoadOptions, new_drafters
from model.planning.choice import DraftOptions
from model.serving.worker.messages import (
    Failed,
    Finished,
    SequenceRequest,
    Started,
    TextChunk,
)
from model.serving.worker.protocol import Overloaded, Worker
from model.serving.worker.served_model import UNMEASURED, ModelOptions
from model.serving.worker.worker import ModelWorker
from model.trees.tree import Tree

T = TypeVar("T")
PROMPTS = [
    "import os\n\n\ndef ",
    "class Stack:\n    def push(self",
    "for i in range(",
    "x = [1, 2, 3, 4, 5, 6, 7, 8",
]
KINDS: list[Sources] = ["none", "auto"]
GREEDY = SamplingParams()


def options(gguf: Path, *, sources: Sources = "both", tree: str = "2,2,1") -> ModelOptions:
    return ModelOptions(
        model_path=gguf,
        load=LoadOptions(n_threads=1, context_size=512, flash_attn=False, max_nodes=16),
        slots=3,
        draft=DraftOptions(sources=sources, tree=tree),
    )


@dataclass
class Served:
    """A worker and the loop that it lives on."""

    worker: ModelWorker
    loop: asyncio.AbstractEventLoop

    def run(self, work: Awaitable[T]) -> T:
        async def soon() -> T:
            return await asyncio.wait_for(
                work, 240
            )  # torch alone may take a minute to load on a busy machine

        return self.loop.run_until_complete(soon())

    def generate(self, *requests: SequenceRequest) -> list[Submitted]:
        """Generate all sequences side by side."""

        async def all_of() -> list[Submitted]:
            return await asyncio.gather(*(generate(self.worker, r) for r in requests))

        return self.run(all_of())


def ask(
    id: str,
    prompt: Any,
    max_tokens: int | None,
    sampling: SamplingParams = GREEDY,
    **fields: Any,
) -> SequenceRequest:
    return SequenceRequest(id=id, prompt=prompt, max_tokens=max_tokens, sampling=sampling, **fields)


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
    """With heads and n-grams."""
    yield from serve(options(bundled_gguf))


@pytest.fixture(scope="module")
def served_f32(bundled_f32: Path) -> Iterator[Served]:
    yield from serve(options(bundled_f32))


@pytest.fixture(scope="module")
def loaded(bundled_gguf: Path) -> Iterator[LoadedModel]:
    loaded = LoadedModel(bundled_gguf, options(bundled_gguf).load)
    yield loaded
    loaded.close()


def test_it_is_a_worker_and_tells_of_its_model(served: Served) -> None:
    worker: Worker = served.worker
    info = worker.info
    assert worker.ready and (info.context, info.slots, info.file_type) == (512, 3, "Q4_0")
    assert "heads, n-grams" in info.draft and info.vocabulary == 4096


def test_it_answers_while_it_measures_and_drafts_afterwards(
    bundled_f32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first start; the second one knows what was measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    adaptive = options(bundled_f32, sources="ngram", tree="")

    async def measured(worker: ModelWorker) -> None:
        while worker.info.measuring:
            await asyncio.sleep(0.02)

    for first in (True, False):
        for served in serve(adaptive):
            worker = served.worker
            assert worker.info.measuring == first and (worker.info.draft == UNMEASURED) == first
            [early] = served.generate(ask("early", PROMPTS[3], 40))
            assert isinstance(early.last, Finished)
            served.run(measured(worker))
            assert ("n-grams" in worker.info.draft and worker.cells_used == 0) or not first
            [late] = served.generate(ask("late", PROMPTS[3], 40))
            assert isinstance(late.last, Finished) and late.ids == early.ids
            if first:
                assert early.last.drafted == 0


def test_sequences_side_by_side_pass_their_replay(served: Served, loaded: LoadedModel) -> None:
    sampled = SamplingParams(temperature=0.8, seed=5)
    asked = [
        ask(f"j{i}", prompt, 24, GREEDY if i % 2 else sampled) for i, prompt in enumerate(PROMPTS)
    ]
    done = served.generate(*asked)
    assert sum(one.last.accepted for one in done) > 12, "without accepted drafts nothing is tested"
    requests = [loaded.request(prompt, 24, GREEDY) for prompt in PROMPTS]
    with loaded.fixed_decoder() as decoder, replay_base(loaded) as replayer:
        plain = [decoder.run(request) for request in requests[:2]]
        bound = 2 * NOISE * noise_floor(replayer, plain)
        for one, request in zip(done, requests, strict=True):
            assert isinstance(one.last, Finished) and one.last.new_tokens == 24 == len(one.ids)
            assert one.text == loaded.base_model.detokenize(one.ids)
            sampling = one.request.sampling
            params = SamplingParams(temperature=sampling.temperature, seed=sampling.seed or 0)
            known = Sequence(request.prompt, loaded.base_model, params, context=512)
            known.tokens += one.ids
            rows = list(enumerate(causal_logits(replayer, known, 1)))
            sampler = Sampler(params)
            margins = [sampler.margin(row, one.ids[i], i) for i, row in rows]
            assert max(margins) <= bound
            wrong = [sampler.margin(row, (one.ids[i] + 1) % 4096, i) for i, row in rows]
            assert max(wrong) > bound, "the control: other tokens do not pass"


BESIDE = (*PROMPTS[:2], PROMPTS[0] + "main", PROMPTS[2])


def generate_beside(loaded: LoadedModel, prompts: AnySequence[str]) -> list[Sequence]:
    """Generate all sequences in one scheduler, three at a time, drafted by heads and n-grams."""
    tree = Tree.product([2, 2])
    decoder = loaded.shared_decoder(
        FixedPolicy(tree, 3),
        new_drafters(loaded.heads_drafter(tree), {NGRAM}),
        n_parallel=3,
        max_stall_s=1e-6,  # prompts come in small chunks, between steps of others
    )
    with decoder:
        sequences = [
            decoder.new_sequence(loaded.request(prompt, 24, GREEDY), keep_logits=True)
            for prompt in prompts
        ]
        for sequence in sequences:
            decoder.scheduler.add(sequence)
        most = 0
        while decoder.scheduler.has_unfinished:
            decoder.scheduler.step()
            most = max(most, decoder.scheduler.n_running)
    assert most == 3
    return sequences


@pytest.mark.parametrize("fault", ["", "cells of another sequence"])
def test_on_f32_every_sequence_beside_others_is_what_it_is_alone(
    bundled_f32: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = LoadedModel(bundled_f32, options(bundled_f32).load)
    with loaded.fixed_decoder() as plain:
        alone = [plain.run(loaded.request(prompt, 24, GREEDY)).tokens for prompt in BESIDE]
    if fault:
        monkeypatch.setattr("model.decoding.kv_slots.common_prefix", lambda a, b, most: most)
    equal = [
        one == sequence.tokens
        for one, sequence in zip(alone, generate_beside(loaded, BESIDE), strict=True)
    ]
    assert all(equal) != bool(fault), equal
    loaded.close()


def test_on_f32_concurrent_requests_get_what_they_get_alone(served_f32: Served) -> None:
    asked = [
        ask(f"f{i}", prompt, 32, GREEDY, draft="auto" if i % 3 else "none")
        for i, prompt in enumerate((*BESIDE, *PROMPTS, PROMPTS[3]))
    ]
    together = served_f32.generate(*asked)
    alone = [served_f32.generate(replace(one, use_prefix_cache=False))[0] for one in asked]
    assert [one.ids for one in together] == [one.ids for one in alone]
    assert sum(one.last.accepted for one in together) > 24, (
        "without accepted drafts nothing is tested"
    )
    starts = [event for one in together for event in one.events if isinstance(event, Started)]
    assert any(start.cached_tokens for start in starts), "cells were shared"


@pytest.mark.parametrize("fault", ["", "cells of another sequence"])
def test_logits_beside_other_sequences_are_those_of_the_sequence_alone(
    loaded: LoadedModel, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault:
        monkeypatch.setattr("model.decoding.kv_slots.common_prefix", lambda a, b, most: most)
    sequences = generate_beside(loaded, BESIDE)
    assert sequences[2].n_reused > 3, "it begins as the first"
    assert sum(sum(sequence.statistics.accepted) for sequence in sequences) > 12
    with replay_base(loaded) as replayer:
        floor = noise_floor(replayer, sequences[:2])
        hold = [replay(replayer, sequence, floor).holds for sequence in sequences]
    assert all(hold) != bool(fault), hold


def test_of_a_known_prompt_only_what_is_new_is_read(served: Served) -> None:
    asked = ask("a", PROMPTS[0] + "first(self):\n    return", 8, GREEDY)
    [first] = served.generate(asked)
    [second] = served.generate(replace(asked, id="b"))
    started = second.events[0]
    assert isinstance(started, Started)
    assert started.cached_tokens == started.prompt_tokens - 1
    assert first.text == second.text


def test_events_come_in_order_and_add_up(served: Served) -> None:
    done = served.generate(ask("a", PROMPTS[1], 30, GREEDY, echo=True, logprobs=3))[0]
    started, finished = done.events[0], done.last
    assert isinstance(started, Started) and done.text.startswith(PROMPTS[1])
    assert isinstance(finished, Finished)
    assert finished.reason == "length" and finished.new_tokens == 30
    assert finished.steps + finished.accepted == 30
    assert sum(finished.accepted_per_depth) == finished.accepted
    assert finished.predicted_s > 0 and finished.prompt_s > 0
    tokens = done.tokens[started.prompt_tokens :]
    assert len(tokens) == 30 and sum(token.drafted for token in tokens) == finished.accepted > 0
    assert PROMPTS[1] + "".join(token.text for token in tokens) == done.text
    for token in tokens:
        assert token.logprob is not None and len(token.top) == 3
        assert token.logprob == pytest.approx(token.top[0][1]), "greedy takes the likeliest"
        assert [p for _, p in token.top] == sorted((p for _, p in token.top), reverse=True)


def test_a_prompt_gets_its_log_probabilities(served: Served, loaded: LoadedModel) -> None:
    """With echo and logprobs, alone (no new token) or before new tokens; the cache is not used."""
    served.generate(ask("x", PROMPTS[1], 4, GREEDY))
    alone, followed = served.generate(
        ask("a", PROMPTS[1], 0, GREEDY, echo=True, logprobs=2),
        ask("b", PROMPTS[1], 4, GREEDY, echo=True, logprobs=2),
    )
    assert alone.text == PROMPTS[1] and alone.last.new_tokens == alone.last.steps == 0
    assert alone.last.reason == "length" and followed.last.new_tokens == 4
    prompt = loaded.request(PROMPTS[1], 1, GREEDY).prompt
    known = Sequence(prompt[:2], loaded.base_model, GREEDY, context=512)
    known.tokens += [*prompt[2:], 0]
    with loaded.new_base() as base:
        rows = causal_logits(base, known, 1)  # behind the second token and each later one
    for done in (alone, followed):
        first, _, *rest = done.tokens[: len(prompt)]
        assert [first.id, *(token.id for token in rest)] == [prompt[0], *prompt[2:]]
        assert first.logprob is None
        for row, token in zip(rows, rest, strict=False):
            assert token.logprob == pytest.approx(float(log_softmax(row)[token.id]), abs=0.1)
            assert len(token.top) == 2 and token.top[0][1] >= (token.logprob or 0.0) - 1e-6
    others = [
        abs((token.logprob or 0.0) - float(log_softmax(row)[token.id - 1]))
        for row, token in zip(rows, rest, strict=False)
    ]
    assert max(others) > 1, "the control: another token's is not taken for it"


def test_the_cache_is_told_of(served: Served) -> None:
    told = list[int]()

    async def watch() -> None:
        running = asyncio.create_task(generate(served.worker, ask("a", PROMPTS[1], 60, GREEDY)))
        while not running.done():
            told.append(served.worker.cells_used)
            await asyncio.sleep(0.001)

    served.run(watch())
    assert 8 < max(told) <= served.worker.info.cells
    assert served.worker.cells_used == 0, "what has finished takes no cells"


def test_a_seed_repeats_a_text_whatever_drafts(served_f32: Served) -> None:
    sampling = SamplingParams(
        temperature=0.9, seed=11, min_p=0.02, frequency_penalty=0.3, repeat_penalty=1.1
    )
    kinds: list[Sources] = ["auto", "heads", "ngram", "none"]
    done = [
        served_f32.generate(ask("x", PROMPTS[2], 12, sampling, draft=kind))[0] for kind in kinds
    ]
    assert len({one.text for one in done}) == 1
    assert done[-1].last.drafted == 0 < done[0].last.drafted
    [unseeded] = served_f32.generate(ask("y", PROMPTS[2], 12, replace(sampling, seed=None)))
    assert unseeded.last.new_tokens > 0


def test_a_stop_string_ends_the_text_before_it(served: Served) -> None:
    whole = served.generate(ask("a", PROMPTS[1], 40, GREEDY))[0].text
    stop = whole[13:17]
    done = served.generate(ask("a", PROMPTS[1], 40, GREEDY, stop=("never there", stop)))[0]
    assert done.text == whole[: whole.index(stop)] and done.last.reason == "stop"
    assert "".join(token.text for token in done.tokens) == done.text, (
        "nothing of the stop string in the tokens either"
    )


def test_characters_are_never_split(served: Served) -> None:
    """The euro sign is three tokens of this vocabulary; biases let nothing else be generated."""
    ids = served.run(served.worker.tokenize("€", add_special=False, parse_special=False))
    bias = dict.fromkeys(ids[-3:], 50.0)
    sampling = SamplingParams(logit_bias=bias, presence_penalty=2.0, frequency_penalty=10.0)
    texts = []
    for kind in KINDS:
        [done] = served.generate(ask("a", "# 5 €", 31, sampling, draft=kind))
        texts.append(done.text)
        assert "€" in done.text
        assert all(chunk.text == chunk.text.encode().decode() for chunk in done.chunks)
        # max_tokens may cut the last character in half.
        of_tokens = "".join(token.text for token in done.tokens)
        assert of_tokens in (done.text, done.text[:-1])
    assert texts[0] == texts[1]


def test_what_cannot_be_generated_is_the_clients_fault(served: Served) -> None:
    bad = [
        ask("a", "x " * 600, 5),
        ask("b", [5000], 5),
        ask("d", "x", 5, stop=("",)),
        ask("e", "x", 5, grammar="root ::= ("),
        ask("f", "x", 0),
        ask("g", [], 5),
        ask("h", "x", 5, SamplingParams(logit_bias={9999: 1.0})),
        ask("i", "x", 5, grammar="root ::= " + "(" * 5000 + "1" + ")" * 5000),
        ask("j", "x", 5, json_schema={"type": "no such type"}),
    ]
    words = [
        "1201|600",
        "5000",
        "stop",
        "grammar",
        "max_tokens",
        "empty",
        "9999",
        "parentheses",
        "schema",
    ]
    for done, word in zip(served.generate(*bad), words, strict=True):
        assert isinstance(done.last, Failed) and done.last.kind == "bad_request"
        assert any(w in done.last.message for w in word.split("|")) or word == "1201|600", (
            done.last.message
        )
    assert "512" in served.generate(bad[0])[0].last.message


def test_a_full_context_ends_a_sequence_with_length(served: Served) -> None:
    done = served.generate(
        ask("a", [17] * 500, None, SamplingParams(temperature=1.0, seed=1)),
        ask("b", [18] * 509, 99, GREEDY),
    )
    full = [one for one in done if one.last.reason == "length"]
    assert full
    for one in full:
        assert one.last.prompt_tokens + one.last.new_tokens == 512


def test_tokenizer_and_template(served: Served) -> None:
    worker = served.worker
    ids = served.run(worker.tokenize("import os", add_special=True, parse_special=False))
    assert served.run(worker.detokenize(ids)).strip() == "import os"
    text = served.run(worker.apply_template([{"role": "user", "content": "Hello"}]))
    assert "Hello" in text
    with pytest.raises(MedusaError, match="9999"):
        served.run(worker.detokenize([9999]))
    chat = served.generate(ask("a", [{"role": "user", "content": "Hello"}], 4, GREEDY))[0]
    assert isinstance(chat.last, Finished)


def test_a_grammar_holds_whatever_drafts(served: Served) -> None:
    gbnf = 'root ::= "yes " ("a" | "b")+ "!" '
    sampling = SamplingParams(temperature=0.7, seed=2)
    texts = []
    for kind in KINDS:
        [done] = served.generate(ask("a", PROMPTS[0], 30, sampling, grammar=gbnf, draft=kind))
        texts.append(done.text)
    assert texts[0] == texts[1]
    assert texts[0].startswith("yes ") and set(texts[0][4:]) <= set("ab!")


def test_typical_acceptance_generates(served: Served) -> None:
    sampling = SamplingParams(temperature=0.8, seed=4)
    [typical] = served.generate(ask("a", PROMPTS[1], 30, sampling, typical_acceptance=True))
    [exact] = served.generate(ask("a", PROMPTS[1], 30, sampling))
    assert typical.last.new_tokens == 30 and typical.last.accepted >= exact.last.accepted


def test_a_schema_becomes_json(served: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"enum": [1, 2]}},
        "required": ["a", "b"],
    }
    done = served.generate(ask("a", "{", 60, GREEDY, json_schema=schema))[0]
    assert done.last.reason == "stop"
    assert set(json.loads(done.text)) == {"a", "b"}


def test_a_cancelled_sequence_frees_its_slot_at_once(served: Served) -> None:
    worker = served.worker

    async def leave() -> float:
        long = [
            submit(worker, ask(f"l{i}", PROMPTS[i], None, SamplingParams(temperature=1.0, seed=i)))
            for i in range(3)
        ]
        for one in long:
            await one.until(TextChunk)
        waiting = asyncio.create_task(generate(worker, ask("w", PROMPTS[3], 3, GREEDY)))
        await asyncio.sleep(0)
        since = time.perf_counter()
        worker.cancel("l0")
        worker.cancel("l1")
        worker.cancel("l2")
        done = await waiting
        assert isinstance(done.last, Finished)
        return time.perf_counter() - since

    assert served.run(leave()) < 2.0
    assert worker.running == worker.queue_length == 0
    worker.cancel("unknown")


def test_a_full_queue_says_so(served: Served) -> None:
    worker = served.worker

    async def crowd() -> None:
        taken = [submit(worker, ask(f"c{i}", "x", 2)) for i in range(3 + worker._max_queue)]
        with pytest.raises(Overloaded) as error:
            submit(worker, ask("more", "x", 2))
        assert error.value.retry_after_s >= 1 and worker.queue_length == len(taken)
        for one in taken:
            assert isinstance(await one.end(), Finished)

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
    yield from serve(options(bundled_gguf, sources="ngram", tree="1"))


def test_a_killed_process_is_replaced(second: Served) -> None:
    worker = second.worker

    def pid() -> int:
        assert worker._handle is not None and worker._handle.process.pid
        return worker._handle.process.pid

    async def kill(at: Callable[[], None]) -> list[Submitted]:
        tasks = [
            asyncio.create_task(
                generate(
                    worker,
                    ask(f"k{i}", PROMPTS[i % 4], None, SamplingParams(temperature=1.0, seed=i)),
                )
            )
            for i in range(9)
        ]
        asked = asyncio.create_task(
            worker.tokenize("x" * 10_000, add_special=True, parse_special=True)
        )
        while not worker.running:
            await asyncio.sleep(0.005)
        at()
        done = await asyncio.gather(*tasks)
        assert isinstance(
            (await asyncio.gather(asked, return_exceptions=True))[0], (list, MedusaError)
        )
        assert not worker.ready
        with pytest.raises(Overloaded):
            submit(worker, ask("meanwhile", "x", 2))
        await worker.wait_ready()
        return done

    before = pid()
    done = second.run(kill(lambda: os.kill(before, signal.SIGKILL)))
    failed = [d.last for d in done if isinstance(d.last, Failed)]
    assert len(failed) >= 6 and all(f.kind == "internal" for f in failed)
    assert worker.ready and pid() != before and gone(before)
    assert second.generate(ask("again", PROMPTS[0], 5, GREEDY))[0].last.new_tokens == 5
    last = pid()
    os.kill(last, signal.SIGTERM)  # as a terminal or systemd sends it to the whole group

    async def close() -> Submitted:
        task = asyncio.create_task(generate(worker, ask("last", PROMPTS[1], 30, GREEDY)))
        await asyncio.sleep(0.01)
        closing = asyncio.create_task(worker.close(20.0))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            submit(worker, ask("new", "x", 2))
        await closing
        return await task

    assert second.run(close()).last.new_tokens == 30, "what runs is finished"
    assert gone(last) and last not in [process.pid for process in multiprocessing.active_children()]


def test_a_process_that_says_nothing_is_replaced(
    bundled_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.serving.worker.worker.STUCK_S", 4.0)  # more than SIGN_OF_LIFE_S
    for second in serve(options(bundled_gguf, sources="ngram", tree="1")):
        assert second.worker._handle is not None
        pid = second.worker._handle.process.pid
        assert pid is not None
        time.sleep(1.0)
        assert second.generate(ask("a", PROMPTS[0], 3, GREEDY))[0].last.new_tokens == 3
        os.kill(
            pid, signal.SIGSTOP
        )  # it hangs, as in a grammar that llama.cpp never comes to an end with
        since = time.perf_counter()
        (done,) = second.generate(ask("b", PROMPTS[0], 3, GREEDY))
        assert (
            isinstance(done.last, Failed) and 3.0 < time.perf_counter() - since < 20 and gone(pid)
        )
        second.run(second.worker.wait_ready())
        assert second.generate(ask("c", PROMPTS[0], 3, GREEDY))[0].last.new_tokens == 3


def test_a_deadline_ends_what_still_runs(second: Served) -> None:
    worker = second.worker

    async def close() -> tuple[Submitted, float]:
        task = asyncio.create_task(
            generate(
                worker,
                ask(
                    "long",
                    PROMPTS[1],
                    None,
                    SamplingParams(temperature=1.0, seed=1, logit_bias={2: -1e6}),
                ),
            )
        )
        while not worker.running:
            await asyncio.sleep(0.005)
        since = time.perf_counter()
        await worker.close(0.05)
        return await task, time.perf_counter() - since

    done, seconds = second.run(close())
    assert isinstance(done.last, Failed)
    assert "shutting down" in done.last.message
    assert seconds < 4


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
