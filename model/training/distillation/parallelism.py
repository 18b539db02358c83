"""How many sequences at once are fastest here, and whether with flash attention: measured once.

Remembered by machine and file. Knows neither prompts nor answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from model.base.cores import physical_memory
from model.base.llama import LlamaBase
from model.base.llama_model import LlamaModel
from model.errors import ModelFileError
from model.storage.facts import key_here, recall, remember

KIND = "distilling_parallelism"  # of what is remembered
# Every fourth: kernels that take four rows at a time are slow on two and three.
SIZES = (1, 4, 8, 16, 32, 64)
# Tokens of a sequence, from its prompt to its end: there are some of all lengths in a step. Without
# flash attention every sequence costs what the longest does (benchmarks/results/NOTES.md).
CONTEXTS = (48, 384)
CELLS = 256  # each sequence's are rounded up to these, which llama.cpp does too
# Steps of each size, and rounds over all sizes; the fastest step counts, as what disturbs makes
# slower.
N_TIMED = 3
ROUNDS = 2
BUDGET_S = 48.0  # sizes that would go beyond are left out
WORSE = 0.85  # of the best rate: larger sizes are not tried any more
AS_FAST = 0.97  # of the best rate: the smallest such size is taken
MEMORY = 0.5  # of the machine's, which the KV cache may take


Rates = dict[bool, dict[int, float]]  # tokens per second by flash attention and number of sequences


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """n: sequences at once."""

    n: int
    flash_attn: bool | None


def measured_parallelism(
    model: LlamaModel,
    fingerprint: str,
    *,
    asked: int,
    max_length: int,
    n_threads: int,
    flash_attn: bool | None,
    kv_type: str,
) -> Parallelism:
    """Return the remembered choice, or measure it in at most about BUDGET_S seconds.

    asked: so many sequences; 0: as many as are fastest and find room at max_length tokens each.
    flash_attn: None: as is faster.
    """
    if asked and flash_attn is not None:
        return Parallelism(n=asked, flash_attn=flash_attn)

    # Remembered?
    cells = -(-max_length // CELLS) * CELLS
    key = key_here(fingerprint, asked, cells, n_threads, flash_attn, kv_type)
    rates = _read(recall(KIND).get(key))

    # Measure.
    if rates is None:
        timer = _Timer(model, cells, n_threads, kv_type)
        kinds = (False, True) if flash_attn is None else (flash_attn,)
        rates = {kind: {} for kind in kinds}
        budget_s = BUDGET_S / (ROUNDS * len(kinds))
        for _ in range(ROUNDS):
            for kind in kinds:
                for n, rate in timer.rates((asked,) if asked else SIZES, kind, budget_s).items():
                    rates[kind][n] = max(rate, rates[kind].get(n, 0.0))
        remember(KIND, key, {_name(kind): of_kind for kind, of_kind in rates.items()})
    return choose(rates, asked)


def choose(rates: Rates, asked: int = 0) -> Parallelism:
    """Return the smallest number that is about as fast as the fastest.

    Where nothing could be measured: one sequence, or as many as asked, without flash attention.
    """
    measured = [(rate, -n, kind) for kind, of_kind in rates.items() for n, rate in of_kind.items()]
    if not measured:
        return Parallelism(n=asked or 1, flash_attn=False)
    best, _, _ = max(measured)
    good = [(n, rate, kind) for rate, n, kind in measured if rate >= AS_FAST * best]
    n, _, kind = max(good)
    return Parallelism(n=-n, flash_attn=kind)


def _name(flash_attn: bool) -> str:
    return "on" if flash_attn else "off"


def _read(kept: Any) -> Rates | None:
    """Return the rates as they were remembered."""
    try:
        return {
            kind: {int(n): float(rate) for n, rate in kept[_name(kind)].items()}
            for kind in (False, True)
            if _name(kind) in kept
        }
    except (TypeError, ValueError, AttributeError):  # not there, or damaged
        return None


class _Timer:
    """Steps of many sequences, each with so many cells, in them made-up tokens of CONTEXTS."""

    def __init__(self, model: LlamaModel, cells: int, n_threads: int, kv_type: str) -> None:
        self._model = model
        self._cells = cells
        self._longest = min(CONTEXTS[1], min(cells, model.n_ctx_train) - N_TIMED - 1)
        self._bytes_per_token = 0.0  # of the KV cache
        self._n_threads = n_threads
        self._kv_type = kv_type
        random = np.random.default_rng(0)
        self._tokens = random.integers(0, model.n_vocab, self._longest, np.int32)

    def rates(self, sizes: Sequence[int], flash_attn: bool, budget_s: float) -> dict[int, float]:
        """Return tokens per second by number of sequences, of those that the time allows."""
        end = perf_counter() + budget_s
        rates: dict[int, float] = {}
        step_s = 0.0
        room = MEMORY * (physical_memory() or float("inf"))  # inf: where the system doesn't tell
        for n in sizes:
            if n > 1 and n * self._cells * self._bytes_per_token > room:
                break
            # The next size takes at most as many times longer as it has more rows.
            expected_s = (N_TIMED + 1) * step_s * n / max(rates, default=n)
            if perf_counter() + expected_s > end:
                break
            try:
                step_s = self._step_s(n, flash_attn)
            except ModelFileError:  # no memory for so many, or no flash attention for this model
                break
            rates[n] = n / step_s
            if rates[n] < WORSE * max(rates.values()) and n > 4:
                break
        return rates

    def _step_s(self, n: int, flash_attn: bool) -> float:
        """Return the seconds of a step of n sequences."""
        with LlamaBase(
            self._model, n_ctx=n * self._cells, n_threads=self._n_threads, n_seq_max=n,
            flash_attn=flash_attn, kv_type=self._kv_type, unified=False,
        ) as base:  # fmt: skip
            # Sequence 0 grows; the others are what it was on the way.
            shares = (np.arange(n) + 0.5) / n
            lengths = np.interp(shares, (0, 1), (CONTEXTS[0], self._longest)).astype(np.int32)
            done = 0
            for seq, length in enumerate(lengths, 1):
                base.prefill(self._tokens[done:length], done, 0)
                done = int(length)
                if seq < n:
                    base.restore_state(seq, base.save_state(0))
            self._bytes_per_token = base.state_bytes(0) / done
            contexts = np.roll(lengths, 1)
            sequences = np.arange(n, dtype=np.int32)
            tokens = np.resize(self._tokens, n)
            times = []
            for i in range(N_TIMED + 1):  # the first one makes llama.cpp's buffers
                since = perf_counter()
                base.decode(tokens, contexts + i, sequences, outputs=True)
                base.logits(n)
                times.append(perf_counter() - since)
        return min(times[1:])
