"""One prompt on its way to an answer: the ids that come next, and the model's own ids as it says them.

What it says is kept as the ids that it chose, and becomes the context of the next turn. Knows no source of answers.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

from model.base.chat import ChatTemplate, Message, Segment
from model.errors import DataError
from model.training.answers import Answer, shared
from model.training.prompts import Prompt
from model.training.text import PartEncoder, Tokenizer

LEAST_ROOM = 16  # tokens that an answer must have room for


class Speaker(Tokenizer, Protocol):
    """What is needed of a model's vocabulary; LlamaModel, or a fake in tests."""

    eog: frozenset[int]

    def detokenize(self, tokens: list[int]) -> str:
        """Return the text of ids; control tokens are empty."""


class Dialogue:
    """A prompt with the answers so far. ids: everything said; spans: the answers in it; problem: why it failed."""

    def __init__(self, prompt: Prompt, speaker: Speaker, encoder: PartEncoder, template: ChatTemplate) -> None:
        self.prompt = prompt
        self.ids: list[int] = []
        self.spans: list[tuple[int, int]] = []
        self.finish_reason = self.problem = ""
        self._speaker, self._encoder, self._template = speaker, encoder, template
        self._messages: list[Message] = []
        self._waiting = list(prompt.turns)
        self._asked = self._said = ""  # the conversation as rendered for the last question; the answer to it

    def ask(self, max_length: int) -> bool:
        """Add to `ids` what comes before the next answer; False where nothing more is to be answered.

        Leaves at least LEAST_ROOM of max_length tokens to the answer. Sets `problem` where not even the first question
        can be asked.
        """
        more, problem = None, ""
        try:
            more = self._next_question() if self.prompt.turns else self._beginning()
        except DataError as error:
            problem = str(error)
        if more is not None and len(self.ids) + len(more) + LEAST_ROOM > max_length:
            problem = f"a prompt of {len(more)} tokens leaves no room for an answer within {max_length}"
        elif more is not None and not self.ids + more:
            problem = "a prompt without a single token"
        if more is None or problem:
            self.problem = "" if self.spans else problem
            return False
        self.ids += more
        return True

    def _beginning(self) -> list[int] | None:
        """Return the ids of the text to go on with; None where the model has gone on with it."""
        if self.ids:
            return None
        text = opening(self.prompt, self._speaker, self._encoder)
        self._messages = [{"role": "user", "content": text}]
        return _opening_ids(self.prompt, self._encoder)

    def _next_question(self) -> list[int] | None:
        """Return the ids from the last answer to the next; None where there is no further question.

        A conversation also ends behind an answer that loops, and where the template rewrites what was said.
        """
        while self._waiting and self._waiting[0]["role"] != "user":
            self._messages.append(self._waiting.pop(0))
        if not self._waiting or self.finish_reason == "loop":
            return None
        self._messages.append(self._waiting.pop(0))
        before, self._asked = self._asked, self._template.render(self._messages, prompt=True)
        if not self.ids:
            first, _ = self._encoder.join([Segment(self._asked, False)], special=True)
            return [*self._encoder.bos.tolist(), *first.tolist()]
        at = self._asked.find(self._said, len(before))
        if not self._asked.startswith(before) or at < 0 or self._asked[len(before) : at].strip():
            return None
        ids: list[int] = self._encoder.encode(self._asked[at + len(self._said) :], special=True, later=True).tolist()
        eog = self._speaker.eog
        return ids[1:] if ids and {ids[0], self.ids[-1]} <= eog else ids  # the model's own end mark stands

    def answer(self, tokens: list[int], finish_reason: str) -> None:
        """Take the model's answer; finish_reason: "stop", "length" or "loop"."""
        self.spans.append((len(self.ids), len(self.ids) + len(tokens)))
        self.ids += tokens
        self.finish_reason = finish_reason
        text = self._speaker.detokenize(tokens)
        self._said = text.strip() if self.prompt.turns else text
        self._messages.append({"role": "assistant", "content": self._said})

    def result(self, temperature: float) -> Answer:
        """Return what is to be kept: everything up to the last answer."""
        last = max(i for i, message in enumerate(self._messages) if message["role"] == "assistant")
        kept = shared(self._messages[: last + 1])
        return Answer(self.prompt.id, kept, self.ids, self.spans, temperature, self.finish_reason)


def opening(prompt: Prompt, speaker: Speaker, encoder: PartEncoder) -> str:
    """Return the text that the model is to go on with, as long as it is wanted."""
    if not prompt.length:
        return prompt.text
    text = speaker.detokenize(_opening_ids(prompt, encoder))
    return text if prompt.text.startswith(" ") else text.removeprefix(" ")  # which some tokenizers add


def _opening_ids(prompt: Prompt, encoder: PartEncoder) -> list[int]:
    ids = encoder.join([Segment(prompt.text, False)])[0].tolist()
    return [*encoder.bos.tolist(), *ids[: prompt.length or None]]


def prompt_seed(seed: int, key: str, turn: int) -> int:
    """Return the seed of one answer: the same in whichever order prompts are answered."""
    return int(hashlib.sha256(f"{seed} {turn} {key}".encode()).hexdigest()[:15], 16)
