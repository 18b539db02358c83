"""A progress bar over prompts that also says how fast tokens come. Knows nothing of where they come from."""

from __future__ import annotations

import sys
from time import perf_counter

from tqdm import tqdm

BAR = "{desc} {percentage:3.0f}% |{bar:30}| {n_fmt}/{total_fmt} prompts{postfix}, {remaining} left"
REFRESH_S = 0.5


class Progress:
    """The bar on the terminal, what has failed, and tokens per second of this run. Close it when the work is done."""

    def __init__(self, total: int, done: int) -> None:
        self._bar = tqdm(total=total, initial=done, desc="answers", bar_format=BAR)
        self._began = self._shown = perf_counter()
        self.tokens, self.seconds, self.failed = 0, 0.0, 0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def tick(self, tokens: int) -> None:
        """Count tokens that were won just now."""
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
