"""The Python API, with the bundled model: generate, stream and chat, and what it refuses."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from model.decoding.decoder import Decoder
from model.decoding.kv_slots import KVSlots
from model.decoding.request import Request
from model.engine import Completion, DraftOptions, Engine, LoadOptions, SamplingParams, Stream
from model.errors import ContextError, DataError, HeadsError, ModelFileError, UsageError
from model.loaded_model import LoadedModel

LOAD = LoadOptions(n_threads=1, context_size=256, max_nodes=8)
DRAFT = DraftOptions(sources="both", tree="3")  # and n-grams behind it, in every step
PROMPTS = [
    "import os\n\n\ndef ",
    "class Stack:\n    def push(self",
    "x = [1, 2, 3, 4, 5, 6, 7, 8",
    "for i in range(",
    "import os\n\n\ndef main",
]
N = 24  # new tokens
SAMPLED = SamplingParams(temperature=0.8, seed=5)


def open_engine(path: Path, **options: Any) -> Engine:
    return Engine(path, **{"load": LOAD, "draft": DRAFT, **options})


@pytest.fixture(scope="module")
def plain(bundled_f32: Path) -> list[str]:
    """What plain decoding makes of PROMPTS. In F32 a text is the same whatever the batches are."""
    loaded = LoadedModel(bundled_f32, LOAD)
    with loaded.fixed_decoder() as decoder:
        requests = [loaded.request(prompt, N, SamplingParams()) for prompt in PROMPTS]
        texts = [decoder.run(request).take_output().text for request in requests]
    loaded.close()
    assert len(set(texts)) == len(PROMPTS)
    return texts


@pytest.fixture(scope="module")
def shared(bundled_f32: Path) -> Iterator[Engine]:
    with open_engine(bundled_f32, chat_template="vicuna") as engine:
        yield engine


@pytest.fixture
def engine(shared: Engine, plain: list[str]) -> Iterator[Engine]:
    """An engine that must be as good afterwards as it was before."""
    yield shared
    assert not shared._decoder.scheduler.has_unfinished
    [completion] = shared.generate(PROMPTS[:1], max_tokens=N)
    assert completion.text == plain[0]


def texts(completions: list[Completion]) -> list[str]:
    return [completion.text for completion in completions]


def finish(stream: Stream) -> str:
    return "".join(output.text for output in stream)


# generate


@pytest.mark.parametrize("n_parallel", [1, 3])
def test_several_prompts_get_what_each_gets_alone(
    bundled_f32: Path, plain: list[str], n_parallel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_engine(bundled_f32, n_parallel=n_parallel) as engine:
        scheduler = engine._decoder.scheduler
        step = scheduler.step
        n_running = list[int]()

        def count() -> Any:
            finished = step()
            n_running.append(scheduler.n_running + len(finished))
            return finished

        monkeypatch.setattr(scheduler, "step", count)
        together = engine.generate(PROMPTS, max_tokens=N)
        assert max(n_running) == n_parallel
        alone = [engine.generate([prompt], max_tokens=N)[0] for prompt in PROMPTS]
    assert texts(together) == texts(alone) == plain
    assert [each.tokens for each in together] == [each.tokens for each in alone]
    for each in together:
        assert each.finish_reason == "length" and len(each.tokens) == N
        assert each.prompt_tokens > each.cached_tokens >= 0
        assert each.prefill_s > 0 and each.decode_s > 0 and each.tokens_per_s > 0
        assert each.acceptance_length == pytest.approx(N / each.statistics.steps)
        accepted = N - each.statistics.steps
        assert each.acceptance_rate == pytest.approx(accepted / sum(each.statistics.drafted))
    assert sum(each.acceptance_length > 1.2 for each in together) > 2, "drafts are accepted"
    if n_parallel > 1:  # alone, others come in between
        assert together[4].cached_tokens > 3, "it begins as the first does"


def test_text_and_its_token_ids_are_the_same_prompt(engine: Engine, plain: list[str]) -> None:
    ids = engine.loaded.base_model.tokenize(PROMPTS[1]).tolist()
    assert texts(engine.generate([ids, PROMPTS[1]], max_tokens=N)) == [plain[1], plain[1]]
    assert engine.generate([]) == []


def test_each_prompt_draws_with_a_seed_of_its_own(engine: Engine) -> None:
    def generate(prompts: list[str], seed: int | None) -> list[str]:
        params = SamplingParams(temperature=0.8, seed=seed)
        return texts(engine.generate(list(prompts), params, max_tokens=N))

    twice = generate([PROMPTS[0]] * 2, 5)
    assert twice[0] != twice[1]
    assert twice == generate([PROMPTS[0]] * 2, 5)
    assert twice == generate([PROMPTS[0]], 5) + generate([PROMPTS[0]], 6)
    unseeded = generate([PROMPTS[0]] * 4, None)
    assert len(set(unseeded)) > 1


def test_a_stop_string_ends_the_text_before_it(engine: Engine, plain: list[str]) -> None:
    stop = plain[1][8:12]
    [completion] = engine.generate(PROMPTS[1:2], max_tokens=N, stop=["never there", stop])
    assert completion.text == plain[1][: plain[1].index(stop)]
    assert completion.finish_reason == "stop"


def test_without_a_number_the_context_is_filled(engine: Engine) -> None:
    params = SamplingParams(logit_bias=dict.fromkeys(engine.loaded.base_model.eog, -1e6))
    [completion] = engine.generate([PROMPTS[0]], params, max_tokens=None)
    assert completion.finish_reason == "length"
    assert completion.prompt_tokens + len(completion.tokens) == LOAD.context_size


# stream


@pytest.mark.parametrize("params", [SamplingParams(), SAMPLED])
def test_the_pieces_of_a_stream_make_up_its_completion(
    engine: Engine, params: SamplingParams
) -> None:
    for prompt in PROMPTS:
        stream = engine.stream(prompt, params, max_tokens=N)
        outputs = list(stream)
        tokens = [token for output in outputs for token in output.tokens]
        completion = stream.completion
        assert len([output for output in outputs if output.text]) > 3
        assert "".join(output.text for output in outputs) == completion.text
        assert "".join(token.text for token in tokens) == completion.text
        assert [token.id for token in tokens] == completion.tokens
        drafted = sum(token.drafted for token in tokens)
        assert drafted == sum(completion.statistics.accepted)
        assert not tokens[0].drafted and drafted + completion.statistics.steps == N
        assert [completion.text] == texts(engine.generate([prompt], params, max_tokens=N))


def test_a_stream_never_yields_half_a_character(engine: Engine) -> None:
    """The euro sign is three tokens; by their biases nothing else is generated."""
    ids = engine.loaded.base_model.tokenize("€").tolist()[-3:]
    params = SamplingParams(
        logit_bias=dict.fromkeys(ids, 50.0), presence_penalty=2.0, frequency_penalty=10.0
    )
    pieces = [output.text for output in engine.stream("# 5 €", params, max_tokens=30)]
    assert "€" in "".join(pieces) and "\ufffd" not in "".join(pieces[:-1])


@pytest.mark.parametrize("how", ["close", "drop", "break in a loop"])
def test_a_stream_that_ends_early_frees_the_engine(
    engine: Engine, plain: list[str], how: str
) -> None:
    if how == "break in a loop":
        for output in engine.stream(PROMPTS[1], max_tokens=N):
            if output.text:
                break
    else:
        stream = engine.stream(PROMPTS[1], max_tokens=N)
        begun = ""
        while not begun:
            begun += next(stream).text
        with pytest.raises(UsageError, match="generating already"):
            engine.generate(PROMPTS)
        if how == "close":
            stream.close()
            stream.close()
            assert stream.completion.text == begun and stream.completion.finish_reason is None
            assert list(stream) == []
        else:
            del stream
            gc.collect()
    assert not engine._decoder.scheduler.has_unfinished
    assert finish(engine.stream(PROMPTS[1], max_tokens=N)) == plain[1]


def test_a_stream_that_nobody_reads_holds_nothing_up(engine: Engine, plain: list[str]) -> None:
    unread = engine.stream(PROMPTS[2], max_tokens=N)
    assert finish(engine.stream(PROMPTS[1], max_tokens=N)) == plain[1]
    assert finish(unread) == plain[2]


# chat


def test_a_chat_reads_only_what_is_new(engine: Engine) -> None:
    said = "USER: What is a llama? ASSISTANT:"
    n_read = 0
    messages = [{"role": "user", "content": "What is a llama?"}]
    for question in ("And an alpaca?", "Why?", None):
        stream = engine.chat(messages, max_tokens=N)
        answer = finish(stream)
        completion = stream.completion
        # The same as the rendered text, read anew by plain decoding.
        prompt = engine.loaded.base_model.tokenize(said, parse_special=True).tolist()
        with engine.loaded.fixed_decoder() as decoder:
            expected = decoder.run(Request(prompt=prompt, max_tokens=N))
        assert answer == expected.take_output().text != ""
        assert completion.prompt_tokens == len(prompt)
        assert completion.cached_tokens >= n_read - 2, "what was read before is not read again"
        n_read = completion.prompt_tokens
        if question:
            messages.append({"role": "assistant", "content": answer})
            messages.append({"role": "user", "content": question})
            said += f" {answer}</s>USER: {question} ASSISTANT:"
    assert completion.cached_tokens > 40


def test_a_model_without_a_template_does_not_chat(bundled_f32: Path, plain: list[str]) -> None:
    messages = [{"role": "user", "content": "hi"}]
    for choice in ("auto", "none"):
        with open_engine(bundled_f32, chat_template=choice) as engine:
            assert engine.template is None
            with pytest.raises(UsageError, match=r"F32\.gguf has no chat template; name one"):
                engine.chat(messages)
            assert finish(engine.stream(PROMPTS[0], max_tokens=N)) == plain[0]


@pytest.mark.parametrize(
    "messages", [[], "hi", ["hi"], [{"role": "user"}], [{"role": "user", "content": None}]]
)
def test_messages_that_are_none(engine: Engine, messages: Any) -> None:
    with pytest.raises(DataError, match="messages: "):
        engine.chat(messages)


# what is refused


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        ("import os", {}, "prompts: needs a list of prompts"),
        ([[]], {}, "the prompt is empty"),
        ([PROMPTS[0], []], {}, "the prompt is empty"),
        ([[4, 4096]], {}, "token 4096: the vocabulary has 4096"),
        ([[-1]], {}, "token -1"),
        ([4, 5], {}, "prompt: needs a text or a list of token ids"),
        ([["a"]], {}, "prompt: needs a text or a list of token ids"),
        ([PROMPTS[0]], {"max_tokens": 0}, "max_tokens 0 is below 1"),
        ([PROMPTS[0]], {"max_tokens": -3}, "max_tokens -3 is below 1"),
        ([PROMPTS[0]], {"stop": "end"}, "stop: needs a list of strings"),
        ([PROMPTS[0]], {"stop": [""]}, "stop"),
        ([PROMPTS[0]], {"sampling": SamplingParams(logit_bias={5000: 1.0})}, "token 5000"),
    ],
)
def test_bad_values_are_named_in_one_line(
    engine: Engine, prompts: Any, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says) as error:
        engine.generate(prompts, **options)
    assert "\n" not in str(error.value)
    if not isinstance(prompts, str):
        with pytest.raises(UsageError, match=says):
            engine.stream(prompts[-1], **options)


def test_a_prompt_that_is_too_long(engine: Engine) -> None:
    with pytest.raises(ContextError, match="the context 256"):
        engine.generate([PROMPTS[0], [5] * 256])
    with pytest.raises(ContextError, match="the context 256"):
        engine.stream([5] * 256)


def test_an_engine_that_cannot_be_opened(bundled_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"nowhere\.gguf"):
        Engine(tmp_path / "nowhere.gguf")
    for n_parallel in (0, 257):
        with pytest.raises(UsageError, match=f"n_parallel {n_parallel} is outside"):
            Engine(bundled_gguf, n_parallel=n_parallel)
    with pytest.raises(UsageError, match="chatml: is none of auto, vicuna, none, and no file"):
        Engine(bundled_gguf, chat_template="chatml")
    without = open_engine(bundled_gguf, heads_path=tmp_path / "nowhere")
    with without, pytest.raises(HeadsError, match="nowhere"):
        without.generate(PROMPTS)


def test_what_pays_is_measured_once_and_fits_many_prompts_at_a_time(bundled_f32: Path) -> None:
    measured = list[str]()
    load = LoadOptions(n_threads=1, context_size=64, max_nodes=8)

    def note() -> None:
        measured.append("")

    for _ in range(2):
        with Engine(bundled_f32, load=load, n_parallel=64, on_measure=note) as engine:
            assert engine._decoder.policy.max_leaves <= 4
            completions = engine.generate(PROMPTS * 2, max_tokens=8)
            assert texts(completions[:5]) == texts(completions[5:])
    assert len(measured) == 1


def test_a_second_use_is_refused_and_the_first_goes_on(engine: Engine, plain: list[str]) -> None:
    uses: list[Callable[[], Any]] = [
        lambda: engine.generate(PROMPTS),
        lambda: engine.stream(PROMPTS[1]),
        lambda: engine.chat([{"role": "user", "content": "hi"}]),
    ]
    late = engine.stream(PROMPTS[0], max_tokens=N)
    stream = engine.stream(PROMPTS[2], max_tokens=N)
    text = ""
    uses.append(lambda: next(late))
    for use in uses:
        text += next(stream).text
        with pytest.raises(UsageError, match="this engine is generating already") as error:
            use()
        assert "\n" not in str(error.value)
    assert text + finish(stream) == plain[2]


def test_another_thread_is_refused_and_the_first_goes_on(
    engine: Engine, plain: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a step, and between two."""
    in_step = threading.Event()
    go_on = threading.Event()
    base: Any = engine._decoder.base
    decode = base.decode_placed

    def wait(n: int) -> None:
        in_step.set()
        assert go_on.wait(60)
        decode(n)

    monkeypatch.setattr(base, "decode_placed", wait)
    stream = engine.stream(PROMPTS[2], max_tokens=N)
    found = list[str]()
    thread = threading.Thread(target=lambda: found.append(finish(stream)))
    thread.start()
    assert in_step.wait(60)
    for use in (lambda: engine.generate(PROMPTS), lambda: engine.stream(PROMPTS[1])):
        with pytest.raises(UsageError, match="this engine is generating already"):
            use()
    for end in (lambda: next(stream), stream.close, engine.close):
        with pytest.raises(UsageError, match="another thread is waiting for this stream"):
            end()
    go_on.set()
    thread.join(60)
    assert found == [plain[2]]

    refused = list[UsageError]()

    def use_too() -> None:
        try:
            engine.generate(PROMPTS)
        except UsageError as error:
            refused.append(error)

    stream = engine.stream(PROMPTS[2], max_tokens=N)
    text = next(stream).text
    other = threading.Thread(target=use_too)
    other.start()
    other.join(60)
    assert len(refused) == 1 and text + finish(stream) == plain[2]


