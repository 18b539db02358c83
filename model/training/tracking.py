"""Experiment trackers: TensorBoard, Weights & Biases where it is installed, or none.

Know nothing of what the figures mean.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any, Protocol

from model.errors import UsageError


class Tracker(Protocol):
    """Takes numbers by name."""

    def add(self, numbers: dict[str, float], step: int) -> None:
        """Note the numbers of a step."""

    def close(self) -> None:
        """Write what is left."""


def require_tracker(name: str) -> None:
    """Raise UsageError for a tracker that is not installed."""
    if name == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UsageError(
            "--report_to wandb: wandb is not installed; "
            "pip install wandb, or use --report_to tensorboard"
        )


def open_tracker(name: str, folder: Path, until_step: int) -> Tracker:
    """Return the tracker of a run in a folder, which goes on after until_step.

    Raises UsageError.
    """
    require_tracker(name)
    kinds: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "none": _Nothing}
    tracker: Tracker = kinds[name](folder, until_step)
    return tracker


class _TensorBoard:
    def __init__(self, folder: Path, until_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here, not above: it takes a second

        self._board: Any = SummaryWriter(str(folder / "runs"), purge_step=until_step + 1)

    def add(self, numbers: dict[str, float], step: int) -> None:
        for name, number in numbers.items():
            self._board.add_scalar(name, number, step)

    def close(self) -> None:
        self._board.close()


class _Wandb:
    """A run of its own each time training begins or goes on, in a group by the folder's name."""

    def __init__(self, folder: Path, until_step: int) -> None:
        wandb: Any = importlib.import_module("wandb")
        name = folder.resolve().name
        self._run = wandb.init(
            project="medusa-gguf", group=name, name=f"{name}, step {until_step}", dir=str(folder)
        )

    def add(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


class _Nothing:
    def __init__(self, folder: Path, until_step: int) -> None:
        pass

    def add(self, numbers: dict[str, float], step: int) -> None:
        pass

    def close(self) -> None:
        pass
