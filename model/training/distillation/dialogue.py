"""A prompt on its way to an answer: the ids that come next, and the model's own as it says them.

What it says is kept as the ids that it chose, and becomes the context of the next turn. Knows no
source of answers.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

from model.base.chat import ChatTemplate, Message, Segment, user_turn
from model.errors import DataError
from model.training.data.prompts import Prompt
from model.training.data.token_encoder import PartEncoder, Tokenizer
from model.training.distillation.answers import DistilledAnswer, sharegpt

LEAST_ROOM = 16  # tokens that an answer must have room for


class Speaker(Tokenizer, Protocol):
    """What is needed of a model's vocabulary; LlamaModel, or a fake in tests."""

    eog: frozenset[int]

    def detokenize(self, tokens: list[int]) -> str:
        """Return the text of ids; control tokens are empty."""


class Dialogue:
    """A prompt with the answers so far.

    ids: everything said; spans: the answers in it; problem: why it failed.
    """

    def __init__(
        self, prompt: Prompt, speaker: Speaker, encoder: PartEncoder, template: ChatTemplate
    ) -> None:
        self.prompt = prompt
        self.ids: list[int] = []
        self.spans: list[tuple[int, int]] = []
        self.finish_reason = ""
        self.problem = ""
        self._speaker = speaker
        self._encoder = encoder
        self._template = template
        self._messages: list[Message] = []
        self._waiting = list(prompt.turns)
        self._rendered = ""  # the conversation, as the template wrote it for the last question
        self._answered = ""  # the answer to that question

    def ask(self, max_length: int) -> bool:
        """Add to `ids` what comes before the next answer; False where nothing is left to answer.

        Leaves at least LEAST_ROOM of max_length tokens to the answer. Sets `problem` where not even
        the first question can be asked.
        """
        try:
            more = self._next_question() if self.prompt.turns else self._beginning()
        except DataError as error:
            return self._end(str(error))
        if more is None:
            return self._end("")
        if len(self.ids) + len(more) + LEAST_ROOM > max_length:
            return self._end(
                f"a prompt of {len(more)} tokens leaves no room for an answer within {max_length}"
            )
        if not self.ids and not more:
            return self._end("a prompt without a single token")
        self.ids += more
        return True

    def _end(self, problem: str) -> bool:
        """Ask nothing more; a problem counts only where nothing was answered."""
        self.problem = "" if self.spans else problem
        return False

    def _beginning(self) -> list[int] | None:
        """Return the ids of the text to go on with; None where the model has gone on with it."""
        if self.ids:
            return None
        text = opening(self.prompt, self._speaker, self._encoder)
        self._messages = [user_turn(text)]
        return _opening_ids(self.prompt, self._encoder)

    def _next_question(self) -> list[int] | None:
        """Return the ids from the last answer to the next; None where there is no further question.

        A conversation also ends after an answer that loops, and where the template rewrites what
        was said.
        """
        while self._waiting and self._waiting[0]["role"] != "user":
            self._messages.append(self._waiting.pop(0))
        if not self._waiting or self.finish_reason == "loop":
            return None
        self._messages.append(self._waiting.pop(0))
        before = self._rendered
        self._rendered = self._template.render(self._messages, prompt=True)
        if not self.ids:
            first, _ = self._encoder.join([Segment(self._rendered, False)], special=True)
            return [*self._encoder.bos.tolist(), *first.tolist()]
        # The last answer must stand where it was given, after the same text.
        start = self._rendered.find(self._answered, len(before))
        if not self._rendered.startswith(before) or start < 0:
            return None
        if self._rendered[len(before) : start].strip():
            return None
        rest = self._rendered[start + len(self._answered) :]
        ids: list[int] = self._encoder.encode(rest, special=True, later=True).tolist()
        if ids and {ids[0], self.ids[-1]} <= self._speaker.eog:
            return ids[1:]  # the model's own end mark stands
        return ids

    def answer(self, tokens: list[int], finish_reason: str) -> None:
        """Add the model's answer; finish_reason: "stop", "length" or "loop"."""
        self.spans.append((len(self.ids), len(self.ids) + len(tokens)))
        self.ids += tokens
        self.finish_reason = finish_reason
        text = self._speaker.detokenize(tokens)
        self._answered = text.strip() if self.prompt.turns else text
        self._messages.append({"role": "assistant", "content": self._answered})

    def result(self, temperature: float) -> DistilledAnswer:
        """Return what is to be kept: everything up to the last answer."""
        roles = [message["role"] for message in self._messages]
        n_kept = len(roles) - roles[::-1].index("assistant")
        return DistilledAnswer(
            id=self.prompt.id,
            conversations=sharegpt(self._messages[:n_kept]),
            tokens=self.ids,
            spans=self.spans,
            temperature=temperature,
            finish_reason=self.finish_reason,
        )


def opening(prompt: Prompt, speaker: Speaker, encoder: PartEncoder) -> str:
    """Return the text that the model is to go on with, as long as it is wanted."""
    if not prompt.length:
        return prompt.text
    text = speaker.detokenize(_opening_ids(prompt, encoder))
    if prompt.text.startswith(" "):
        return text
    return text.removeprefix(" ")  # which some tokenizers add


def _opening_ids(prompt: Prompt, encoder: PartEncoder) -> list[int]:
    ids = encoder.join([Segment(prompt.text, False)])[0].tolist()
    return [*encoder.bos.tolist(), *ids[: prompt.length or None]]


def prompt_seed(seed: int, key: str, turn: int) -> int:
    """Return the seed of one answer: the same in whichever order prompts are answered."""
    return int(hashlib.sha256(f"{seed} {turn} {key}".encode()).hexdigest()[:15], 16)
