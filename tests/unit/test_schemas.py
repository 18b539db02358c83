"""What requests may hold, and the sequences that they become."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from model.decoding.sampling import SamplingParams
from model.decoding.sequence import TokenOutput
from model.serving.http.errors import ApiError
from model.serving.http.fields import parse
from model.serving.http.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
)
from model.serving.worker.messages import (
    Event,
    Failed,
    Finished,
    ModelInfo,
    SequenceRequest,
    Started,
    TextChunk,
    merged,
)

INFO = ModelInfo(
    name="fake",
    file_type="F32",
    context=512,
    vocabulary=1000,
    draft="heads",
    slots=4,
    cells=2048,
    has_chat_template=True,
)
HELLO = [{"role": "user", "content": "hello"}]


def sequences(
    kind: type[GenerationRequest], body: Any, info: ModelInfo = INFO, most: int = 128
) -> list[SequenceRequest]:
    """Return what the choices of a request are to be."""
    running = parse(kind, json.dumps(body).encode()).running("id", info, most)
    assert [choice.index for choice in running.choices] == list(range(len(running.choices)))
    return [choice.request for choice in running.choices]


def complete(most: int = 128, **fields: Any) -> list[SequenceRequest]:
    return sequences(CompletionRequest, {"prompt": "a", **fields}, most=most)


def chat(**fields: Any) -> list[SequenceRequest]:
    return sequences(ChatRequest, {"messages": HELLO, **fields})


def refusal(kind: type[GenerationRequest], **fields: Any) -> ApiError:
    needed = {"prompt": "a"} if kind is CompletionRequest else {"messages": HELLO}
    with pytest.raises(ApiError) as error:
        sequences(kind, {**needed, **fields})
    assert error.value.status == 400 and "\n" not in error.value.message
    return error.value


def test_defaults_are_openais() -> None:
    sampling = SamplingParams(temperature=1.0, seed=None)
    assert complete() == [SequenceRequest(id="id-0", prompt="a", max_tokens=16, sampling=sampling)]
    messages = [{"role": "user", "content": "hello"}]
    assert chat() == [
        SequenceRequest(id="id-0", prompt=messages, max_tokens=None, sampling=sampling)
    ]


def test_every_field_reaches_the_sequence() -> None:
    sampling: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "seed": 7,
        "presence_penalty": 1, "frequency_penalty": -1.5, "repeat_penalty": 1.1,
    }  # fmt: skip
    (sequence,) = complete(
        **sampling,
        logit_bias={"5": -100, "999": 2.5},
        max_tokens=9,
        stop=["x", "yz"],
        logprobs=3,
        echo=True,
        grammar="root ::= [a-z]+",
        draft="ngram",
        typical_acceptance=True,
        cache_prompt=False,
        user="me",
        model="any",
        unknown=[1],
    )
    assert sequence == SequenceRequest(
        id="id-0",
        prompt="a",
        max_tokens=9,
        sampling=SamplingParams(**sampling, logit_bias={5: -100.0, 999: 2.5}),
        stop=("x", "yz"),
        draft="ngram",
        typical_acceptance=True,
        logprobs=3,
        echo=True,
        grammar="root ::= [a-z]+",
        use_prefix_cache=False,
    )


def test_draft_sources_and_their_alias() -> None:
    names = ("auto", "heads", "medusa", "ngram", "both", "none")
    drafts = [complete(draft=name)[0].draft for name in names]
    assert drafts == ["auto", "heads", "heads", "ngram", "both", "none"]


def test_no_value_within_the_bounds_is_refused_by_the_sampler() -> None:
    """The bounds lie within those of SamplingParams, which knows no client."""
    for fields in (
        {"temperature": 0, "top_p": 1e-9, "top_k": -1, "min_p": 0, "repeat_penalty": 0.01},
        {"temperature": 2, "top_p": 1, "top_k": 2**31 - 1, "min_p": 1, "repeat_penalty": 10},
        {"presence_penalty": -2, "frequency_penalty": 2, "logit_bias": {"0": 100, "1": -100}},
        {"seed": -(2**63), "n": 4},
    ):
        assert complete(**fields)


def test_a_prompt_that_cannot_fit_is_refused_before_anyone_tokenizes_it() -> None:
    info = replace(INFO, longest_token=8)
    for body, least in (
        ({"prompt": "x = 1\n" * 600_000, "n": 3}, 450_000), ({"prompt": [[1], [7] * 512]}, 512),
        ({"prompt": "é" * 2048}, 512),
    ):  # fmt: skip
        words = f"the prompt has at least {least} tokens, the context 512"
        with pytest.raises(ApiError, match=words) as error:
            sequences(CompletionRequest, body, info)
        assert error.value.status == 400
    long = {"messages": [{"role": "user", "content": "a" * 2048}] * 2}
    with pytest.raises(ApiError, match="has at least 512 tokens"):
        sequences(ChatRequest, long, info)
    for fits in ("é" * 2047, [7] * 511):
        assert len(sequences(CompletionRequest, {"prompt": fits}, info)) == 1


def test_null_is_absent_and_other_types_are_not_bent() -> None:
    nothing: dict[str, Any] = dict.fromkeys(
        name for name in CompletionRequest.model_fields if name != "prompt"
    )
    assert complete(**nothing) == complete()
    assert complete(temperature=1) == complete(temperature=1.0)
    for name, value in {
        "temperature": "1",
        "max_tokens": 1.5,
        "stream": 1,
        "n": True,
        "top_p": True,
    }.items():
        assert refusal(CompletionRequest, **{name: value}).param == name


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("", [""]), ("ab", ["ab"]), (["ab", "c"], ["ab", "c"]), ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)  # fmt: skip
def test_four_forms_of_prompts(prompt: Any, prompts: list[Any]) -> None:
    assert [sequence.prompt for sequence in complete(prompt=prompt)] == prompts


@pytest.mark.parametrize(
    "prompt", [[], [[]], [[1], []], ["a", 1], [1, "a"], [True], [-1], [1.0], 5, {"a": 1}, [[["a"]]]]
)
def test_other_prompts_are_refused(prompt: Any) -> None:
    assert refusal(CompletionRequest, prompt=prompt).message.startswith(
        f"prompt={prompt!r}: must be"
    )


def test_choices_have_seeds_apart_and_prompts_share_them() -> None:
    several = complete(prompt=["a", "b"], n=3, seed=2**63 - 2)
    assert [(s.prompt, s.sampling.seed) for s in several] == [
        (p, s) for p in "ab" for s in (2**63 - 2, 2**63 - 1, 0)
    ]  # fmt: skip
    assert [s.id for s in several] == [f"id-{i}" for i in range(6)]
    assert {s.sampling.seed for s in complete(n=3)} == {None}
    assert complete(seed=-1)[0].sampling.seed == 2**63 - 1


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("temperature", -0.1), ("temperature", 2.1), ("top_p", 0), ("top_p", 1.01), ("top_k", -2),
        ("min_p", -1),
        ("min_p", 2), ("seed", 2**63), ("seed", -(2**63) - 1), ("seed", 1.0), ("n", 0), ("n", 129),
        ("max_tokens", -1),
        ("max_tokens", 2**31), ("max_completion_tokens", -1), ("presence_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("frequency_penalty", 3), ("repeat_penalty", 0.005), ("repeat_penalty", 11),
        ("logprobs", 21), ("logprobs", -1),
        ("stop", ""), ("stop", ["a"] * 17), ("stop", [1]), ("stop", "a" * 257),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"1": 101}), ("logit_bias", {"1": "a"}), ("logit_bias", [1]),
        ("logit_bias", {"²": 1}),
        ("draft", "fast"), ("user", 5), ("grammar", ""), ("grammar", {}), ("echo", "yes"),
        ("stream", "true"),
        ("suffix", "end"), ("response_format", "json"), ("best_of", 0), ("typical_acceptance", 1),
    ],
)  # fmt: skip
def test_every_bound_is_checked(name: str, bad: Any) -> None:
    error = refusal(CompletionRequest, **{name: bad})
    assert error.param == name
    assert error.message.startswith(f"{name}=") and ascii(bad)[:80] in error.message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options is allowed only"),
        ({"grammar": "x", "response_format": {"type": "json_object"}}, "exclude each other"),
        ({"best_of": 3, "n": 2}, "best_of=3"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"prompt": [1, 1000]}, "no token 1000; the vocabulary has 1000"),
        ({"logit_bias": {"1000": 1}}, "no token 1000"),
        ({"prompt": ["a"] * 65, "n": 2}, "65 prompts × n=2 are more than 128 sequences"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema is missing"),
        ({"response_format": {"type": "yaml"}}, "response_format.type='yaml'"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}},
            "json_schema.schema=1",
        ),
    ],
)
def test_fields_that_disagree_are_refused(fields: dict[str, Any], words: str) -> None:
    assert words in refusal(CompletionRequest, **fields).message


def test_max_tokens_zero_is_for_echo() -> None:
    assert complete(max_tokens=0, echo=True, logprobs=0)[0].max_tokens == 0
    assert refusal(ChatRequest, max_tokens=0).param == "max_tokens"
    assert chat(max_tokens=3, max_completion_tokens=5)[0].max_tokens == 5


def test_messages_become_what_templates_take() -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "name": "x",
        },
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "9"},
    ]
    assert chat(messages=messages)[0].prompt == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": "9"},
    ]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"), ("hello", "messages"), (["hello"], "messages.0"),
        ([{"content": "a"}], "messages.0.role"),
        ([*HELLO, {"role": "king", "content": "a"}], "messages.1.role"),
        ([{"role": "user"}], "messages.0"),
        ([{"role": "user", "content": 5}], "messages.0.content"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages.0.content",
        ),
    ],
)  # fmt: skip
def test_bad_messages_are_named(messages: Any, param: str) -> None:
    assert refusal(ChatRequest, messages=messages).param == param


@pytest.mark.parametrize("name", ["chat_template", "chat_template_kwargs", "tools", "functions"])
def test_templates_and_tools_of_clients_are_refused(name: str) -> None:
    assert (
        refusal(ChatRequest, **{name: ["{{ x }}"]}).message
        == f"{name}=['{{{{ x }}}}']: is not supported"
    )
    assert chat(**{name: []}) == chat()


def test_logprobs_in_both_forms() -> None:
    assert [complete(logprobs=k)[0].logprobs for k in (None, 0, 5)] == [None, 0, 5]
    assert [chat(logprobs=True, top_logprobs=k)[0].logprobs for k in (None, 0, 20)] == [0, 0, 20]
    assert chat(logprobs=False)[0].logprobs is None
    assert "top_logprobs=2 needs" in refusal(ChatRequest, top_logprobs=2).message


def test_response_formats_become_schemas() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert chat(response_format={"type": "text"})[0].json_schema is None
    assert chat(response_format={"type": "json_object"})[0].json_schema == {}
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    assert chat(response_format=form)[0].json_schema == schema


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b"5",
        b"null",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": NaN}',
        b"[" * 10_000,
        b'{"prompt": "a", "n": ' + b"9" * 5_000 + b"}",
        b'{"prompt": "a", "a": ' + b"[" * 300 + b"]" * 300 + b"}",
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as error:
        parse(CompletionRequest, body)
    assert (
        error.value.status == 400
        and "body" in error.value.message
        and error.value.message.isascii()
    )


def test_a_request_for_more_than_the_server_holds_is_refused() -> None:
    assert len(complete(n=6, most=6)) == 6
    with pytest.raises(ApiError, match="n=7 are more than 6 sequences at once"):
        complete(n=7, most=6)


def test_long_values_are_cut() -> None:
    assert len(refusal(CompletionRequest, prompt=["a" * 5000, 1]).message) < 400
    with pytest.raises(ApiError, match=r"^tokens\.1=-1: "):
        parse(DetokenizeRequest, b'{"tokens": [1, -1]}')


def test_chunks_are_joined_and_nothing_else_moves() -> None:
    a = TokenOutput(1, "x", False)
    b = TokenOutput(2, "y", True)
    done = Finished(
        id="p",
        reason="stop",
        prompt_tokens=1,
        new_tokens=2,
        prompt_s=0.0,
        predicted_s=0.0,
        steps=1,
        drafted=1,
        accepted=1,
    )
    events: list[Event] = [
        Started("p", 1),
        TextChunk("p", "x", (a,)),
        Started("q", 1),
        TextChunk("q", "z"),
        TextChunk("p", "y", (b,)),
        done,
    ]
    joined: list[Event] = [
        Started("p", 1),
        TextChunk("p", "xy", (a, b)),
        Started("q", 1),
        TextChunk("q", "z"),
        done,
    ]
    failed = Failed("q", "internal", "")
    assert merged([*events, failed]) == [*joined, failed]
    apart: list[Event] = [TextChunk("p", "x"), done, TextChunk("p", "y")]
    assert merged(apart) == apart
    assert merged([]) == []
