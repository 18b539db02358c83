"""Answers that came as text: looping ones cut, and ids made of them as training would.

Knows no source of answers.
"""

from __future__ import annotations

import numpy as np

from model.base.chat import ChatTemplate, Message, Segment
from model.decoding.loops import without_loop
from model.errors import DataError
from model.training.data.prompts import Prompt
from model.training.data.token_encoder import PartEncoder
from model.training.distillation.answers import DistilledAnswer, sharegpt
from model.training.distillation.dialogue import Speaker

Span = tuple[int, int]


def answer_of_text(
    prompt: Prompt,
    messages: list[Message],
    reasons: list[str],
    speaker: Speaker,
    encoder: PartEncoder,
    template: ChatTemplate,
    temperature: float,
    *,
    cut_loops: bool = True,
) -> DistilledAnswer:
    """Make an answer of a conversation. reasons: how each answer ended.

    Raises DataError where the template refuses it.
    """
    if cut_loops:
        messages, reasons = _cut(messages, reasons, speaker, encoder, chat=bool(prompt.turns))

    # The ids, and where the answers are in them.
    if prompt.turns:
        ids, spans = _conversation(messages, reasons, speaker.eog, encoder, template)
    else:
        ids, spans = _continuation(messages[0]["content"], messages[1]["content"], encoder)
    bos: list[int] = encoder.bos.tolist()
    spans = [(start + len(bos), end + len(bos)) for start, end in spans]

    # Everything up to the last answer that the template has left.
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    last = len(spans) - 1
    return DistilledAnswer(
        id=prompt.id,
        conversations=sharegpt(messages[: answers[last] + 1]),
        tokens=[*bos, *ids][: spans[last][1]],
        spans=spans,
        temperature=temperature,
        finish_reason=reasons[last],
    )


def _cut(
    messages: list[Message],
    reasons: list[str],
    speaker: Speaker,
    encoder: PartEncoder,
    *,
    chat: bool,
) -> tuple[list[Message], list[str]]:
    """End a conversation with the first answer that loops, where it begins to."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for number, i in enumerate(answers):
        ids = encoder.encode(messages[i]["content"], later=True).tolist()
        tokens, looped = without_loop(ids)
        if looped:
            text = speaker.detokenize(tokens)
            last: Message = {"role": "assistant", "content": text.strip() if chat else text}
            return [*messages[:i], last], [*reasons[:number], "loop"]
    return messages, reasons


def _conversation(
    messages: list[Message],
    reasons: list[str],
    eog: frozenset[int],
    encoder: PartEncoder,
    template: ChatTemplate,
) -> tuple[list[int], list[Span]]:
    """Return ids and answers of a rendered conversation.

    An answer that was cut off has no end mark to learn.
    """
    tokens, mask = encoder.join(template.segments(messages), special=True)
    ids: list[int] = tokens.tolist()
    # The mask's edges: each answer's start and end.
    padded = np.concatenate([[0], mask.astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(padded)).reshape(-1, 2).tolist()
    spans: list[Span] = []
    for (start, end), reason in zip(edges, reasons, strict=False):
        if reason != "stop":
            end = next((i for i in range(start, end) if ids[i] in eog), end)
        spans.append((start, end))
    if not spans:
        raise DataError("the chat template leaves nothing of the answer")
    return ids, spans


def _continuation(given: str, said: str, encoder: PartEncoder) -> tuple[list[int], list[Span]]:
    """Return ids of a whole text, and where the model's own begin.

    They begin where the whole text's ids part from those of the given text alone.
    """
    whole, _ = encoder.join([Segment(given + said, True)])
    alone, _ = encoder.join([Segment(given, True)])
    n = min(len(whole), len(alone))
    same = int(np.argmin(np.append(whole[:n] == alone[:n], False)))
    return whole.tolist(), [(same, len(whole))]
