"""Answers that came as text: looping ones cut, and ids made of them as training would. Knows no source of answers."""

from __future__ import annotations

import numpy as np

from model.base.chat import ChatTemplate, Message, Segment
from model.decoding.loops import without_loop
from model.errors import DataError
from model.training.answers import Answer, shared
from model.training.dialogue import Speaker
from model.training.prompts import Prompt
from model.training.text import PartEncoder

Span = tuple[int, int]


def answer_of_text(
    prompt: Prompt, messages: list[Message], reasons: list[str], speaker: Speaker, encoder: PartEncoder,
    template: ChatTemplate, temperature: float, *, cut_loops: bool = True,
) -> Answer:  # fmt: skip
    """Make an answer of a conversation. reasons: how each answer ended.

    Raises DataError where the template refuses it.
    """
    if cut_loops:
        messages, reasons = _cut(messages, reasons, speaker, encoder, chat=bool(prompt.turns))
    if prompt.turns:
        ids, spans = _conversation(messages, reasons, speaker.eog, encoder, template)
    else:
        ids, spans = _continuation(messages[0]["content"], messages[1]["content"], encoder)
    kept = [i for i, message in enumerate(messages) if message["role"] == "assistant"][len(spans) - 1]
    reason = reasons[len(spans) - 1]
    n_bos = len(encoder.bos)
    spans = [(start + n_bos, end + n_bos) for start, end in spans]
    whole = [*encoder.bos.tolist(), *ids][: spans[-1][1]]
    return Answer(prompt.id, shared(messages[: kept + 1]), whole, spans, temperature, reason)


def _cut(
    messages: list[Message], reasons: list[str], speaker: Speaker, encoder: PartEncoder, *, chat: bool
) -> tuple[list[Message], list[str]]:
    """End a conversation with the first answer that loops, where it begins to."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for number, i in enumerate(answers):
        tokens, looped = without_loop(encoder.encode(messages[i]["content"], later=True).tolist())
        if looped:
            text = speaker.detokenize(tokens)
            last: Message = {"role": "assistant", "content": text.strip() if chat else text}
            return [*messages[:i], last], [*reasons[:number], "loop"]
    return messages, reasons


def _conversation(
    messages: list[Message], reasons: list[str], eog: frozenset[int], encoder: PartEncoder, template: ChatTemplate
) -> tuple[list[int], list[Span]]:
    """Return ids and answers of a rendered conversation; an answer that was cut off has no end mark to learn."""
    tokens, mask = encoder.join(template.segments(messages), special=True)
    ids: list[int] = tokens.tolist()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]]))).reshape(-1, 2).tolist()
    spans: list[Span] = []
    for (start, end), reason in zip(edges, reasons, strict=False):
        marks = (i for i in range(start, end) if ids[i] in eog)
        spans.append((start, end if reason == "stop" else next(marks, end)))
    if not spans:
        raise DataError("the chat template leaves nothing of the answer")
    return ids, spans


def _continuation(given: str, said: str, encoder: PartEncoder) -> tuple[list[int], list[Span]]:
    """Return ids of a whole text; what the model said begins where they part from those of the given text alone."""
    (whole, _), (alone, _) = (encoder.join([Segment(text, True)]) for text in (given + said, given))
    n = min(len(whole), len(alone))
    same = int(np.argmin(np.append(whole[:n] == alone[:n], False)))
    return whole.tolist(), [(same, len(whole))]
