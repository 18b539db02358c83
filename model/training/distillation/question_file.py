"""The questions that a model wrote itself, kept and dropped ones: JSON lines, resumed after a kill.

Knows nothing of how they are written and judged.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.errors import DataError, OutputError
from model.storage.json_lines import take_lines


@dataclass(frozen=True, kw_only=True)
class Question:
    """number: from 0, in the order of judging. dropped: why it is not kept, or nothing."""

    number: int
    text: str
    dropped: str


class QuestionFile:
    """The file while one process writes it. questions: all that are in it, in their order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.questions: list[Question] = []
        if path.exists():
            self._read()

    @property
    def kept(self) -> list[Question]:
        """The questions that were not dropped."""
        return [question for question in self.questions if not question.dropped]

    def summary(self) -> str:
        """Say how many were kept and dropped, and why."""
        reasons = Counter(question.dropped for question in self.questions if question.dropped)
        kept = f"{len(self.kept):,} of {len(self.questions):,} kept"
        if not reasons:
            return kept
        dropped = ", ".join(f"{times:,} {reason}" for reason, times in reasons.most_common())
        return f"{kept}; dropped: {dropped}"

    def _read(self) -> None:
        """Read what is there; a last line that a kill has torn goes.

        Raises DataError for any other broken line.
        """
        broken = take_lines(self.path, self._take)
        if broken:
            raise DataError(f"{self.path}, line {broken}: is no question; name another --output")

    def _take(self, line: dict[str, Any]) -> None:
        question = Question(**line)
        if question.number != len(self.questions):
            raise ValueError
        self.questions.append(question)

    def add(self, question: Question) -> None:
        """Write the next question."""
        assert question.number == len(self.questions), "questions come in their order"
        line = json.dumps(asdict(question), ensure_ascii=False) + "\n"
        try:
            with self.path.open("a", encoding="utf-8", errors="replace") as file:
                file.write(line)
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be written ({error.strerror}); make room"
            ) from error
        self.questions.append(question)
