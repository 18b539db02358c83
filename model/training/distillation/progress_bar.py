"""A progress bar over prompts that also says how fast tokens come.

Knows nothing of their source.
"""

from __future__ import annotations

import sys
from time import perf_counter

from tqdm import tqdm

BAR = "{desc} {percentage:3.0f}% |{bar:30}| {n_fmt}/{total_fmt}{postfix}, {remaining} left"
REFRESH_S = 0.5


class ProgressBar:
    """The bar on the terminal, what has failed, and tokens per second of this run.

    Close it when the work is done.
    """

    def __init__(self, total: int, done: int, name: str = "answers") -> None:
        self.tokens = 0
        self.seconds = 0.0
        self.failed = 0
        self._bar = tqdm(total=total, initial=done, desc=name, bar_format=BAR)
        self._began = perf_counter()
        self._shown = self._began

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def tick(self, tokens: int) -> None:
        """Count tokens that came just now."""
        self.tokens += tokens
        now = perf_counter()
        self.seconds = now - self._began
        if now - self._shown > REFRESH_S:
            self._shown = now
            self._bar.set_postfix_str(f"{self.rate:,.0f} tokens/s")

    def end(self, key: str, problem: str = "") -> None:
        """Count a prompt; a problem is why it has no answer."""
        self._bar.update()
        if problem:
            self.failed += 1
            self._bar.write(f"{key}: {problem}", file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()
