"""Checkpoints, to go on with a run: weights, optimiser, progress and options.

One safetensors file, which lies beside the latest heads and is replaced together with them. Nothing
random is used in training but the order of samples, which seed and epoch decide. Knows nothing of
batches and losses.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.errors import UsageError, one_line
from model.storage.whole_folder import former_folder
from model.training.options import TrainOptions, changed_options

STATE_FILE = "trainer_state.safetensors"
Parameters = dict[str, torch.nn.Parameter]


@dataclass(kw_only=True)
class RunProgress:
    """How far a run is: what is needed, beside weights and optimiser, to go on with it."""

    step: int = 0  # of the optimiser, in all
    epoch: int = 0  # finished ones
    step_in_epoch: int = 0
    seconds: float = 0.0  # up to the last step; counted where a run has a time instead of epochs
    best: float = 0.0  # acceptance length of the tuned tree
    best_epoch: int = 0
    tree_nodes: int = 0  # of the tuned tree, its root included; 0: not chosen yet
    rank_accuracies: list[list[float]] = field(default_factory=list)  # of the last validation


def save_run(
    folder: Path,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    progress: RunProgress,
    options: TrainOptions,
    identity: dict[str, str],
) -> None:
    """Write the state of a run into a folder that is swapped in whole (storage/whole_folder.py)."""
    tensors = {f"heads.{name}": p.detach().cpu().contiguous() for name, p in parameters.items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer.{number}.{key}": value.cpu().contiguous() for key, value in values.items()
        }
    state = {"progress": asdict(progress), "options": asdict(options), "identity": identity}
    save_file(tensors, folder / STATE_FILE, {"run": json.dumps(state)})


def load_run(
    path: Path,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    options: TrainOptions,
    identity: dict[str, str],
) -> RunProgress:
    """Take over the weights and optimiser that `save_run` wrote; return how far that run is.

    Raises UsageError where it is not this run.
    """
    state = read_run(path)
    changed = changed_options(state["options"], options)
    changed += [name for name, value in identity.items() if state["identity"].get(name) != value]
    if changed:
        raise UsageError(
            f"--resume_from {path}: that run had another {', '.join(changed)}; begin a new one"
        )
    with safe_open(_state_file(path), framework="pt") as file, torch.no_grad():
        moments: dict[int, dict[str, Tensor]] = {}
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            kind, rest = name.split(".", 1)
            if kind == "heads":
                parameters[rest].copy_(file.get_tensor(name))
            else:
                number, key = rest.split(".")
                moments.setdefault(int(number), {})[key] = file.get_tensor(name)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return RunProgress(**state["progress"])


def read_run(path: Path) -> dict[str, Any]:
    """Return progress, options and identity of the run in a folder.

    Raises UsageError where there is none.
    """
    try:
        with safe_open(_state_file(path), framework="pt") as file:
            state: dict[str, Any] = json.loads((file.metadata() or {})["run"])
            return state
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UsageError(
            f"--resume_from {path}: no run to go on with ({one_line(error)})"
        ) from error


def _state_file(path: Path) -> Path:
    """Find a run's state in its output folder, or in the folder of its latest heads.

    While that one is being replaced, in its former version.
    """
    latest = path / "medusa_heads_latest"
    for folder in (path, latest, former_folder(latest)):
        if (folder / STATE_FILE).exists():
            return folder / STATE_FILE
    return path / STATE_FILE
