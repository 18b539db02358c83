"""Data sets in, samples out: formats, masks, windows, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.base.chat import ChatTemplate
from model.base.llama_model import LlamaModel
from model.errors import DataError
from model.training.data.documents import ROLES, Document, read_documents
from model.training.data.prompts import make_prompts
from model.training.data.records import read_records
from model.training.data.samples import Sample, digest, make_samples, split_samples, token_counts
from model.training.data.standard_library import held_out, standard_library

CHAT = [
    {"from": "human", "value": "What is 2 + 2?"},
    {"from": "gpt", "value": "It is four."},
    {"from": "human", "value": "And 3 + 3?"},
    {"from": "gpt", "value": "That is six."},
]
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Bytes:
    """A tokenizer of bytes, 1 to begin with; optionally with a space before each text."""

    bos = 1

    def __init__(self, space: bool = False) -> None:
        self.space = space

    def tokenize(
        self, text: str, *, add_bos: bool = True, parse_special: bool = False
    ) -> np.ndarray:
        data = ((b" " if self.space and text else b"") + text.encode()).replace(
            b"</s>", b"\x02" if parse_special else b"</s>"
        )
        return np.array([*([self.bos] if add_bos else []), *data], np.int32)

    def piece(self, token: int) -> bytes:
        return b"" if token < 3 else bytes([token])


def learnt(samples: list[Sample]) -> list[str]:
    """The text of each run of targets."""
    runs = []
    for sample in samples:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.mask.astype(int), [0]])))
        runs += [bytes(sample.tokens[a:b].tolist()).decode() for a, b in edges.reshape(-1, 2)]
    return runs


@pytest.mark.parametrize(
    "form", ["txt", "jsonl", "json", "sharegpt.json", "messages.jsonl", "parquet", "folder"]
)
def test_formats(tmp_path: Path, form: str) -> None:
    texts = ["first text", "second text"]
    path = tmp_path / f"data.{form}"
    records = [{"text": text} for text in texts]
    chats = [{"conversations": CHAT}, {"conversations": CHAT}]
    if form == "folder":
        path.mkdir()
        (path / "a.md").write_text(texts[0])
        (path / "b.jsonl").write_text(json.dumps(records[1]))
        (path / "c.bin").write_bytes(b"\xff\xfe\x00")
    elif form == "txt":
        path.write_text(texts[0])
    elif form == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif form.startswith("sharegpt"):
        path.write_text(json.dumps(chats))
    elif form.startswith("messages"):
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
        path.write_text("\n".join(json.dumps({"messages": turns}) for _ in range(2)))
    else:
        path.write_text(
            json.dumps(records) if form == "json" else "\n".join(json.dumps(r) for r in records)
        )
    found = list(read_documents(str(path)))
    if form.startswith(("sharegpt", "messages")):
        assert [len(d.messages) for d in found] == (
            [4, 4] if form.startswith("sharegpt") else [2, 2]
        )
        assert found[0].messages[1]["role"] == "assistant"
    else:
        assert [d.text for d in found] == texts[: len(found)]
        assert len(found) == (1 if form == "txt" else 2)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.csv", "a,b", "unknown format '.csv'"),
        ("x.jsonl", "{not json", "x.jsonl:1: not JSON"),
        ("x.json", "{not json", "x.json: not JSON"),
        ("x.jsonl", '{"foo": 1}', "found: foo"),
        ("x.json", '[{"conversations": [{"from": "tool", "value": "x"}]}]', "role 'tool'"),
        ("x.parquet", "no parquet", "not a readable Parquet file"),
        (None, "", "no such file"),
    ],
)
def test_bad_data_sets_are_named_in_one_line(
    tmp_path: Path, name: str | None, content: str, says: str
) -> None:
    path = tmp_path / (name or "absent.txt")
    if name:
        path.write_text(content)
    with pytest.raises(DataError, match=says) as caught:
        make_samples(read_documents(str(path)), Bytes(), ChatTemplate(None), 64)
    assert str(path.name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_torn_line_costs_one_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        '{"text": "the first text"}',
        '{"text": "torn of',
        "[" * 100_000,
        '{"text": "the last text"}',
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    assert (
        len(
            make_samples(read_documents(str(tmp_path / "x.jsonl")), Bytes(), ChatTemplate(None), 64)
        )
        == 2
    )
    told = capsys.readouterr().err
    assert "records skipped: 2; the first, x.jsonl:2: not JSON" in told
    _, problems = make_prompts(read_records(str(tmp_path / "x.jsonl")), chat=False, lengths=(4, 64))
    assert [p.split(":")[1] for p in problems] == ["2", "3"], "distilling goes on too"


STRICT = (  # as Llama's and Mistral's: turns must alternate, the user's first
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('order') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_unusable_records_are_skipped_and_counted_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def turn(who: Any, value: Any) -> dict[str, Any]:
        return {"from": who, "value": value}

    good = [turn("human", "Question?"), turn("gpt", "Answer.")]
    chats: list[list[Any]] = [
        [turn("gpt", "Said before anyone asked."), *good],
        [turn("tool", "x"), *good],
        [turn("chatgpt", "x"), *good],
        [turn(["human"], "x"), *good],
        [turn("human", None), *good],
        [None],
        [],
        [turn("gpt", "alone")],
        [good[0], *good],
        [turn("system", "not in this template"), *good],
        good,
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text(
        "\n".join(json.dumps({"conversations": chat}) for chat in chats) + '\n{"text": null}'
    )
    samples = make_samples(read_documents(str(path)), Bytes(), ChatTemplate(STRICT), 512)
    assert [s.name for s in samples] == ["chats.jsonl:1+0", "chats.jsonl:11+0"]
    assert learnt(samples) == ["Answer."] * 2
    told = capsys.readouterr().err.strip()
    assert (
        told
        == "records skipped: 10; the first, chats.jsonl:2: a turn has role 'tool'; known: "
        + ", ".join(ROLES)
    )
    path.write_text(json.dumps({"conversations": [*good, *good[1:]]}))
    with pytest.raises(
        DataError, match=r"records skipped: 1; the first, chats\.jsonl:1: .* refuses .*: order"
    ):
        make_samples(read_documents(str(path)), Bytes(), ChatTemplate(STRICT), 512)


def test_empty_data_set_is_refused() -> None:
    for documents in ([], [Document(name="a", text="")], [Document(name="b", text="x")]):
        with pytest.raises(DataError, match="empty"):
            make_samples(documents, Bytes(), ChatTemplate(None), 64)


@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize("space", [False, True])
def test_prompts_are_masked(template: str | None, space: bool) -> None:
    """Only answers, with the mark that ends them, are targets; prompts are not learnt."""
    messages = tuple(
        {"role": {"human": "user", "gpt": "assistant"}[t["from"]], "content": t["value"]}
        for t in CHAT
    )
    samples = make_samples(
        [Document(name="chat", messages=messages)],
        Bytes(space),
        ChatTemplate(template, eos="</s>"),
        512,
    )
    lead = " " if template is None or space else ""
    assert learnt(samples) == [f"{lead}It is four.\x02", f"{lead}That is six.\x02"]
    whole = bytes(samples[0].tokens[1:].tolist()).decode()
    assert "What is 2 + 2?" in whole and whole.count("  ") == 0


def test_a_template_that_rewrites_the_past_ends_the_sample() -> None:
    forgetful = (
        "{% for m in messages %}"
        "{{ m.content if loop.last or m.role == 'user' else '-' }}|"
        "{% endfor %}"
    )
    turns = [
        {"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, "QAqa", strict=True)
    ]
    parts = ChatTemplate(forgetful).segments(turns)
    assert [(p.text, p.answer) for p in parts] == [("Q|", False), ("A|", True)]


def test_a_template_cannot_reach_out() -> None:
    with pytest.raises(DataError, match="refuses"):
        ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}").render([], prompt=False)


def test_texts_do_not_depend_on_the_day() -> None:
    """Llama 3's way to a date; a clock would give other training text and states each day."""
    source = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}"
    assert ChatTemplate(source).render([], prompt=False) == "26 Jul 2024"


