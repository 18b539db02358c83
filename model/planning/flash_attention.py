"""Flash attention: with it or without, whichever makes plain steps faster here, remembered.

On CPUs that differs from machine to machine, from file to file and with the tokens in the cache.
Knows no drafts.
"""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from math import log
from statistics import median
from time import perf_counter

from model.base.llama import QUANTIZED_KV, has_gpu
from model.loaded_model import LoadedModel
from model.planning.measured_steps import StepTimer
from model.storage.facts import recall, remember, this_machine
from model.trees.slices import Slices, undisturbed

KIND = "flash_attention"  # of what is remembered
CONTEXTS = (64, 512)  # tokens in the cache
ROUNDS = 8
MAX_PREFILL_S = 3.0  # a longer context that takes longer to fill is left out


def choose_flash_attention(loaded: LoadedModel, *, afresh: bool = False) -> Slices[None]:
    """Let the model's contexts use flash attention from now on if plain steps are faster with it.

    As remembered, or as measured now. Left as it is where the options say it, on GPUs, and for
    models that cannot roll back a step. afresh: measure in any case.
    """
    is_open = loaded.flash_attn is None and loaded.options.kv_type not in QUANTIZED_KV
    if not is_open or has_gpu() or not loaded.base_model.can_roll_back:
        return
    key = " ".join(
        (
            loaded.file.file_fingerprint(),
            str(loaded.options.n_threads),
            loaded.options.kv_type,
            version("llama-cpp-python"),
            this_machine(),
        )
    )
    known = None if afresh else recall(KIND).get(key)
    if not isinstance(known, bool):
        yield  # so far nothing has taken long
        known = yield from _is_faster(loaded)
        remember(KIND, key, known)
    loaded.flash_attn = known


def _is_faster(loaded: LoadedModel) -> Slices[bool]:
    """Time plain steps with and without, in turn, over a short and a long context."""
    contexts = sorted({max(2, min(context, loaded.context // 2)) for context in CONTEXTS})
    n_ctx = contexts[-1] + 1
    with (
        loaded.new_base(n_ctx=n_ctx, flash_attn=False) as without,
        loaded.new_base(n_ctx=n_ctx, flash_attn=True) as using,
    ):
        timers = {False: StepTimer(without), True: StepTimer(using)}
        gain = 0.0
        prefill_s = 0.0  # a token
        for context in contexts:
            if prefill_s * context > MAX_PREFILL_S:
                break
            for timer in timers.values():
                began = perf_counter()
                yield from timer.prefill(context)
                prefill_s = (perf_counter() - began) / context
            times: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(ROUNDS):
                for kind, timer in timers.items():
                    times[kind].append((yield from undisturbed(partial(timer.run, 1, context))))
            gain += log(median(times[False]) / median(times[True]))
    return gain > 0
