"""Grammars that a text must keep to: llama.cpp's GBNF, and JSON schemas turned into it. Knows no sampling.

llama.cpp's C++ exceptions would end the process: it is asked only what it can answer, and nothing that it does not
allow is ever accepted.
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
from model.errors import UsageError

Float32Array = npt.NDArray[np.float32]
_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data
LONGEST, DEEPEST = 100_000, 100  # characters of a grammar, and parentheses within each other: llama.cpp recurses
MOST_COPIES = 2_000_000  # characters of literals, times how often each is to stand: llama.cpp writes them all down
LONGEST_SCHEMA, MOST_OF_ANY = 32_768, 2_000  # characters of a schema; lengths and counts in it
# A comment, a literal (to the end where nothing closes it) with its repetition, a parenthesis: found in one pass.
_PIECE = re.compile(
    r'#[^\n]*|(?P<literal>"(?:[^"\\]|\\.)*"?|\[(?:[^\]\\]|\\.)*\]?)'
    r"(?:\s{0,9}\{\s{0,9}(?P<least>\d{1,9})\s{0,9},?\s{0,9}(?P<most>\d{0,9})\s{0,9}\})?|[()]",
    re.DOTALL,
)
log = logging.getLogger(__name__)
ANY_OBJECT = {"type": "object"}


class GbnfGrammar:
    """One text's place in a grammar; a `Grammar` of `model/decoding/sampling.py`. Raises UsageError for bad GBNF."""

    def __init__(self, model: LlamaModel, gbnf: str) -> None:
        if len(gbnf) > LONGEST:
            raise UsageError(f"the grammar has {len(gbnf)} characters; {LONGEST} at the most")
        depth, copies = _measure(gbnf)
        if depth > DEEPEST:
            raise UsageError(f"the grammar has more than {DEEPEST} parentheses within each other")
        if copies > MOST_COPIES:
            raise UsageError(f"the grammar's repetitions make {copies} characters; {MOST_COPIES} at the most")
        if "\0" in gbnf:
            raise UsageError("the grammar holds a character of code 0")
        self._eog, text = model.eog, gbnf.encode(errors="replace")
        with _quiet():
            self._sampler: Any = llama_cpp.llama_sampler_init_grammar(model._vocab, text, b"root")
        if not self._sampler:
            raise UsageError("the grammar is no GBNF with a rule named root; LOG_LEVEL=DEBUG shows llama.cpp's reasons")
        self._ended = False

    def _apply(self, data: npt.NDArray[Any]) -> None:
        array: Any = llama_cpp.llama_token_data_array()
        array.data = data.ctypes.data_as(llama_cpp.llama_cpp.llama_token_data_p)
        array.size, array.selected, array.sorted = len(data), -1, False
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

        Where the vocabulary has nothing that the grammar allows, the text may only end.
        """
        data = np.zeros(len(logits), _DATA)
        data["id"], data["logit"] = np.arange(len(logits)), logits
        if not self._ended:
            self._apply(data)
        out: Float32Array = data["logit"].copy()
        if self._ended or not np.isfinite(out).any():
            self._ended = True
            out = np.full(len(logits), -np.inf, np.float32)
            out[list(self._eog)] = logits[list(self._eog)]
        return out

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


def _measure(gbnf: str) -> tuple[int, int]:
    """Return how many parentheses are open at once at the most, and the characters of all literals, written out."""
    deepest = depth = copies = 0
    for piece in _PIECE.finditer(gbnf):
        sign = piece.group()
        depth += (sign == "(") - (sign == ")")
        deepest = max(deepest, depth)
        if literal := piece["literal"]:
            copies += len(literal) * int(piece["most"] or piece["least"] or 1)
    return deepest, copies


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what llama.cpp prints of a client's grammar out of the terminal, unless LOG_LEVEL is DEBUG."""
    if log.isEnabledFor(logging.DEBUG):
        yield
        return
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def schema_to_gbnf(schema: dict[str, Any]) -> str:
    """Return the grammar of JSON that a schema describes, an empty one: of any object. Raises UsageError."""
    _check_counts(schema)
    try:
        return str(converter.json_schema_to_gbnf(json.dumps(schema or ANY_OBJECT)))
    except Exception as error:  # the converter raises whatever its dictionaries do
        told = " ".join(str(error).split())[:200]
        raise UsageError(f"this JSON schema cannot be turned into a grammar: {type(error).__name__} {told}") from error


def _check_counts(schema: dict[str, Any]) -> None:
    """Refuse what the converter would write out before anyone could look at its length."""
    if len(json.dumps(schema)) > LONGEST_SCHEMA:
        raise UsageError(f"the JSON schema has more than {LONGEST_SCHEMA} characters")
    waiting: list[Any] = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            for key in ("minLength", "maxLength", "minItems", "maxItems"):
                if isinstance(node.get(key), int | float) and node[key] > MOST_OF_ANY:
                    raise UsageError(f"the JSON schema's {key} is {node[key]}; {MOST_OF_ANY} at the most")
            pattern, copies = node.get("pattern"), 1
            for number in re.findall(r"\{[^}]*?(\d+)\s*\}", pattern) if isinstance(pattern, str) else ():
                copies *= max(1, int(number[:9]))
            if copies > MOST_OF_ANY:
                raise UsageError(f"the JSON schema's pattern repeats more than {MOST_OF_ANY} times")
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node
