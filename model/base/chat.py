"""Chat templates: a conversation as text, and which parts of it the assistant wrote.

Runs the GGUF's own Jinja template or a file's in a sandbox, or Vicuna's format where there is none.
Knows nothing of tokens.
"""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.errors import DataError, UsageError, one_line

# The date that Llama 3's template takes without a clock; texts must not change daily.
_DATE = datetime.datetime(2024, 7, 26)
_JINJA_FILE = "<template>"  # what Jinja calls a template that comes from no file
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


def user_turn(text: str) -> Message:
    """Return what a user says, as a message."""
    return {"role": "user", "content": text}


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
    name: in messages. Raises DataError, which names the line, where the source is damaged.
    """

    def __init__(
        self,
        source: str | None,
        *,
        bos: str = "",
        eos: str = "",
        name: str = "the model's chat template",
    ) -> None:
        self._name = name
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _DATE.strftime
        self._special: dict[str, Any] = {"bos_token": bos, "eos_token": eos}
        try:
            self._template = environment.from_string(source or VICUNA)
        except Exception as error:  # Jinja lets some of Python's through, such as RecursionError
            raise DataError(f"{name} is damaged{_where(error)}: {one_line(error)}") from error

    def render(self, messages: list[Message], *, prompt: bool) -> str:
        """Return the conversation as text, `prompt` with what the assistant's answer follows.

        Raises DataError, which names the line, where the template refuses it.
        """
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=prompt, **self._special
            )
        except Exception as error:  # whatever its expressions raise, such as ZeroDivisionError
            raise DataError(
                f"{self._name} refuses a conversation{_where(error)}: {one_line(error)}"
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


def _where(error: Exception) -> str:
    """Return the line of a template at which it fails, in words; nothing where none is known."""
    line = getattr(error, "lineno", None)  # of a syntax error
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == _JINJA_FILE:
            line = frame.lineno
    return f" in line {line}" if line else ""


def template_of(
    metadata: Mapping[str, Any],
    source: str | None = None,
    *,
    name: str = "the model's chat template",
) -> ChatTemplate:
    """Return the chat template that a GGUF's metadata holds, or Vicuna's.

    source: of another template, which writes this GGUF's tokens. name: in messages.
    """

    def piece(kind: str) -> str:
        token = metadata.get(f"tokenizer.ggml.{kind}_token_id")
        if not isinstance(token, int):
            return ""
        return str(metadata["tokenizer.ggml.tokens"][token])

    if source is None:
        source = metadata.get("tokenizer.chat_template")
    return ChatTemplate(source, bos=piece("bos"), eos=piece("eos"), name=name)


def chosen_template(metadata: Mapping[str, Any], choice: str) -> ChatTemplate | None:
    """Return the template that one of CHOICES, or a file of Jinja, means for a GGUF.

    None: the model goes on with the messages' contents as they are. Raises UsageError for a file
    that cannot be read, DataError for a template that is damaged.
    """
    if choice == "none":
        return None
    if choice == "auto":
        return template_of(metadata) if metadata.get("tokenizer.chat_template") else None
    if choice == "vicuna":
        return template_of(metadata, VICUNA)
    try:
        source = Path(choice).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        known = ", ".join(CHOICES)
        raise UsageError(
            f"chat template {choice}: is none of {known}, and no file that can be read "
            f"({one_line(error)})"
        ) from None
    if not source.strip():
        raise UsageError(f"chat template {choice}: is an empty file")
    return template_of(metadata, source, name=f"chat template {choice}")
