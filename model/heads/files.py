"""Heads on disk: a folder of `config.json` and `medusa_lm_head.safetensors`, written whole.

`config.json` says all that is short; the training text's token counts, as many as the vocabulary
has tokens, are a tensor, of which it repeats the 100 largest. Knows nothing of training: its facts
come in as a dictionary. A save that was cut short leaves the former version as `.NAME.old`
(see storage/whole_folder.py), where loading finds it.
"""

import json
import logging
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

from model.errors import HeadsError, OutputError, one_line
from model.heads.config_file import FORMAT_VERSION, heads_config, missing, read_config
from model.heads.hydra import HydraHeads
from model.heads.medusa import HeadsConfig, MedusaHeads
from model.storage.whole_folder import former_folder, whole_folder

CONFIG_FILE = "config.json"
HEADS_FILE = "medusa_lm_head.safetensors"
_INT32_MAX = 2**31 - 1
_TOP = 100  # tokens whose frequencies can be read in config.json
_BLOCK = 16_384  # rows of the embeddings that are in memory as f32 at a time
Rows = npt.NDArray[np.integer] | slice

log = logging.getLogger(__name__)


class BaseFile(Protocol):
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
    def output_weight(self, rows: Rows = ...) -> npt.NDArray[np.float32]: ...  # noqa: D102
    def token_embeddings(self, rows: Rows = ...) -> npt.NDArray[np.float32]: ...  # noqa: D102


def base_facts(base: BaseFile) -> dict[str, str]:
    """Name the base model in the way that `load_heads` later checks."""
    return {
        "heads_fingerprint": base.heads_fingerprint(),
        "base_fingerprint": base.file_fingerprint(),
        "base_name": base.name,
        "base_file_type": base.file_type,
    }


@contextmanager
def heads_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write heads into, which replaces another one of heads when all went well.

    See `whole_folder`. Raises OutputError.
    """
    try:
        with whole_folder(folder, marker=HEADS_FILE, holds="heads") as new:
            yield new
    except SafetensorError as error:  # what a full disk is to safetensors
        raise OutputError(
            f"cannot write {folder}: {one_line(error)}; give another folder or free space"
        ) from error


def write_heads(folder: Path, heads: MedusaHeads, facts: dict[str, Any]) -> None:
    """Write the two files into an existing folder; see `save_heads`."""
    facts = dict(facts)
    tensors = {name: t.detach().cpu().contiguous() for name, t in heads.state_dict().items()}
    counts = facts.pop("token_counts", None)
    if counts is not None:
        limited = np.minimum(counts, _INT32_MAX).astype(np.int32)
        tensors["token_counts"] = torch.from_numpy(limited)
        by_count = np.argsort(-counts, kind="stable")
        top = [[int(token), int(counts[token])] for token in by_count[:_TOP] if counts[token]]
        facts["token_frequencies"] = {"top": top, "total": int(counts.sum())}
    save_file(tensors, folder / HEADS_FILE)
    config = {"format_version": FORMAT_VERSION, **asdict(heads.config), **facts}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def save_heads(folder: Path, heads: MedusaHeads, facts: dict[str, Any]) -> None:
    """Write heads as a folder, whole or not at all.

    facts: `base_facts(…)`, "training", "rank_accuracies" and, optionally, "token_counts" (V,), each
    token's number in the training text, from which a draft vocabulary is chosen: kept as a tensor,
    the 100 largest in config.json too as "token_frequencies". Raises OutputError.
    """
    with heads_folder(folder) as new:
        write_heads(new, heads, facts)


def new_heads(
    config: HeadsConfig,
    base: BaseFile,
    lm_head: Tensor | None = None,
    draft_ids: Tensor | None = None,
) -> MedusaHeads:
    """Return untrained heads of either type for a base model.

    lm_head: another than the base's. draft_ids: (R,) int32, ascending, where the config has a draft
    vocabulary: then neither LM head nor embeddings are in memory as a whole in f32.
    """
    if lm_head is None:
        rows: Rows = slice(None) if draft_ids is None else draft_ids.numpy()
        lm_head = torch.from_numpy(base.output_weight(rows))
    scales = (base.logit_scale, base.soft_cap)
    if config.head_type == "medusa":
        return MedusaHeads(config, lm_head, *scales, draft_ids)
    if draft_ids is not None:
        embeddings = _half_embeddings(base)
    elif base.tied and lm_head.dim() == 2:
        embeddings = lm_head
    else:
        embeddings = torch.from_numpy(base.token_embeddings())
    return HydraHeads(config, lm_head, embeddings, *scales, draft_ids)


def _half_embeddings(base: BaseFile) -> Tensor:
    """Return the base's embeddings (V, D) in f16: finer than what files are quantized to."""
    embeddings = torch.empty((base.n_vocab, base.n_embd), dtype=torch.float16)
    for start in range(0, base.n_vocab, _BLOCK):
        rows = slice(start, start + _BLOCK)
        embeddings[rows] = torch.from_numpy(base.token_embeddings(rows))
    return embeddings


