"""In which batches states are extracted fastest here, and whether with flash attention: remembered.

Which is faster differs from machine to machine and from file to file. Knows no samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from time import perf_counter
from typing import Any

import numpy as np

from model.base.llama import QUANTIZED_KV, LlamaBase, has_gpu
from model.errors import ModelFileError
from model.storage.facts import recall, remember, this_machine

KIND = "extraction"  # of what is remembered
N_BATCH = 512  # tokens per decode: llama.cpp keeps the logits of every one (262 MB at V=128k)
SIZES = (N_BATCH, 128)
N_TOKENS = 512  # of the made-up text that is timed
ROUNDS = 2
MAX_S = 10.0  # where one text takes longer, no further way is timed


@dataclass(frozen=True, kw_only=True)
class Batching:
    """n_batch: tokens per decode."""

    n_batch: int = N_BATCH
    flash_attn: bool | None = None


# make(batching, n_ctx) → the context that states are extracted in.
Make = Callable[[Batching, int], LlamaBase]


def fastest_batching(
    make: Make,
    fingerprint: str,
    *,
    max_length: int,
    n_threads: int,
    flash_attn: bool | None,
    kv_type: str,
) -> Batching:
    """Return the remembered choice, or measure it on texts of at most max_length tokens.

    flash_attn: None: as is faster, on CPUs.
    """
    kinds = [flash_attn]
    if flash_attn is None and kv_type not in QUANTIZED_KV and not has_gpu():
        kinds = [False, True]
    settings = (fingerprint, n_threads, kinds, kv_type, version("llama-cpp-python"))
    key = " ".join(map(str, (*settings, this_machine())))
    try:
        return Batching(**recall(KIND)[key])
    except (KeyError, TypeError):  # not there, or damaged
        pass
    batchings = [Batching(n_batch=n, flash_attn=kind) for kind in kinds for n in SIZES]
    times = dict.fromkeys(batchings, float("inf"))
    n_tokens = min(N_TOKENS, max_length)
    for _, batching in itertools.product(range(ROUNDS), batchings):
        try:
            seconds = _seconds(make, batching, n_tokens)
        except ModelFileError:  # this model cannot be run so
            continue
        times[batching] = min(times[batching], seconds)
        if times[batching] > MAX_S:
            break
    best = min(batchings, key=times.__getitem__)
    remember(KIND, key, asdict(best))
    return best


def _seconds(make: Make, batching: Batching, n_tokens: int) -> float:
    """Return how long the states of a made-up text take."""
    with make(batching, n_tokens) as base:
        random: Any = np.random.default_rng(0)
        tokens = random.integers(0, base.n_vocab, n_tokens, np.int32)
        began = perf_counter()
        for start in range(0, n_tokens, base.n_batch):
            batch = tokens[start : start + base.n_batch]
            base.decode(batch, start, 0, outputs=True)
            base.hidden(len(batch))
        return perf_counter() - began
