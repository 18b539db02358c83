"""Bodies that clients should not send, made from a seed, for tests and hardening.py.

Knows no network.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

HELLO = [{"role": "user", "content": "Hello"}]
PATHS: dict[str, dict[str, Any]] = {  # with a body that is right
    "/v1/completions": {"prompt": "import os\n", "max_tokens": 3},
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 3},
    "/tokenize": {"content": "import os"},
    "/detokenize": {"tokens": [5, 6, 7]},
    "/apply-template": {"messages": HELLO},
}
NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 1e308, -1e-308),
    *(0.5, float("nan"), float("inf"), "", "a", "\0", "é😀", "\ud800", "\u2028", "x" * 5000),
    *([], {}, [None], [[]], [[1, 2], [3]], {"a": 1}, {"": {"": []}}, [0] * 2000, ["a"] * 200),
    *("auto", "none", "NaN", [-1], [2**31], "</s>", "<s><s>", "{{ 7 * 7 }}"),
]
SCHEMAS: list[Any] = [
    {},
    {"type": "object"},
    {"type": "no such type"},
    {"$ref": "#"},
    {"$ref": "#/nowhere"},
    {"pattern": "(("},
    {"type": "string", "pattern": "^(a|b)*$"},
    {"type": "array", "minItems": 100_000},
    {"enum": []},
    {"enum": [1, "a"]},
    {"type": "integer", "minimum": 10**30},
    {"const": "\0"},
    {"oneOf": [{}, {}]},
    {"properties": 7},
    {"type": ["null"]},
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"type": "string", "maxLength": -1},
]
FIELDS: dict[str, list[Any]] = {
    "prompt": [
        *("x", ["a", "b"], [1, 2, 3], [[1], [2]], "def f(" * 40, "x" * 20_000),
        *([4095], [4096], "🤖" * 9),
    ],
    "messages": [
        HELLO,
        [{"role": "system", "content": "x"}, *HELLO],
        [{"role": "assistant"}],
        [{"role": "tool", "content": ""}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        [{"role": "user", "content": [{}]}],
        HELLO * 99,
    ],
    "max_tokens": [0, 1, 2, 5],
    "max_completion_tokens": [1, 4],
    "temperature": [0, 0.7, 2, 2.1],
    "top_p": [0.1, 1, 1e-9],
    "top_k": [0, 1, 40, -1],
    "min_p": [0, 0.5, 1],
    "seed": [0, -1, 2**63 - 1],
    "stop": ["a", ["\n", "x"], ["y"] * 16, ["z"] * 17],
    "stream": [True, False],
    "n": [1, 2, 4],
    "stream_options": [{"include_usage": True}, {"include_usage": 1}],
    "logprobs": [0, 3, True],
    "top_logprobs": [0, 5],
    "echo": [True, False],
    "best_of": [1, 2],
    "suffix": ["a", ""],
    "user": ["me"],
    "tools": [[], [{}]],
    "logit_bias": [{"5": 100}, {"5": -100, "6": 1.5}, {"x": 1}, {"99999": 1}],
    "presence_penalty": [-2, 0.5],
    "frequency_penalty": [1, 2],
    "repeat_penalty": [1.1, 10, 0],
    "draft": ["auto", "heads", "medusa", "ngram", "both", "none"],
    "typical_acceptance": [True],
    "token_details": [True],
    "cache_prompt": [False],
    "chat_template": ["{{ x }}"],
    "content": ["a b c", "\0", "x" * 20_000],
    "tokens": [[1, 2], [4096], list(range(500))],
    "add_special": [True],
    "parse_special": [True, False],
    "response_format": [{"type": "json_object"}, {"type": "text"}, {"type": "x"}],
}
NO_JSON = [b"[" * 10_000, b'{"a":' * 10_000, b"{", b"\xff\xfe", b"null"]
_GRAMMAR = [
    *('"a"', "[a-z]", "[^b]", "(", ")", "*", "+", "?", "|", " ", "{2}", "{0,3}", "{99999}"),
    *("root", "x", "\n", "."),
]


def bodies(seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield paths and bodies without end: wrong fields, damaged ones, no JSON; some are right."""
    rng = random.Random(seed)
    while True:
        path = rng.choices(list(PATHS), [6, 4, 1, 1, 1])[0]
        body = dict(PATHS[path])
        for _ in range(rng.randrange(5)):
            name = rng.choice([*FIELDS, "grammar", "response_format", "model", "\ud800", ""])
            body[name] = _value(rng, name)
        data = json.dumps(body).encode()
        if rng.random() < 0.1:
            data = _damaged(rng, data)
        elif rng.random() < 0.02:
            data = rng.choice([*NO_JSON, rng.randbytes(200)])
        yield path, data


def _value(rng: random.Random, name: str) -> Any:
    if name == "grammar":
        pieces = "".join(rng.choices(_GRAMMAR, k=rng.randrange(1, 12)))
        return rng.choice(["root ::= ", "root ::= ", "x ::= ", ""]) + pieces
    if name == "response_format" and rng.random() < 0.7:
        return {"type": "json_schema", "json_schema": {"name": "x", "schema": rng.choice(SCHEMAS)}}
    if name in FIELDS and rng.random() < 0.6:
        return rng.choice(FIELDS[name])
    return rng.choice(NASTY)


def _damaged(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    inserted = rng.choice([b"", b"\0", b'"', b"}", b"\xff", rng.randbytes(3)])
    return data[:at] + inserted + data[at + rng.randrange(4) :]