@pytest.mark.parametrize(
    "source",
    ["{{ 1 // 0 }}", "{{ 9.0 ** 9999 }}", "{{ 'x'.encode('none') }}", "{{ messages.x.y }}"],
)
def test_whatever_a_template_raises_is_one_line(source: str) -> None:
    with pytest.raises(DataError, match="refuses a conversation") as caught:
        ChatTemplate(source).render([], prompt=False)
    assert "\n" not in str(caught.value)


def test_windows_begin_with_bos_and_lose_nothing() -> None:
    text = "".join(chr(97 + i % 26) for i in range(1000))
    samples = make_samples([Document(name="a", text=text)], Bytes(), ChatTemplate(None), 64)
    assert all(len(s.tokens) <= 64 and s.tokens[0] == 1 and not s.mask[0] for s in samples)
    assert "".join(bytes(s.tokens[1:].tolist()).decode() for s in samples) == text
    limited = make_samples(
        [Document(name="a", text=text)], Bytes(), ChatTemplate(None), 64, max_tokens=200
    )
    assert 197 <= sum(len(s.tokens) for s in limited) <= 200
    assert token_counts(samples, 256)[97] == text.count("a")


def test_split_is_by_document_and_repeatable() -> None:
    documents = [Document(name=str(i), text="x" * 100) for i in range(20)]
    samples = make_samples(documents, Bytes(), ChatTemplate(None), 32)
    train, validation = split_samples(samples, 0.1, seed=3)
    of = [s.document for s in samples]
    assert sorted(train + validation) == list(range(len(samples)))
    assert len({of[i] for i in validation}) == 2
    assert not {of[i] for i in validation} & {of[i] for i in train}
    assert split_samples(samples, 0.1, seed=3) == (train, validation)
    assert split_samples(samples, 0.1, seed=4) != (train, validation)
    few, _ = split_samples([s for s in samples if s.document < 15], 0.1, seed=3)
    assert few == [i for i in train if of[i] < 15], "more documents change nothing for the others"
    for share in (0.0, 1.0):
        assert all(split_samples(samples, share, seed=0))
    with pytest.raises(DataError, match="one sample only"):
        split_samples(samples[:1], 0.1, seed=0)


