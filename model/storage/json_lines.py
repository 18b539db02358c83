"""Files of JSON lines that a kill may leave with a torn last line. Knows no content."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def take_lines(path: Path, take: Callable[[Any], None]) -> int:
    """Hand each line's content to `take`; cut off a last line that is torn.

    A line is broken where it is no JSON or `take` raises ValueError, KeyError or TypeError. Returns
    the number of the first broken line that is not the last one, where reading ends; 0: none is.
    """
    with path.open("r+b") as file:
        start = 0
        for number, line in enumerate(file, 1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError
                take(json.loads(line))
            except (ValueError, KeyError, TypeError):
                is_last = not file.read(1)
                if not is_last:
                    return number
                file.truncate(start)
                return 0
            start += len(line)
    return 0
