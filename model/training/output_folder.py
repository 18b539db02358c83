"""The output folder of a run: the one that is named, the resumed run's, or the model's own.

Knows nothing of what is written there.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from model.base.gguf_file import GGUFFile
from model.errors import UsageError
from model.training.options import TrainOptions

BUNDLED = "tiny-python"  # its heads in medusa_heads_weights/ are the project's own, and stay
DEMO = "demo"  # `main.py demo` trains there, each time anew


def choose_output_dir(options: TrainOptions, file: GGUFFile, heads_folder: Path) -> Path:
    """Return the folder that is named, that of the run that is resumed, or the model's own."""
    if options.output_dir:
        return Path(options.output_dir)
    if options.resume_from:
        return run_folder(options.resume_from)
    return default_output_dir(file.path, file.file_fingerprint(), heads_folder)


def run_folder(resume_from: str) -> Path:
    """Return the output folder of the run that --resume_from names."""
    folder = Path(resume_from)
    return folder.parent if folder.name == "medusa_heads_latest" else folder


def default_output_dir(base_model: Path, fingerprint: str, heads_folder: Path) -> Path:
    """Return the model's own folder below heads_folder.

    Never the demo's, nor the one whose heads come with the project. One that belongs to another
    base model of the same name, or to none, is left alone: the folder's name ends with a piece of
    the fingerprint then.
    """
    bundled = base_model.stem.split(".")[0] == BUNDLED
    folder = heads_folder / (f"{BUNDLED}-retrained" if bundled else base_model.stem)
    if folder.name != DEMO and all(_base_of(path) == fingerprint for path in _heads_in(folder)):
        return folder
    return folder.with_name(f"{folder.name}-{fingerprint[:8]}")


def _heads_in(folder: Path) -> list[Path]:
    """Return the config.json of all heads in an output folder."""
    names = ("config.json", "medusa_heads_*/config.json", ".medusa_heads_*.old/config.json")
    return [path for name in names for path in folder.glob(name)]


def _base_of(config: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(config.read_text(encoding="utf-8"))["base_fingerprint"])
    return None


def require_no_run(output_dir: Path, resume_from: str) -> None:
    """Raise UsageError where a folder holds another run than the one that is resumed."""
    resumed = resume_from and run_folder(resume_from).resolve() == output_dir.resolve()
    if not resumed and _heads_in(output_dir):
        raise UsageError(
            f"{output_dir}: holds the heads of an earlier run; "
            f"go on with it (--resume_from {output_dir}) or name another --output_dir"
        )
