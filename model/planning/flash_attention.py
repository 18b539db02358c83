"""Flash attention: with it or without, whichever makes plain steps faster here, remembered.

On CPUs that differs from machine to machine, from file to file and with the tokens in the cache.
Knows no drafts.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from math import log
from statistics import median

from model.base.llama import QUANTIZED_KV, has_gpu
from model.errors import ModelFileError
from model.loaded_model import LoadedModel
from model.planning.measured_steps import StepTimer
from model.storage.facts import key_here, recall, remember
from model.trees.slices import Slices, undisturbed

KIND = "flash_attention"  # of what is remembered
CONTEXTS = (64, 256)  # tokens in the cache: the begin and the middle of a short chat
ROUNDS = 8
SLOW_S = 0.1  # a step; the longer context of such a model takes too long to be filled


def choose_flash_attention(loaded: LoadedModel, *, afresh: bool = False) -> Slices[None]:
    """Let the model's contexts use flash attention from now on if plain steps are faster with it.

    As remembered, or as measured now. Left as it is where the options say it, on GPUs, and for
    models that cannot roll back a step. afresh: measure in any case.
    """
    is_open = loaded.flash_attn is None and loaded.options.kv_type not in QUANTIZED_KV
    if not is_open or has_gpu() or not loaded.base_model.can_roll_back:
        return
    options = loaded.options
    key = key_here(loaded.file.file_fingerprint(), options.n_threads, options.kv_type)
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
    with ExitStack() as opened:
        timers = dict[bool, StepTimer]()
        try:
            for kind in (False, True):
                base = opened.enter_context(loaded.new_base(n_ctx=n_ctx, flash_attn=kind))
                timers[kind] = StepTimer(base)
        except ModelFileError:  # this model cannot be run so, or there is no memory for both
            return False
        gain = 0.0
        step_s = 0.0
        for context in contexts:
            if step_s > SLOW_S:
                break
            for timer in timers.values():
                yield from timer.prefill(context)
            times: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(ROUNDS):
                for kind, timer in timers.items():
                    times[kind].append((yield from undisturbed(partial(timer.run, 1, context))))
            step_s = median(times[False])
            gain += log(step_s / median(times[True]))
    return gain > 0
