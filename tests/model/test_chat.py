"""The terminal chat, with the bundled model: what is said, what is read again, what came free, how it ends."""

from __future__ import annotations

import itertools
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import commands.chat as module
from commands.chat import Talk
from config import HEADS_FOLDER
from main import cli
from model.base.chat import chosen_template
from model.decoding.generation import Request
from model.decoding.planning import FixedPlan
from model.decoding.sampling import SamplingParams
from model.engine import Decoder, Engine, EngineOptions
from model.errors import ContextError
from model.serving.jobs import Piece

TURNS = ["def read(path):\n", "    return ", "class Stack:\n"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>"


@pytest.fixture(scope="module")
def engine(bundled_f32: Path) -> Iterator[Engine]:
    engine = Engine(bundled_f32, EngineOptions(1, 256, max_nodes=16), None, HEADS_FOLDER)
    yield engine
    engine.model.close()


@pytest.fixture
def decoder(engine: Engine) -> Iterator[Decoder]:
    with engine.decoder_for(FixedPlan(branch=7), None, ngrams=True) as decoder:
        yield decoder


def call(words: list[str], said: str) -> Result:
    return CliRunner().invoke(cli, ["chat", "--draft", "none", *words], input=said, env={"MODEL_CONTEXT_SIZE": "128"})


@pytest.mark.parametrize("template", ["", TEMPLATE + "{% endif %}"])
def test_every_answer_is_that_of_the_whole_conversation(
    engine: Engine, decoder: Decoder, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an F32 file, where cells that were kept cannot differ from those that are read again."""
    facts = {k: v for k, v in engine.file.metadata.items() if k != "tokenizer.chat_template"}
    monkeypatch.setattr(engine.file, "metadata", facts | ({"tokenizer.chat_template": template} if template else {}))
    chosen = chosen_template(engine.file.metadata, "auto")
    talk, so_far = Talk(engine, decoder, SamplingParams(), 16, "be brief\n" if template else "", chosen), ""
    if template:
        so_far = "<system>be brief\n\n"
    for line in TURNS:
        so_far += f"<user>{line}\n<assistant>" if template else line
        text = "".join(piece.text for piece in talk.answer(line))
        with engine.decoder() as plain:
            prompt = engine.model.tokenize(so_far, parse_special=bool(template)).tolist()
            assert text == plain.start(Request(prompt, 16)).run() != ""
        so_far += text + "\n" * bool(template)
        assert talk.writing is not None
        reused, prompt_length = talk.writing.slot.reused, talk.writing.slot.prompt_length
        assert prompt_length - reused < 24 or line == TURNS[0], "what was said is not read again"
    assert reused > 30


@pytest.mark.parametrize(
    ("choice", "own", "text"),
    [
        ("auto", "{{ messages[0].content }}!", "hi!"),
        ("auto", None, None),
        ("vicuna", "{{ messages[0].content }}!", "USER: hi ASSISTANT:"),
        ("vicuna", None, "USER: hi ASSISTANT:"),
        ("none", "{{ messages[0].content }}!", None),
    ],
)
def test_whose_form_a_conversation_takes(choice: str, own: str | None, text: str | None) -> None:
    metadata = {"tokenizer.ggml.tokens": [], **({"tokenizer.chat_template": own} if own else {})}
    template = chosen_template(metadata, choice)
    assert (template and template.render([{"role": "user", "content": "hi"}], prompt=True)) == text


def test_a_conversation_that_no_longer_fits_goes_on_with_less(engine: Engine, decoder: Decoder) -> None:
    talk = Talk(engine, decoder, SamplingParams(), 8, "", None)
    before = "".join(p.text for p in talk.answer("x = 1\n"))
    with pytest.raises(ContextError, match="the context 256"):
        list(talk.answer("y = 2\n" * 200))
    assert before and "".join(p.text for p in talk.answer("z = 3\n"))


def test_an_answer_that_is_stopped_leaves_the_cache_in_order(engine: Engine, decoder: Decoder) -> None:
    talk = Talk(engine, decoder, SamplingParams(), 40, "", None)
    pieces = talk.answer(TURNS[0])
    begun = "".join(piece.text for piece in itertools.islice(pieces, 5))
    pieces.close()
    text = "".join(piece.text for piece in talk.answer(TURNS[1]))
    with engine.decoder() as plain:
        prompt = engine.model.tokenize(TURNS[0] + begun + TURNS[1]).tolist()
        assert text == plain.start(Request(prompt, 40)).run()


def test_ctrl_c_ends_the_answer_and_not_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    show, shown = module.show, list[str]()

    def press(piece: Piece) -> None:
        show(piece)
        shown.append(piece.text)
        if len(shown) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module, "show", press)
    done = call(["--max_tokens", "9"], "import os\nimport sys\n")
    assert done.exit_code == 0 and len(shown) > 4, done.output


def test_as_a_user_types_it() -> None:
    done = call(["--max_tokens", "8", "--profile"], "def f(x):\\\n    return\n\nx = \n")
    assert done.exit_code == 0, done.output
    assert done.stderr.count("8 tokens, ") == 2 and done.stderr.count("decode") == 2
    assert re.search(r"decode +\d+ us a step +\d+\.\d%", done.stderr) and "\x1b" not in done.stdout
    refused = call([], "x = 1\n" * 1 + "y = 2 \\\n" * 300 + "\nz = 3\n")
    assert refused.exit_code == 0 and "the context 128" in refused.stderr


def test_what_came_free_is_green(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["chat", "--draft", "ngram", "--tree", "1", "--max_tokens", "40"]
    done = CliRunner().invoke(cli, words, input="x = 1\nx = 1\nx = 1\nx\n", color=True)
    assert done.exit_code == 0 and "\x1b[32m" in done.stdout, done.output
    plain = CliRunner().invoke(cli, [*words, "--draft", "none"], input="x = 1\nx = 1\nx = 1\nx\n", color=True)
    assert "\x1b" not in plain.stdout
