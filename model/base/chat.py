"""Chat templates: a conversation as text, and which parts of it the assistant wrote.

Runs the GGUF's own Jinja template in a sandbox, or Vicuna's format where there is none.
Knows nothing of tokens.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.errors import DataError, one_line

# The date that Llama 3's template takes without a clock; texts must not change daily.
_DATE = datetime.datetime(2024, 7, 26)
CHOICES = ("auto", "vicuna", "none")  # auto: the GGUF's own, none where it has none
Message = dict[str, str]  # "role": system, user or assistant; "content"

# Vicuna 1.1, as in FastChat's conversation.py: the answer ends with the end-of-text mark.
VICUNA = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }} "
    "{% elif m.role == 'user' %}USER: {{ m.content }} "
    "{% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered conversation; `answer` where the assistant wrote it."""

    text: str
    answer: bool


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


class ChatTemplate:
    """A compiled chat template.

    source: Jinja; None or empty: Vicuna's. bos, eos: the texts that it writes for these tokens.
    Raises DataError where the source is damaged.
    """

    def __init__(self, source: str | None, *, bos: str = "", eos: str = "") -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _DATE.strftime
        self._special: dict[str, Any] = {"bos_token": bos, "eos_token": eos}
        try:
            self._template = environment.from_string(source or VICUNA)
        except Exception as error:  # Jinja lets some of Python's through, such as RecursionError
            raise DataError(f"the model's chat template is damaged: {one_line(error)}") from error

    def render(self, messages: list[Message], *, prompt: bool) -> str:
        """Return the conversation as text, `prompt` with what the assistant's answer follows.

        Raises DataError where the template refuses it.
        """
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=prompt, **self._special
            )
        except Exception as error:  # whatever its expressions raise, such as ZeroDivisionError
            raise DataError(
                f"the model's chat template refuses a conversation: {one_line(error)}"
            ) from error

    def segments(self, messages: list[Message]) -> list[Segment]:
        """Cut a rendered conversation into prompts and answers, in turn.

        Stops at the turn where a template rewrites what came before (some drop earlier reasoning).
        """
        parts: list[Segment] = []
        done = ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self.render(messages[:i], prompt=True)
            answered = self.render(messages[: i + 1], prompt=False)
            if not asked.startswith(done) or not answered.startswith(asked):
                break
            parts.append(Segment(asked[len(done) :], False))
            parts.append(Segment(answered[len(asked) :], True))
            done = answered
        return [part for part in parts if part.text]


def template_of(metadata: Mapping[str, Any]) -> ChatTemplate:
    """Return the chat template that a GGUF's metadata holds, or Vicuna's."""

    def piece(kind: str) -> str:
        token = metadata.get(f"tokenizer.ggml.{kind}_token_id")
        if not isinstance(token, int):
            return ""
        return str(metadata["tokenizer.ggml.tokens"][token])

    source = metadata.get("tokenizer.chat_template")
    return ChatTemplate(source, bos=piece("bos"), eos=piece("eos"))


def chosen_template(metadata: Mapping[str, Any], choice: str) -> ChatTemplate | None:
    """Return the template that one of CHOICES means for a GGUF.

    None: the model goes on with the messages' contents as they are.
    """
    if choice == "vicuna":
        return template_of({**metadata, "tokenizer.chat_template": None})
    if choice == "auto" and metadata.get("tokenizer.chat_template"):
        return template_of(metadata)
    return None