def load_heads(path: Path, base: BaseFile) -> tuple[MedusaHeads, dict[str, Any]]:
    """Read heads (f32, frozen) from a folder or its safetensors file, and their config.

    The config comes with "token_counts" (V,) int32 or None. Raises HeadsError where heads are
    missing, damaged or made for another width, vocabulary or tokenizer. Those made for another
    quantization of the same model are fine, which is logged.
    """
    folder = (path.parent if path.is_file() else path).resolve()
    if not folder.exists() and former_folder(folder).exists():
        folder = former_folder(folder)
    facts = read_config(folder / CONFIG_FILE)
    config = heads_config(folder / CONFIG_FILE, facts)
    _check_fit(path, config, facts, base)
    tensors = _read_tensors(path if path.is_file() else folder / HEADS_FILE)
    counts = tensors.pop("token_counts", None)
    _check_tensors(path, tensors, _shapes(config))
    if counts is not None and (counts.shape != (config.vocab,) or counts.dtype != torch.int32):
        raise HeadsError(
            f"{path}: token_counts must be int32 ({config.vocab},): write the heads anew"
        )
    lm_head = tensors["lm_head"].float() if config.lm_head == "own" else None
    draft_ids = tensors.get("draft_ids")
    if draft_ids is not None:
        _check_ids(path, draft_ids, config.vocab)
    heads = new_heads(config, base, lm_head, draft_ids)
    heads.load_state_dict(tensors)
    facts["token_counts"] = None if counts is None else counts.numpy()
    return heads.requires_grad_(False).eval(), facts


def _check_fit(path: Path, config: HeadsConfig, facts: dict[str, Any], base: BaseFile) -> None:
    """Raise HeadsError where heads were made for another model; log another quantization."""
    made_for = f"{path}: heads made for {facts['base_name']}"
    if config.dim != base.n_embd:
        raise HeadsError(
            f"{made_for} of width {config.dim} don't fit {base.name} of width {base.n_embd}"
        )
    if config.vocab != base.n_vocab:
        raise HeadsError(
            f"{made_for} with {config.vocab} tokens don't fit {base.name} with {base.n_vocab}"
        )
    if facts["heads_fingerprint"] != base.heads_fingerprint():
        raise HeadsError(f"{made_for} don't fit {base.name}: their tokenizers differ")
    if facts["base_fingerprint"] != base.file_fingerprint():
        file_type = facts["base_file_type"]
        log.info("%s in %s, used with %s in %s", made_for, file_type, base.name, base.file_type)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise missing(path) from None
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise HeadsError(f"{path} is damaged ({one_line(error)}): train the heads anew") from error


def _shapes(config: HeadsConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors that such heads keep, by name; takes no memory."""
    with torch.device("meta"):
        lm_head = torch.empty(config.n_rows, config.dim)
        ids = torch.empty(config.n_rows, dtype=torch.int32)
        if config.head_type == "hydra":
            embeddings = torch.empty(config.vocab, config.dim)
            heads: MedusaHeads = HydraHeads(config, lm_head, embeddings, draft_ids=ids)
        else:
            heads = MedusaHeads(config, lm_head, draft_ids=ids)
    return {name: tuple(tensor.shape) for name, tensor in heads.state_dict().items()}


def _check_tensors(
    path: Path, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]
) -> None:
    if tensors.keys() != shapes.keys():
        differing = ", ".join(sorted(tensors.keys() ^ shapes.keys()))
        raise HeadsError(f"{path}: tensors missing or unexpected: {differing}")
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if shape != shapes[name]:
            raise HeadsError(f"{path}: {name} is {shape}, its config says {shapes[name]}")
        if name == "draft_ids":
            continue
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise HeadsError(
                f"{path}: {name} holds values that are no finite numbers: train the heads anew"
            )


def _check_ids(path: Path, ids: Tensor, vocab: int) -> None:
    """Raise HeadsError where these are not tokens in ascending order."""
    fine = ids.dtype == torch.int32 and bool((ids.diff() > 0).all())
    if not fine or not 0 <= int(ids[0]) <= int(ids[-1]) < vocab:
        raise HeadsError(f"{path}: draft_ids are no ascending tokens: train the heads anew")
