"""A cool-down: a draft source that does not pay pauses, and is tried again later.

Knows no rates and no times.
"""

from __future__ import annotations

# Steps. A trial that takes three plain steps' time costs 3 % of the first pause, 1 % of the
# longest.
FIRST_PAUSE = 64
LONGEST_PAUSE = 256  # steps: a sequence that becomes predictable must not wait much longer
# A source that promises less than this part of plain decoding's speed is not even tried again.
RETRY_SPEEDUP = 0.7


class CoolDown:
    """The pauses of one draft source for one sequence.

    Each pause is twice as long as the one before, until the source has paid. remaining: steps of
    the pause. shared: the cool-down of the source for all sequences: a new one begins where the
    others are.
    """

    __slots__ = ("_shared", "next_pause", "remaining")

    def __init__(self, shared: CoolDown | None = None) -> None:
        self._shared = shared
        self.remaining = 0
        self.next_pause = FIRST_PAUSE
        if shared is not None:
            self.remaining = shared.remaining
            self.next_pause = shared.next_pause

    @property
    def active(self) -> bool:
        """Whether the source pauses."""
        return self.remaining > 0

    def start(self) -> None:
        """Begin a pause: the source does not pay."""
        self.remaining = self.next_pause
        self.next_pause = min(2 * self.next_pause, LONGEST_PAUSE)
        self._share()

    def reset(self) -> None:
        """Make the next pause a short one again: the source pays."""
        self.next_pause = FIRST_PAUSE
        self._share()

    def _share(self) -> None:
        if self._shared is not None:
            self._shared.remaining = self.remaining
            self._shared.next_pause = self.next_pause

    def tick(self) -> bool:
        """Count one step; say whether a pause has ended with it."""
        if not self.remaining:
            return False
        self.remaining -= 1
        return not self.remaining
