"""How many sequences at once are fastest here, and whether with flash attention: measured once.

Remembered by machine and file. Knows neither prompts nor answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from time import perf_counter
from typing import Any

import numpy as np

from model.base.cores import physical_memory
from model.base.llama import LlamaBase
from model.base.llama_model import LlamaModel
from model.errors import ModelFileError
from model.storage.facts import recall, remember, this_machine

KIND = "distilling_parallelism"  # of what is remembered
# Every fourth: kernels that take four rows at a time are slow on two and three.
SIZES = (1, 4, 8, 16, 32, 64)
CONTEXT = 224  # tokens of each sequence: a prompt and half an answer
# Steps of each size, and rounds over all sizes; the fastest step counts, as what disturbs makes
# slower.
N_TIMED = 3
ROUNDS = 2
BUDGET_S = 30.0  # sizes that would go beyond are left out
WORSE = 0.85  # of the best rate: larger sizes are not tried any more
AS_FAST = 0.97  # of the best rate: the smallest such size is taken
MEMORY = 0.5  # of the machine's, which the KV cache may take
_NAMES = {"off": False, "on": True}  # of flash attention


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
    settings = (fingerprint, asked, n_threads, flash_attn, kv_type)
    machine = (version("llama-cpp-python"), this_machine())
    key = " ".join(map(str, (*settings, *machine)))
    known = _read(recall(KIND).get(key))

    # Measure.
    if known is None:
        timer = _Timer(model, n_threads, kv_type)
        kinds = (False, True) if flash_attn is None else (flash_attn,)
        rates: Rates = {kind: {} for kind in kinds}
        for _ in range(ROUNDS):
            for kind in kinds:
                for n, rate in timer.rates((asked,) if asked else SIZES, kind).items():
                    rates[kind][n] = max(rate, rates[kind].get(n, 0.0))
        known = rates, timer.bytes_per_token
        listed = {name: rates[kind] for name, kind in _NAMES.items() if kind in rates}
        remember(KIND, key, {"rates": listed, "bytes_per_token": timer.bytes_per_token})
    rates, bytes_per_token = known
    memory = physical_memory() or float("inf")  # where the system doesn't tell
    room = MEMORY * memory / max(1.0, bytes_per_token * max_length)
    return choose(rates, asked, room)


def choose(rates: Rates, asked: int = 0, room: float = float("inf")) -> Parallelism:
    """Return the smallest number that is about as fast as the fastest, at most `room`.

    Where nothing could be measured: one sequence, or as many as asked, without flash attention.
    """
    measured = [
        (rate, -n, kind)
        for kind, of_kind in rates.items()
        for n, rate in of_kind.items()
        if n <= max(room, asked, 1)
    ]
    if not measured:
        return Parallelism(n=asked or 1, flash_attn=False)
    best, _, _ = max(measured)
    good = [(n, rate, kind) for rate, n, kind in measured if rate >= AS_FAST * best]
    n, _, kind = max(good)
    return Parallelism(n=-n, flash_attn=kind)


def _read(kept: Any) -> tuple[Rates, float] | None:
    """Return rates and the cache's bytes per token as they were remembered."""
    try:
        rates = {
            _NAMES[name]: {int(n): float(rate) for n, rate in of_kind.items()}
            for name, of_kind in kept["rates"].items()
        }
        return rates, float(kept["bytes_per_token"])
    except (TypeError, KeyError, ValueError, AttributeError):  # not there, or damaged
        return None


class _Timer:
    """Steps of many sequences, each behind CONTEXT made-up tokens."""

    def __init__(self, model: LlamaModel, n_threads: int, kv_type: str) -> None:
        self.bytes_per_token = 0.0  # of the KV cache
        self._model = model
        self._n_threads = n_threads
        self._kv_type = kv_type
        self._end = perf_counter() + BUDGET_S
        self._tokens = np.random.default_rng(0).integers(0, model.n_vocab, CONTEXT, np.int32)

    def rates(self, sizes: Sequence[int], flash_attn: bool) -> dict[int, float]:
        """Return tokens per second by number of sequences."""
        rates: dict[int, float] = {}
        step_s = 0.0
        for n in sizes:
            # The next size takes at most as many times longer as it has more rows.
            expected_s = (N_TIMED + 1) * step_s * n / max(rates, default=n)
            if perf_counter() + expected_s > self._end:
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
        length = CONTEXT + N_TIMED + 1
        with LlamaBase(
            self._model, n_ctx=n * length, n_threads=self._n_threads, n_seq_max=n,
            flash_attn=flash_attn, kv_type=self._kv_type, unified=False,
        ) as base:  # fmt: skip
            base.prefill(self._tokens, 0, 0)
            state = base.save_state(0)
            self.bytes_per_token = state.nbytes / CONTEXT
            for seq in range(1, n):
                base.restore_state(seq, state)
            sequences = np.arange(n, dtype=np.int32)
            times = []
            for i in range(N_TIMED + 1):  # the first one makes llama.cpp's buffers
                since = perf_counter()
                base.decode(self._tokens[:n], np.full(n, CONTEXT + i, np.int32), sequences,
                            outputs=True)  # fmt: skip
                base.logits(n)
                times.append(perf_counter() - since)
        return min(times[1:])
