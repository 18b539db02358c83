"""What a run decides from its options and this machine: device, length, names.

Knows no files' contents.
"""

from __future__ import annotations

import os
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model.errors import UsageError
from model.training.options import TrainOptions

LONGEST = 1024  # tokens per sequence, where nothing is said
SHORTEST = 8  # there is hardly anything to learn from fewer


def choose_device(name: str, number: int = 0) -> torch.device:
    """Return the device to train on. number: which GPU.

    Raises UsageError for one that torch doesn't see.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if number >= torch.cuda.device_count():
        seen = "no CUDA device"
        if torch.cuda.is_available():
            seen = f"{torch.cuda.device_count()} CUDA devices"
        raise UsageError(
            f"--device {name}: process {number} of this machine needs a GPU, torch sees {seen}; "
            "use --device cpu"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def choose_length(asked: int, context_length: int) -> int:
    """Return the tokens per sequence. Raises UsageError where the model wasn't made for so many."""
    if asked > context_length:
        raise UsageError(f"--max_length {asked}: the model's context holds {context_length} tokens")
    if 0 < asked < SHORTEST:
        raise UsageError(f"--max_length {asked}: too short to learn from; use {SHORTEST} or more")
    return asked or min(LONGEST, context_length)


def data_source(options: TrainOptions) -> str:
    """Name the training text in one line."""
    if not options.dataset_name:
        return f"standard library of Python {sysconfig.get_python_version()}"
    local = Path(options.dataset_name).expanduser()
    if local.exists():
        return local.name
    return f"{options.dataset_name} [{options.dataset_split}]"


def with_absolute_paths(options: TrainOptions) -> TrainOptions:
    """Return the options with whole paths, so that a run can be resumed from any directory."""
    names = ["base_model_path", "output_dir", "cache_dir", "resume_from"]
    if Path(options.dataset_name).expanduser().exists():
        names.append("dataset_name")
    absolute: dict[str, Any] = {}
    for name in names:
        path = getattr(options, name)
        if path:
            absolute[name] = os.path.abspath(Path(path).expanduser())
    return replace(options, **absolute)
