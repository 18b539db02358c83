"""How heads are kept: a folder with `config.json` and `medusa_lm_head.safetensors`, written whole, read with suspicion.

`config.json` says all that is short; the training text's token counts, as many as the vocabulary has tokens, are a
tensor, of which it repeats the 100 largest. Knows nothing of training: its facts come in as a dictionary. A folder is
replaced by two renames; should the process die between them, the former version lies beside it as `.NAME.old`, where
loading and the next save find it.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.errors import HeadsError, OutputError
from model.heads.hydra import HydraHeads
from model.heads.medusa import HeadsConfig, MedusaHeads

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
HEADS_FILE = "medusa_lm_head.safetensors"
_INT32_MAX = 2**31 - 1
_TOP = 100  # tokens whose frequencies can be read in config.json

log = logging.getLogger(__name__)


class Base(Protocol):
    """What heads need to know of a base model; a GGUFFile is one."""

    @property
    def n_embd(self) -> int: ...  # noqa: D102
    @property
    def n_vocab(self) -> int: ...  # noqa: D102
    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def file_type(self) -> str: ...  # noqa: D102
    @property
    def logit_scale(self) -> float: ...  # noqa: D102
    @property
    def soft_cap(self) -> float: ...  # noqa: D102
    def heads_fingerprint(self) -> str: ...  # noqa: D102
    def file_fingerprint(self) -> str: ...  # noqa: D102
    @property
    def tied(self) -> bool: ...  # noqa: D102
    def output_weight(self) -> npt.NDArray[np.float32]: ...  # noqa: D102
    def token_embeddings(self) -> npt.NDArray[np.float32]: ...  # noqa: D102


def base_facts(base: Base) -> dict[str, str]:
    """Name the base model in the way that `load_heads` later checks."""
    return {
        "heads_fingerprint": base.heads_fingerprint(),
        "base_fingerprint": base.file_fingerprint(),
        "base_name": base.name,
        "base_file_type": base.file_type,
    }


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, which takes the place of a heads folder when all went well, and vanishes otherwise.

    Raises OutputError when it can't be written (a full disk, no permission), or when the place holds other things.
    """
    folder = folder.resolve()
    new, old = folder.with_name(f".{folder.name}.new"), _former(folder)
    try:
        if folder.is_dir() and any(folder.iterdir()) and not (folder / HEADS_FILE).exists():
            raise OutputError(f"{folder} holds other files than heads: give another folder")
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        yield new
        for path in new.iterdir():
            _sync(path)
        _sync(new)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {folder}: {_line(error)}; give another folder or free space") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_heads(folder: Path, heads: MedusaHeads, facts: dict[str, Any]) -> None:
    """Write the two files into an existing folder; see `save_heads`."""
    facts = dict(facts)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in heads.state_dict().items()}
    counts = facts.pop("token_counts", None)
    if counts is not None:
        tensors["token_counts"] = torch.from_numpy(np.minimum(counts, _INT32_MAX).astype(np.int32))
        top = np.argsort(-counts, kind="stable")[:_TOP]
        most = [[int(token), int(counts[token])] for token in top if counts[token]]
        facts["token_frequencies"] = {"top": most, "total": int(counts.sum())}
    save_file(tensors, folder / HEADS_FILE)
    config = {"format_version": FORMAT_VERSION, **asdict(heads.config), **facts}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def save_heads(folder: Path, heads: MedusaHeads, facts: dict[str, Any]) -> None:
    """Write heads as a folder, whole or not at all.

    facts: `base_facts(...)`, "training", "rank_accuracies" and, optionally, "token_counts" (V,), each token's number in
    the training text, from which a draft vocabulary is chosen: kept as a tensor, the 100 largest in config.json too as
    "token_frequencies". Raises OutputError.
    """
    with whole_folder(folder) as new:
        write_heads(new, heads, facts)


def new_heads(config: HeadsConfig, base: Base, lm_head: Tensor | None = None) -> MedusaHeads:
    """Return untrained heads of either type for a base model. lm_head: another than the base's."""
    if lm_head is None:
        lm_head = torch.from_numpy(base.output_weight())
    if config.head_type == "medusa":
        return MedusaHeads(config, lm_head, base.logit_scale, base.soft_cap)
    shared = base.tied and lm_head.dim() == 2
    embeddings = lm_head if shared else torch.from_numpy(base.token_embeddings())
    return HydraHeads(config, lm_head, embeddings, base.logit_scale, base.soft_cap)


