"""Grammars that a sequence must keep to: llama.cpp's GBNF, and JSON schemas turned into it.

llama.cpp's C++ exceptions would end the process: it is asked only what it can answer, and nothing
that it does not allow is ever accepted. Knows no sampling.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import llama_cpp
import llama_cpp.llama_grammar as converter
import numpy as np
import numpy.typing as npt

from model.base.llama_model import LlamaModel
from model.errors import UsageError, one_line

Float32Array = npt.NDArray[np.float32]
# llama_token_data
_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
LONGEST = 100_000  # characters of a grammar
DEEPEST = 100  # parentheses within each other: llama.cpp recurses
# Characters of literals, times how often each is repeated: llama.cpp writes them all down.
MOST_COPIES = 2_000_000
LONGEST_SCHEMA = 32_768  # characters of a schema
MOST_OF_ANY = 2_000  # the largest length or count in a schema
_LIMITS = ("minLength", "maxLength", "minItems", "maxItems")  # keys of a schema
# A comment, a literal (to the end where nothing closes it) with its repetition, a parenthesis:
# found in one pass.
_PIECE = re.compile(
    r'#[^\n]*|(?P<literal>"(?:[^"\\]|\\.)*"?|\[(?:[^\]\\]|\\.)*\]?)'
    r"(?:\s{0,9}\{\s{0,9}(?P<least>\d{1,9})\s{0,9},?\s{0,9}(?P<most>\d{0,9})\s{0,9}\})?|[()]",
    re.DOTALL,
)
_REPETITION = re.compile(r"\{[^}]*?(\d+)\s*\}")  # in a schema's pattern
log = logging.getLogger(__name__)
ANY_OBJECT = {"type": "object"}


class GbnfGrammar:
    """The state of a grammar behind one sequence; a `Grammar` of `model/decoding/sampling.py`.

    Raises UsageError for bad GBNF.
    """

    def __init__(self, model: LlamaModel, gbnf: str) -> None:
        _check_gbnf(gbnf)
        self._eog = model.eog
        data = gbnf.encode(errors="replace")
        with _quiet():
            self._sampler: Any = llama_cpp.llama_sampler_init_grammar(model._vocab, data, b"root")
        if not self._sampler:
            raise UsageError(
                "the grammar is no GBNF with a rule named root; LOG_LEVEL=DEBUG shows llama.cpp's "
                "reasons"
            )
        self._ended = False

    def _apply(self, data: npt.NDArray[Any]) -> None:
        """Set the logits of tokens that must not come next to minus infinity."""
        array: Any = llama_cpp.llama_token_data_array()
        array.data = data.ctypes.data_as(llama_cpp.llama_cpp.llama_token_data_p)
        array.size = len(data)
        array.selected = -1
        array.sorted = False
        llama_cpp.llama_sampler_apply(self._sampler, ctypes.byref(array))

    def allows(self, token: int) -> bool:
        """Say whether a token may come next."""
        if self._ended:
            return token in self._eog
        data = np.array([(token, 0.0, 0.0)], _DATA)
        self._apply(data)
        return bool(np.isfinite(data["logit"][0]))

    def masked(self, logits: Float32Array) -> Float32Array:
        """Return a copy of logits (V,), minus infinity where a token must not come next.

        Where the vocabulary has nothing that the grammar allows, the sequence may only end.
        """
        if not self._ended:
            data = np.zeros(len(logits), _DATA)
            data["id"] = np.arange(len(logits))
            data["logit"] = logits
            self._apply(data)
            allowed: Float32Array = data["logit"].copy()
            if np.isfinite(allowed).any():
                return allowed
            self._ended = True
        end = list(self._eog)
        only_end = np.full(len(logits), -np.inf, np.float32)
        only_end[end] = logits[end]
        return only_end

    def take(self, token: int) -> None:
        """Go on behind a token, which must be allowed."""
        if token in self._eog:
            self._ended = True
        if not self._ended:
            llama_cpp.llama_sampler_accept(self._sampler, token)

    def __del__(self) -> None:
        if getattr(self, "_sampler", None):
            llama_cpp.llama_sampler_free(self._sampler)
            self._sampler = None


def _check_gbnf(gbnf: str) -> None:
    """Raise UsageError for what would stop llama.cpp, or the process."""
    if len(gbnf) > LONGEST:
        raise UsageError(f"the grammar has {len(gbnf)} characters; {LONGEST} at the most")
    depth, copies = _measure(gbnf)
    if depth > DEEPEST:
        raise UsageError(f"the grammar has more than {DEEPEST} parentheses within each other")
    if copies > MOST_COPIES:
        raise UsageError(
            f"the grammar's repetitions make {copies} characters; {MOST_COPIES} at the most"
        )
    if "\0" in gbnf:
        raise UsageError("the grammar holds a character of code 0")


def _measure(gbnf: str) -> tuple[int, int]:
    """Return how many parentheses are open at once at the most, and the characters of literals.

    The literals as llama.cpp writes them down, with their repetitions.
    """
    depth = 0
    deepest = 0
    copies = 0
    for piece in _PIECE.finditer(gbnf):
        if piece.group() == "(":
            depth += 1
        elif piece.group() == ")":
            depth -= 1
        deepest = max(deepest, depth)
        literal = piece["literal"]
        if literal:
            copies += len(literal) * int(piece["most"] or piece["least"] or 1)
    return deepest, copies


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep llama.cpp's words about a client's grammar off the terminal, unless LOG_LEVEL=DEBUG."""
    if log.isEnabledFor(logging.DEBUG):
        yield
        return
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def schema_to_gbnf(schema: dict[str, Any]) -> str:
    """Return the grammar of JSON that a schema describes, an empty one: of any object.

    Raises UsageError for a schema that is too large or cannot be turned into a grammar.
    """
    _check_counts(schema)
    try:
        return str(converter.json_schema_to_gbnf(json.dumps(schema or ANY_OBJECT)))
    except Exception as error:  # the converter raises whatever its dictionaries do
        reason = f"{type(error).__name__} {one_line(error)}"
        raise UsageError(f"this JSON schema cannot be turned into a grammar: {reason}") from error


def _check_counts(schema: dict[str, Any]) -> None:
    """Refuse what the converter would write out before anyone could look at its length."""
    if len(json.dumps(schema)) > LONGEST_SCHEMA:
        raise UsageError(f"the JSON schema has more than {LONGEST_SCHEMA} characters")
    waiting: list[Any] = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting += node
        if not isinstance(node, dict):
            continue
        for key in _LIMITS:
            limit = node.get(key)
            if isinstance(limit, int | float) and limit > MOST_OF_ANY:
                raise UsageError(f"the JSON schema's {key} is {limit}; {MOST_OF_ANY} at the most")
        pattern = node.get("pattern")
        if isinstance(pattern, str) and _copies(pattern) > MOST_OF_ANY:
            raise UsageError(f"the JSON schema's pattern repeats more than {MOST_OF_ANY} times")
        waiting += node.values()


def _copies(pattern: str) -> int:
    """Return how often the innermost part of a pattern is repeated, at the worst."""
    copies = 1
    for number in _REPETITION.findall(pattern):
        copies *= max(1, int(number[:9]))
    return copies