def test_generate_in_another_thread_is_not_closed_under_way(
    engine: Engine, plain: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_step = threading.Event()
    go_on = threading.Event()
    base: Any = engine._decoder.base
    decode = base.decode_placed

    def wait(n: int) -> None:
        in_step.set()
        assert go_on.wait(60)
        decode(n)

    monkeypatch.setattr(base, "decode_placed", wait)
    found = list[str]()
    thread = threading.Thread(
        target=lambda: found.extend(texts(engine.generate(PROMPTS[:2], max_tokens=N)))
    )
    thread.start()
    assert in_step.wait(60)
    with pytest.raises(UsageError, match="this engine is generating already"):
        engine.close()
    go_on.set()
    thread.join(60)
    assert found == plain[:2]


# the end


def test_a_closed_engine_says_so(bundled_f32: Path) -> None:
    with open_engine(bundled_f32, chat_template="vicuna") as engine:
        done = engine.stream(PROMPTS[0], max_tokens=4)
        text = finish(done)
        begun = engine.stream(PROMPTS[0], max_tokens=N)
        next(begun)  # the block is left with a stream that is not read to its end
    assert done.completion.text == text != ""
    uses: list[Callable[[], Any]] = [
        lambda: engine.generate(PROMPTS),
        lambda: engine.stream(PROMPTS[0]),
        lambda: engine.chat([{"role": "user", "content": "hi"}]),
        lambda: next(begun),
        lambda: engine.generate([]),
    ]
    for use in uses:
        with pytest.raises(UsageError, match="this engine is closed"):
            use()
    engine.close()
    with pytest.raises(StopIteration):
        next(done)

    unused = open_engine(bundled_f32)
    unused.close()
    with pytest.raises(UsageError, match="this engine is closed"):
        unused.prepare()


def test_an_error_inside_the_block_is_the_one_that_is_seen(bundled_f32: Path) -> None:
    def fail() -> None:
        with open_engine(bundled_f32) as engine:
            stream = engine.stream(PROMPTS[0], max_tokens=N)
            for _ in stream:
                raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()


def only_abort(decoder: Decoder) -> None:
    """In place of `Decoder.reset`: what is in the cache stays."""
    for slot in decoder.scheduler.kv_slots._slots:
        if slot.sequence is not None:
            decoder.scheduler.abort(slot.sequence)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("fault", [False, True])
def test_ctrl_c_within_a_step_leaves_no_trace(
    bundled_f32: Path, streamed: bool, fault: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: where nothing is removed the step's draft stays, and llama.cpp balks."""
    with open_engine(bundled_f32) as engine:
        [whole] = engine.generate([PROMPTS[2]], SAMPLED, max_tokens=N)
        engine._decoder.reset()
        base: Any = engine._decoder.base
        decode = base.decode_placed
        sizes = list[int]()

        def interrupt(n: int) -> None:
            decode(n)
            sizes.append(n)
            if len(sizes) == 6:
                raise KeyboardInterrupt

        def generate() -> None:
            if streamed:
                finish(engine.stream(PROMPTS[2], SAMPLED, max_tokens=N))
            else:
                engine.generate([PROMPTS[2]], SAMPLED, max_tokens=N)

        with monkeypatch.context() as patch:
            patch.setattr(base, "decode_placed", interrupt)
            if fault:
                patch.setattr(Decoder, "reset", only_abort)
                patch.setattr(KVSlots, "_remove", lambda *_: None)
                engine._decoder.scheduler.kv_slots.clear()
                patch.setattr(KVSlots, "_save", lambda *_: None)
            with pytest.raises(KeyboardInterrupt):
                generate()
        assert sizes[-1] > 2, "the step had a draft"

        # Go on where the interrupted sequence was, and beyond.
        prompt = engine.loaded.base_model.tokenize(PROMPTS[2]).tolist() + whole.tokens[:20]
        if fault:
            with pytest.raises(ContextError, match="could not decode"):
                engine.generate([prompt], max_tokens=N)
            return
        [rest] = engine.generate([prompt], max_tokens=N)
        with engine.loaded.fixed_decoder() as plain:
            expected = plain.run(Request(prompt=prompt, max_tokens=N))
        assert rest.tokens == expected.new_tokens