def load_heads(path: Path, base: Base) -> tuple[MedusaHeads, dict[str, Any]]:
    """Read heads (f32, frozen) from a folder or its safetensors file; the config comes with "token_counts" or None.

    Raises HeadsError where they are missing, damaged or made for another width, vocabulary or tokenizer. Those made for
    another quantization of the same model are fine, which is logged.
    """
    folder = (path.parent if path.is_file() else path).resolve()
    if not folder.exists() and _former(folder).exists():
        folder = _former(folder)
    facts = _read_config(folder / CONFIG_FILE)
    config = _heads_config(folder / CONFIG_FILE, facts)
    _check_fit(path, config, facts, base)
    tensors = _read_tensors(path if path.is_file() else folder / HEADS_FILE)
    counts = tensors.pop("token_counts", None)
    with torch.device("meta"):
        matrix = torch.empty(config.vocab, config.dim)
        hydra = config.head_type == "hydra"
        shapes = (HydraHeads(config, matrix, matrix) if hydra else MedusaHeads(config, matrix)).state_dict()
    _check_tensors(path, tensors, {name: tuple(tensor.shape) for name, tensor in shapes.items()})
    if counts is not None and (counts.shape != (config.vocab,) or counts.dtype != torch.int32):
        raise HeadsError(f"{path}: token_counts must be int32 ({config.vocab},): write the heads anew")
    heads = new_heads(config, base, tensors["lm_head"].float() if config.lm_head == "own" else None)
    heads.load_state_dict(tensors)
    facts["token_counts"] = None if counts is None else counts.numpy()
    return heads.requires_grad_(False).eval(), facts


def _read_config(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _missing(path) from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise HeadsError(f"cannot read {path}: {_line(error)}; train the heads anew") from error
    if not isinstance(facts, dict):
        raise HeadsError(f"{path} holds no JSON object: train the heads anew")
    if facts.get("format_version") != FORMAT_VERSION:
        version = facts.get("format_version")
        raise HeadsError(f"{path}: format_version {version!r} is unknown (this version reads {FORMAT_VERSION})")
    return facts


def _heads_config(path: Path, facts: dict[str, Any]) -> HeadsConfig:
    sizes = {"k_heads": (1, 256), "dim": (1, 2**20), "vocab": (1, 2**24), "head_layers": (1, 256)}
    sizes["hidden_dim"] = (0, 2**20)
    for name, (least, most) in sizes.items():
        value = facts.get(name)
        if type(value) is not int or not least <= value <= most:
            raise HeadsError(f"{path}: {name} is {value!r}, not a whole number from {least} to {most}")
    if facts.get("lm_head") not in ("tied", "own"):
        raise HeadsError(f"{path}: lm_head is {facts.get('lm_head')!r}, neither 'tied' nor 'own'")
    head_type = facts.get("head_type", "medusa")  # the only one there was
    if head_type not in ("medusa", "hydra"):
        raise HeadsError(f"{path}: head_type is {head_type!r}, neither 'medusa' nor 'hydra'")
    for name in ("heads_fingerprint", "base_fingerprint", "base_name", "base_file_type"):
        if not isinstance(facts.get(name), str):
            raise HeadsError(f"{path}: {name} is {facts.get(name)!r}, not a text")
    if not _are_rates(facts.get("rank_accuracies", []), facts["k_heads"]):
        raise HeadsError(f"{path}: rank_accuracies are not a row of numbers from 0 to 1 for each head, all as long")
    return HeadsConfig(**{name: facts[name] for name in sizes}, lm_head=facts["lm_head"], head_type=head_type)


def _are_rates(rows: Any, k: int) -> bool:
    """Say whether these are (k, R) numbers from 0 to 1; none at all are right too."""
    if rows == []:
        return True
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        return False
    right = all(isinstance(rate, int | float) and 0 <= rate <= 1 for row in rows for rate in row)  # NaN is neither
    return right and len(rows) == k and len({len(row) for row in rows}) == 1


def _check_fit(path: Path, config: HeadsConfig, facts: dict[str, Any], base: Base) -> None:
    made_for = f"{path}: heads made for {facts['base_name']}"
    if config.dim != base.n_embd:
        raise HeadsError(f"{made_for} of width {config.dim} don't fit {base.name} of width {base.n_embd}")
    if config.vocab != base.n_vocab:
        raise HeadsError(f"{made_for} with {config.vocab} tokens don't fit {base.name} with {base.n_vocab}")
    if facts["heads_fingerprint"] != base.heads_fingerprint():
        raise HeadsError(f"{made_for} don't fit {base.name}: their tokenizers differ")
    if facts["base_fingerprint"] != base.file_fingerprint():
        log.warning("%s in %s, used with %s in %s", made_for, facts["base_file_type"], base.name, base.file_type)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise _missing(path) from None
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise HeadsError(f"{path} is damaged ({_line(error)}): train the heads anew") from error


def _check_tensors(path: Path, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    if tensors.keys() != shapes.keys():
        differing = ", ".join(sorted(tensors.keys() ^ shapes.keys()))
        raise HeadsError(f"{path}: tensors missing or unexpected: {differing}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise HeadsError(f"{path}: {name} is {tuple(tensor.shape)}, its config says {shapes[name]}")
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise HeadsError(f"{path}: {name} holds values that are no finite numbers: train the heads anew")


def _missing(path: Path) -> HeadsError:
    return HeadsError(f"no heads at {path.parent}: {path.name} is missing; train them or name another folder")


def _former(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