def test_digest_sees_tokens_masks_and_borders() -> None:
    one, other = (
        make_samples([Document(name="a", text=t)], Bytes(), ChatTemplate(None), 8)
        for t in ("abcdefg", "abcdefh")
    )
    cut = make_samples([Document(name="a", text="abcdefg")], Bytes(), ChatTemplate(None), 6)
    assert len({digest(one), digest(other), digest(cut)}) == 3


def test_demo_text_leaves_held_out_files_alone() -> None:
    root = Path(__file__).resolve().parents[2]
    names = [name for name, _ in standard_library()]
    assert len(names) > 500
    assert not any(held_out(name) for name in names)
    for facts in (root / "models").glob("*facts.json"):
        listed = json.loads(facts.read_text())["held_out_files"]
        assert listed and not set(listed) & set(names)
        assert all(held_out(name) for name in listed)


def test_the_real_tokenizer(foreign_gguf: Path) -> None:
    model = LlamaModel(foreign_gguf)
    text = "def f(x):\n    return [x, 'é', 1]\n"
    (sample,) = make_samples([Document(name="a", text=text)], model, ChatTemplate(None), 256)
    assert sample.tokens[0] == model.bos
    assert model.detokenize(sample.tokens[1:]) == text
    half = make_samples(
        [Document(name="a", text="half a pair: \ud83d!")], model, ChatTemplate(None), 256
    )
    assert model.detokenize(half[0].tokens[1:]) == "half a pair: ?!"
    model.close()
