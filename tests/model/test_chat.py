"""The terminal chat, with the bundled model: what is said, what is read again, how it ends."""

from __future__ import annotations

import itertools
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import commands.chat as module
from commands.chat import Conversation
from main import cli
from model.base.chat import chosen_template
from model.decoding.request import Request
from model.decoding.sampling import SamplingParams
from model.decoding.sequence import Output
from model.engine import Completion, DraftOptions, Engine, LoadOptions
from model.errors import ContextError
from model.loaded_model import LoadedModel

TURNS = ["def read(path):\n", "    return ", "class Stack:\n"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
GREEDY = SamplingParams()


@pytest.fixture
def engine(bundled_f32: Path) -> Iterator[Engine]:
    """An engine that drafts up to 7 tokens of n-grams in every step."""
    load = LoadOptions(n_threads=1, context_size=256, max_nodes=8)
    draft = DraftOptions(sources="ngram", fixed=True)
    with Engine(bundled_f32, load=load, draft=draft) as engine:
        yield engine


def call(words: list[str], said: str) -> Result:
    command = ["chat", "--draft", "none", *words]
    env = {"MODEL_CONTEXT_SIZE": "128", "N_THREADS": "1"}
    return CliRunner().invoke(cli, command, input=said, env=env)


def answer(conversation: Conversation, line: str) -> Completion:
    """Say a line; return the whole answer."""
    with conversation.answer(line) as stream:
        for _ in stream:
            pass
    return stream.completion


def plain_text(loaded: LoadedModel, text: str, n: int, *, parse_special: bool = False) -> str:
    """Return what plain decoding generates behind a text."""
    prompt = loaded.base_model.tokenize(text, parse_special=parse_special).tolist()
    with loaded.fixed_decoder() as plain:
        return plain.run(Request(prompt=prompt, max_tokens=n)).take_output().text


@pytest.mark.parametrize("template", ["", TEMPLATE])
def test_every_answer_is_that_of_the_whole_conversation(engine: Engine, template: str) -> None:
    """On an F32 file, where cells that were kept cannot differ from those that are read again."""
    own = {"tokenizer.chat_template": template} if template else {}
    metadata = {**engine.loaded.file.metadata, "tokenizer.chat_template": "", **own}
    engine.template = chosen_template(metadata, "auto")
    conversation = Conversation(engine, GREEDY, 16, "be brief\n" if template else "")
    so_far = "<system>be brief\n\n" if template else ""
    for line in TURNS:
        so_far += f"<user>{line}\n<assistant>" if template else line
        completion = answer(conversation, line)
        expected = plain_text(engine.loaded, so_far, 16, parse_special=bool(template))
        assert completion.text == expected != ""
        so_far += completion.text
        so_far += "\n" if template else ""
        n_read = completion.prompt_tokens - completion.cached_tokens
        assert n_read < 24 or line == TURNS[0], "what was said is not read again"
    assert completion.cached_tokens > 30


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
    rendered = template and template.render([{"role": "user", "content": "hi"}], prompt=True)
    assert rendered == text


def test_a_conversation_that_no_longer_fits_goes_on_with_less(engine: Engine) -> None:
    conversation = Conversation(engine, GREEDY, 8, "")
    before = answer(conversation, "x = 1\n").text
    with pytest.raises(ContextError, match="the context 256"):
        answer(conversation, "y = 2\n" * 200)
    assert before
    after = answer(conversation, "z = 3\n").text
    assert after == plain_text(engine.loaded, "x = 1\n" + before + "z = 3\n", 8) != ""


def test_an_answer_that_is_stopped_leaves_the_cache_in_order(engine: Engine) -> None:
    conversation = Conversation(engine, GREEDY, 40, "")
    with conversation.answer(TURNS[0]) as stream:
        begun = "".join(output.text for output in itertools.islice(stream, 5))
    assert begun == stream.completion.text and len(stream.completion.tokens) < 40
    text = answer(conversation, TURNS[1]).text
    assert text == plain_text(engine.loaded, TURNS[0] + begun + TURNS[1], 40)


def test_ctrl_c_ends_the_answer_and_not_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    show = module.show
    shown = list[str]()

    def press(output: Output) -> None:
        show(output)
        shown.append(output.text)
        if len(shown) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module, "show", press)
    done = call(["--max_tokens", "9"], "import os\nimport sys\n")
    assert done.exit_code == 0 and 4 < len(shown) < 18, done.output


def test_as_a_user_types_it() -> None:
    done = call(["--max_tokens", "8", "--profile"], "def f(x):\\\n    return\n\nx = \n")
    assert done.exit_code == 0, done.output
    assert done.stderr.count("8 tokens, ") == 2 and done.stderr.count("decode") == 2
    assert re.search(r"decode +\d+ us a step +\d+\.\d%", done.stderr)
    assert "\x1b" not in done.stdout
    refused = call([], "x = 1\n" * 1 + "y = 2 \\\n" * 300 + "\nz = 3\n")
    assert refused.exit_code == 0 and "the context 128" in refused.stderr


def test_accepted_draft_tokens_are_green() -> None:
    words = ["chat", "--draft", "ngram", "--tree", "1", "--max_tokens", "40"]
    said = "x = 1\nx = 1\nx = 1\nx\n"
    done = CliRunner().invoke(cli, words, input=said, color=True)
    assert done.exit_code == 0 and "\x1b[32m" in done.stdout, done.output
    plain = CliRunner().invoke(cli, [*words, "--draft", "none"], input=said, color=True)
    assert plain.exit_code == 0 and "\x1b" not in plain.stdout
