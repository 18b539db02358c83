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
from model.storage.facts import recall, remember, this_machine

KIND = "extraction"  # of what is remembered
N_BATCH = 512  # tokens per decode: llama.cpp keeps the logits of every one (262 MB at V=128k)
SIZES = (N_BATCH, 128)
N_TOKENS = 512  # of the made-up text that is timed
ROUNDS = 2
MAX_S = 10.0  # a model that takes longer for one text is not timed


@dataclass(frozen=True, kw_only=True)
class Batching:
    """n_batch: tokens per decode."""

    n_batch: int = N_BATCH
    flash_attn: bool | None = None


# open(batching, n_ctx) → the context that states are extracted in.
Open = Callable[[Batching, int], LlamaBase]


def fastest_batching(
    open: Open, fingerprint: str, *, n_threads: int, flash_attn: bool | None, kv_type: str
) -> Batching:
    """Return the remembered choice, or measure it. flash_attn: None: as is faster, on CPUs."""
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
    for _, batching in itertools.product(range(ROUNDS), batchings):
        times[batching] = min(times[batching], _seconds(open, batching))
        if times[batching] > MAX_S:
            return batchings[0]
    best = min(batchings, key=times.__getitem__)
    remember(KIND, key, asdict(best))
    return best


def _seconds(open: Open, batching: Batching) -> float:
    """Return how long the states of a made-up text take."""
    with open(batching, N_TOKENS) as base:
        random: Any = np.random.default_rng(0)
        tokens = random.integers(0, base.n_vocab, N_TOKENS, np.int32)
        began = perf_counter()
        for start in range(0, N_TOKENS, base.n_batch):
            batch = tokens[start : start + base.n_batch]
            base.decode(batch, start, 0, outputs=True)
            base.hidden(len(batch))
        return perf_counter() - began
