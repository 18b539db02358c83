"""The record of a run: `metrics.jsonl`, `training.png`, a tracker's logs.

Knows nothing of how heads are trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model.errors import OutputError
from model.storage.whole_file import whole_file
from model.training.tracking import open_tracker


class RunRecord:
    """Figures of steps and validations, as they come; the picture is drawn from the file."""

    def __init__(self, folder: Path, until_step: int = 0, report_to: str = "tensorboard") -> None:
        """Begin a record, or go on with one.

        Lines after until_step belong to work that was lost, and go.
        """
        self._folder = folder
        self._path = folder / "metrics.jsonl"
        self.lines = [line for line in _read(self._path) if line["step"] <= until_step]
        kept = "".join(json.dumps(line) + "\n" for line in self.lines)
        with whole_file(self._path) as new:
            new.write_text(kept, encoding="utf-8")
        try:
            self._file = self._path.open("a", encoding="utf-8")
            self._tracker = open_tracker(report_to, folder, until_step)
        except OSError as error:
            raise OutputError(
                f"{folder}: cannot be written ({error.strerror}); choose another folder"
            ) from error

    def add(self, kind: str, step: int, figures: dict[str, Any]) -> None:
        """Write one line of figures; kind: "train" or "validation"."""
        line = {"kind": kind, "step": step, **figures}
        self.lines.append(line)
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            self._tracker.add(_flat(kind, figures), step)
        except OSError as error:
            raise OutputError(
                f"{self._folder}: cannot be written ({error.strerror}); make room"
            ) from error

    def draw(self) -> None:
        """Draw loss and accuracy curves as `training.png`."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4), layout="constrained")
        loss, accuracy = figure.subplots(1, 2)

        # Loss: of training at each step, of validation at the end of each epoch.
        train = [line for line in self.lines if line["kind"] == "train"]
        checks = [line for line in self.lines if line["kind"] == "validation"]
        loss.plot(
            [line["step"] for line in train],
            [line["loss"] for line in train],
            label="training (--loss)",
            linewidth=1,
        )
        if checks:
            steps = [line["step"] for line in checks]
            loss.plot(
                steps, [line["loss"] for line in checks], "o-", label="validation (cross-entropy)"
            )
            # Accuracy: a colour for each head.
            for k in range(len(checks[0]["top1"])):
                color = f"C{k % 10}"
                accuracy.plot(
                    steps, [c["top1"][k] for c in checks], "o-", color=color, label=f"head {k + 1}"
                )
                accuracy.plot(steps, [c["top5"][k] for c in checks], "o:", color=color)
            accuracy.legend(fontsize="small", title="top 1 (dotted: top 5)")
        loss.set(xlabel="step", ylabel="loss, weighted sum of heads", title="loss")
        accuracy.set(xlabel="step", ylabel="share right", ylim=(0, 1), title="validation accuracy")
        loss.legend()
        with whole_file(self._folder / "training.png") as new:
            figure.savefig(new, format="png", dpi=110)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        self._tracker.close()


def _flat(kind: str, figures: dict[str, Any]) -> dict[str, float]:
    """Return one number per name, lists by head."""
    flat: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, list):
            flat |= {f"{kind}/{name}/head{k}": number for k, number in enumerate(value, 1)}
        else:
            flat[f"{kind}/{name}"] = value
    return flat


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of an earlier record; one that a kill cut off is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
