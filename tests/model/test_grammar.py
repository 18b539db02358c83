"""Grammars of clients: what llama.cpp would choke on is refused before it sees it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model.base.grammar import GbnfGrammar, schema_to_gbnf
from model.base.llama_model import LlamaModel
from model.errors import UsageError


@pytest.fixture(scope="module")
def model(bundled_gguf: Path) -> Iterator[LlamaModel]:
    model = LlamaModel(bundled_gguf)
    yield model
    model.close()


@pytest.mark.parametrize(
    ("gbnf", "why"),
    [
        ("root ::= " + "(" * 101 + '"x"' + ")" * 101, "parentheses"),
        (
            '# "\nroot ::= ' + "(" * 40_000 + '"x"',
            "parentheses",
        ),  # the comment's quote opens no literal
        ("# [\nroot ::= " + "(" * 40_000 + '"x"', "parentheses"),
        ('root ::= "' + "a" * 50_000 + '"{2000}', "repetitions"),
        ("root ::= " + '"aaaaaaaaaa"{1,2000} ' * 200, "repetitions"),
        ("[" * 99_000, "no GBNF"),
        ('"' * 99_001, "no GBNF"),
        ("root ::= [a-z", "no GBNF"),
        ("a" * 100_001, "characters"),
        ('root ::= "a\0"', "code 0"),
    ],
)
def test_what_would_stop_the_model_is_refused_at_once(
    model: LlamaModel, gbnf: str, why: str
) -> None:
    since = time.perf_counter()
    with pytest.raises(UsageError, match=why):
        GbnfGrammar(model, gbnf)
    # A scanner that begins anew at each bracket takes minutes.
    assert time.perf_counter() - since < 5


@pytest.mark.parametrize(
    "gbnf",
    [
        "root ::= " + "(" * 99 + '"x"' + ")" * 99,
        'root ::= "' + "(" * 500 + '" [(((] # ' + "(" * 500,
        'root ::= "a\\"("{3} [^"]{0,2000}',
    ],
)
def test_what_it_can_take_is_let_through(model: LlamaModel, gbnf: str) -> None:
    GbnfGrammar(model, gbnf)


def test_a_clients_grammar_does_not_reach_the_terminal(
    model: LlamaModel, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError):
        GbnfGrammar(model, "root ::= \x1b[2Jhello")
    os.write(2, b"still there")
    assert capfd.readouterr().err == "still there"


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "string", "maxLength": 300_000_000}, "maxLength is 300000000"),
        ({"anyOf": [{"type": "array", "items": {}, "minItems": 9_999}]}, "minItems is 9999"),
        ({"type": "string", "pattern": "^a{1000000000}$"}, "pattern"),
        ({"type": "string", "pattern": "^((a{100}){1,100}){3}$"}, "pattern"),
        ({"type": "object", "properties": {f"{'-' * i}": {} for i in range(400)}}, "characters"),
    ],
)
def test_a_schema_that_would_fill_the_memory_is_refused(schema: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        schema_to_gbnf(schema)


def test_usual_schemas_pass() -> None:
    text = {"type": "string", "pattern": "^[a-z]{2,40}$", "maxLength": 200}
    assert "root ::=" in schema_to_gbnf(
        {"type": "object", "properties": {"a": text, "minLength": {"type": "integer"}}}
    )
