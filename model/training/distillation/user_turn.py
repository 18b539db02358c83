"""The user's turn, opened: what a chat template puts before a user's message, and what ends it.

A chat model that goes on behind it writes the message itself (Magpie, arXiv 2406.08464). Knows
neither what is asked for nor how it is sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.base.chat import ChatTemplate, Message, Segment, user_turn
from model.errors import DataError
from model.training.data.token_encoder import PartEncoder
from model.training.distillation.dialogue import Speaker

_MESSAGE = "USERMESSAGE"  # stands where the user's message will be; in no template


@dataclass(frozen=True, kw_only=True)
class UserTurn:
    """ids: of all text before the user's message. eog: tokens that end it; stop: texts that do."""

    ids: list[int]
    eog: frozenset[int]
    stop: tuple[str, ...]

    def message(self, text: str) -> str:
        """Return the message in what the model wrote."""
        for stop in self.stop:
            text = text.partition(stop)[0]
        return text.strip()


def open_user_turn(
    template: ChatTemplate, encoder: PartEncoder, speaker: Speaker, system: str = ""
) -> UserTurn:
    """Render a conversation up to its first user's message; system: what comes before, if anything.

    Raises DataError where the template refuses it, or tells no end of the message.
    """
    messages: list[Message] = [user_turn(_MESSAGE)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    before, found, after = template.render(messages, prompt=True).partition(_MESSAGE)
    if not found or (system and system not in before):
        raise DataError("the chat template leaves nothing to open the user's turn with")

    # A space before the message is the message's: its first word has it.
    ids, _ = encoder.join([Segment(before.rstrip(" "), False)], special=True)
    end = encoder.encode(after.strip(), special=True).tolist()
    if not end:
        raise DataError("the chat template puts nothing behind a user's message")
    eog = speaker.eog
    stop: tuple[str, ...] = ()
    if speaker.piece(end[0]):  # a text, such as Vicuna's "ASSISTANT:"
        stop = (after.split()[0],)
    else:
        eog |= {end[0]}
    return UserTurn(ids=[*encoder.bos.tolist(), *ids.tolist()], eog=eog, stop=stop)
