"""config.json of a heads folder, read with suspicion: it may be damaged, or of another model.

Knows neither tensors nor how folders are written.
"""

import json
from pathlib import Path
from typing import Any

from model.errors import HeadsError, one_line
from model.heads.medusa import HeadsConfig

FORMAT_VERSION = 1
# Whole numbers of a config, with the least and the most that they may be.
_SIZES = {
    "k_heads": (1, 256),
    "dim": (1, 2**20),
    "vocab": (1, 2**24),
    "head_layers": (1, 256),
    "hidden_dim": (0, 2**20),
}
_TEXTS = ("heads_fingerprint", "base_fingerprint", "base_name", "base_file_type")


def read_config(path: Path) -> dict[str, Any]:
    """Return what a config.json holds. Raises HeadsError where it is missing or of no use."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise missing(path) from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise HeadsError(f"cannot read {path}: {one_line(error)}; train the heads anew") from error
    if not isinstance(facts, dict):
        raise HeadsError(f"{path} holds no JSON object: train the heads anew")
    version = facts.get("format_version")
    if version != FORMAT_VERSION:
        raise HeadsError(
            f"{path}: format_version {version!r} is unknown (this version reads {FORMAT_VERSION})"
        )
    return facts


def heads_config(path: Path, facts: dict[str, Any]) -> HeadsConfig:
    """Return the shapes that a config says, and check the other facts that are relied on.

    path: of the file, for messages. Raises HeadsError for a value that makes no sense.
    """
    for name, (least, most) in _SIZES.items():
        value = facts.get(name)
        if type(value) is not int or not least <= value <= most:
            raise HeadsError(
                f"{path}: {name} is {value!r}, not a whole number from {least} to {most}"
            )
    draft_vocab = facts.get("draft_vocab", 0)  # all, as it was before it could be chosen
    if type(draft_vocab) is not int or not 0 <= draft_vocab <= facts["vocab"]:
        raise HeadsError(
            f"{path}: draft_vocab is {draft_vocab!r}, not a whole number from 0 to {facts['vocab']}"
        )
    lm_head = facts.get("lm_head")
    if lm_head not in ("tied", "own"):
        raise HeadsError(f"{path}: lm_head is {lm_head!r}, neither 'tied' nor 'own'")
    head_type = facts.get("head_type", "medusa")  # the only one there was
    if head_type not in ("medusa", "hydra"):
        raise HeadsError(f"{path}: head_type is {head_type!r}, neither 'medusa' nor 'hydra'")
    for name in _TEXTS:
        if not isinstance(facts.get(name), str):
            raise HeadsError(f"{path}: {name} is {facts.get(name)!r}, not a text")
    if not _are_rates(facts.get("rank_accuracies", []), facts["k_heads"]):
        raise HeadsError(
            f"{path}: rank_accuracies are not a row of numbers from 0 to 1 for each head, "
            "all as long"
        )
    sizes = {name: facts[name] for name in _SIZES}
    return HeadsConfig(**sizes, lm_head=lm_head, head_type=head_type, draft_vocab=draft_vocab)


def _are_rates(rows: Any, k_heads: int) -> bool:
    """Whether these are (K, R) numbers from 0 to 1; none at all are right too."""
    if rows == []:
        return True
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        return False
    if len(rows) != k_heads or len({len(row) for row in rows}) != 1:
        return False
    rates = [rate for row in rows for rate in row]
    return all(isinstance(rate, int | float) and 0 <= rate <= 1 for rate in rates)  # NaN: neither


def missing(path: Path) -> HeadsError:
    """Return the error that says that a file of a heads folder is missing."""
    return HeadsError(
        f"no heads at {path.parent}: {path.name} is missing; train them or name another folder"
    )
