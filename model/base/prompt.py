"""Prompts as token ids: the one rule for BOS, whether a prompt is text, ids or a conversation.

Knows no context and no limits: whether a prompt is empty or too long is the caller's to check.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from model.base.chat import ChatTemplate, Message

Prompt = str | Sequence[int] | Sequence[Message]


class Tokenizer(Protocol):
    """What encoding needs of a `LlamaModel`. bos: the token's id; -1: there is none."""

    @property
    def bos(self) -> int: ...  # noqa: D102

    def tokenize(  # noqa: D102
        self, text: str, *, add_bos: bool = True, parse_special: bool = False
    ) -> npt.NDArray[np.int32]: ...


def encode_prompt(
    model: Tokenizer,
    prompt: Prompt,
    template: ChatTemplate | None = None,
    *,
    parse_special: bool = False,
) -> list[int]:
    """Return the token ids of a prompt.

    Ids are taken as they are. Text gets BOS where the GGUF says so; parse_special: control tokens
    that are written out in it, such as `<s>`, are read as such. A conversation is rendered by the
    template, whose control tokens are always read; it has one BOS, whether the template writes it,
    the GGUF asks for it, or both. Without a template its contents are one text.
    Raises DataError where the template refuses the conversation.
    """
    if isinstance(prompt, str):
        return _encode(model, prompt, parse_special)
    if all(isinstance(token, int) for token in prompt):
        return list(cast(Sequence[int], prompt))
    messages = list(cast(Sequence[Message], prompt))
    if template is None:
        text = "".join(message["content"] for message in messages)
        return _encode(model, text, parse_special)
    tokens = _encode(model, template.render(messages, prompt=True), True)
    if tokens[:2] == [model.bos, model.bos]:
        return tokens[1:]
    return tokens


def _encode(model: Tokenizer, text: str, parse_special: bool) -> list[int]:
    tokens: list[int] = model.tokenize(text, parse_special=parse_special).tolist()
    return tokens
