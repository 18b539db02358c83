"""Grammars that a text must keep to: llama.cpp's GBNF, and JSON schemas turned into it. Knows no sampling.

llama.cpp's C++ exceptions would end the process: it is asked only what it can answer, and nothing that it does not
allow is ever accepted.
"""

from __future__ import annotations

import ctypes
import json
import re
from typing import Any

import llama_cpp
import llama_cpp.llama_grammar as converter
import numpy as np
import numpy.typing as npt

from model.base.llama import LlamaModel
from model.errors import UsageError

Float32Array = npt.NDArray[np.float32]
_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data
LONGEST, DEEPEST = 100_000, 100  # characters of a grammar, and parentheses within each other: llama.cpp recurses
_LITERALS = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]')
ANY_OBJECT = {"type": "object"}


class GbnfGrammar:
    """One text's place in a grammar; a `Grammar` of `model/decoding/sampling.py`. Raises UsageError for bad GBNF."""

    def __init__(self, model: LlamaModel, gbnf: str) -> None:
        if len(gbnf) > LONGEST:
            raise UsageError(f"the grammar has {len(gbnf)} characters; {LONGEST} at the most")
        if _depth(_LITERALS.sub("", gbnf)) > DEEPEST:
            raise UsageError(f"the grammar has more than {DEEPEST} parentheses within each other")
        if "\0" in gbnf:
            raise UsageError("the grammar holds a character of code 0")
        self._eog = model.eog
        self._sampler: Any = llama_cpp.llama_sampler_init_grammar(model._vocab, gbnf.encode(errors="replace"), b"root")
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


def _depth(text: str) -> int:
    """Return how many parentheses are open at once at the most."""
    deepest = depth = 0
    for sign in text:
        depth += (sign == "(") - (sign == ")")
        deepest = max(deepest, depth)
    return deepest


def schema_to_gbnf(schema: dict[str, Any]) -> str:
    """Return the grammar of JSON that a schema describes, an empty one: of any object. Raises UsageError."""
    try:
        return str(converter.json_schema_to_gbnf(json.dumps(schema or ANY_OBJECT)))
    except Exception as error:  # the converter raises whatever its dictionaries do
        told = " ".join(str(error).split())[:200]
        raise UsageError(f"this JSON schema cannot be turned into a grammar: {type(error).__name__} {told}") from error
