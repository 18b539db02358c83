"""The file of answers: ShareGPT JSON lines with token ids, resumed after a kill.

One line per finished prompt. Beside `answers.jsonl`, the folder `.answers.jsonl.run` holds the
options that it was begun with, and the writer's lock. Knows nothing of how answers come about.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, TextIO

from model.base.chat import Message
from model.decoding.loops import GRAM, count_repeats
from model.errors import DataError, OutputError
from model.storage.disk_room import require_writable
from model.storage.folder_lock import WriterLock
from model.storage.json_lines import take_lines
from model.storage.whole_file import require_ordinary, whole_file

FROM = {"system": "system", "user": "human", "assistant": "gpt"}  # ShareGPT's names
SYNC_S = 5.0  # seconds between two fsyncs: what a power cut may cost


@dataclass(frozen=True, kw_only=True)
class DistilledAnswer:
    """A prompt with the answers of the base model.

    tokens: all ids, the begin mark included; spans: (start, end) of each answer in them.
    finish_reason: of the last answer, "stop", "length" or "loop".
    """

    id: str
    conversations: list[dict[str, str]]
    tokens: list[int]
    spans: list[tuple[int, int]]
    temperature: float
    finish_reason: str


def sharegpt(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Return messages as ShareGPT writes them."""
    return [{"from": FROM[message["role"]], "value": message["content"]} for message in messages]


@dataclass(kw_only=True)
class Tally:
    """Counts over many answers.

    grams: their 8-grams; repeated: those that stood in the same answer before; loops: answers that
    were cut where they looped.
    """

    answers: int = 0
    tokens: int = 0
    grams: int = 0
    repeated: int = 0
    loops: int = 0

    @property
    def share_repeated(self) -> float:
        """Share of 8-grams that stood in the same answer before."""
        return self.repeated / self.grams if self.grams else 0.0


@dataclass(kw_only=True)
class AnswerFile:
    """The file while it is written, by one process at a time.

    facts: fields that every line carries (whose ids they are). identity: what must be the same when
    a run goes on. done: ids of finished prompts. by_temperature: counts of all lines.
    """

    path: Path
    facts: dict[str, Any]
    identity: dict[str, Any]
    done: set[str] = field(default_factory=set)
    by_temperature: dict[float, Tally] = field(default_factory=lambda: defaultdict(Tally))

    def __enter__(self) -> AnswerFile:
        require_ordinary(self.path)
        require_writable(self.path.parent)
        with contextlib.ExitStack() as opened:
            opened.enter_context(WriterLock(self.folder))
            self._check_identity()
            self._read()
            try:
                file = self.path.open("a", encoding="utf-8", errors="replace")
            except OSError as error:
                raise OutputError(
                    f"{self.path}: cannot be written ({error.strerror}); name another file"
                ) from error
            self._file: TextIO = opened.enter_context(file)
            self._opened = opened.pop_all()
        self._synced = monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        # What cannot be synced was reported when it was written.
        with self._opened, contextlib.suppress(OSError):
            self._file.flush()
            os.fsync(self._file.fileno())

    @property
    def folder(self) -> Path:
        """What belongs to the file but is no answer."""
        return self.path.with_name(f".{self.path.name}.run")

    def _check_identity(self) -> None:
        """Write down what the file is begun with.

        Raises DataError where it was begun with something else.
        """
        options = self.folder / "options.json"
        if not self.path.exists() or not self.path.stat().st_size:
            with whole_file(options) as new:
                new.write_text(json.dumps(self.identity, indent=1), encoding="utf-8")
            return
        try:
            begun = json.loads(options.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise DataError(
                f"{self.path}: there is no telling how it was begun; name another --output"
            ) from None
        differs = [
            f"{key} {begun.get(key)} then, {value} now"
            for key, value in self.identity.items()
            if begun.get(key) != json.loads(json.dumps(value))
        ]
        if differs:
            raise DataError(
                f"{self.path}: was begun otherwise: {'; '.join(differs)}; name another --output"
            )

    def _read(self) -> None:
        """Count what is there; a last line that a kill has torn goes.

        Raises DataError for any other broken line.
        """
        broken = take_lines(self.path, self._count) if self.path.exists() else 0
        if broken:
            raise DataError(
                f"{self.path}, line {broken}: is no answer; mend it or name another --output"
            )

    def _count(self, line: dict[str, Any]) -> None:
        lengths = [end - start for start, end in line["answer_spans"]]
        grams = sum(max(0, length - GRAM + 1) for length in lengths)
        repeated = round(line["repeated_8grams"] * grams)
        looped = line["finish_reason"] == "loop"
        tally = self.by_temperature[line["temperature"]]
        self.done.add(line["id"])
        tally.answers += 1
        tally.tokens += sum(lengths)
        tally.grams += grams
        tally.repeated += repeated
        if looped:
            tally.loops += 1

    def add(self, answer: DistilledAnswer) -> None:
        """Write one finished prompt."""
        spoken = (answer.tokens[start:end] for start, end in answer.spans)
        repeated, grams = count_repeats(spoken)
        line = {
            "id": answer.id,
            "conversations": answer.conversations,
            "tokens": answer.tokens,
            "answer_spans": answer.spans,
            "temperature": answer.temperature,
            "finish_reason": answer.finish_reason,
            "repeated_8grams": round(repeated / grams, 6) if grams else 0.0,
            **self.facts,
        }
        try:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()
            if monotonic() - self._synced > SYNC_S:
                os.fsync(self._file.fileno())
                self._synced = monotonic()
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be written ({error.strerror}); make room"
            ) from error
        self._count(line)
