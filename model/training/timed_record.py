"""What a run of `--hours` remembers of itself, so that the same command goes on.

Knows nothing of what the time is spent on.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from model.errors import UsageError
from model.storage.whole_file import whole_file


@dataclass(kw_only=True)
class TimedRecord:
    """spent_s: seconds in all. written_s: those of them in which answers were written.

    training: what the training under way learns, and for how long; nothing: none is under way.
    """

    spent_s: float = 0.0
    written_s: float = 0.0
    training: str = ""

    @classmethod
    def load(cls, path: Path) -> TimedRecord:
        """Return what a file holds, or a new record. Raises UsageError for a damaged file."""
        if not path.exists():
            return cls()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            spent_s, written_s = float(values["spent_s"]), float(values["written_s"])
            return cls(spent_s=spent_s, written_s=written_s, training=values.get("training", ""))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f"{path}: there is no telling how far that run is; name another --output_dir"
            ) from error

    def save(self, path: Path) -> None:
        """Write the file whole."""
        with whole_file(path) as new:
            new.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
