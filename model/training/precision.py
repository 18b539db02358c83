"""Which number type products are faster in on this device: bf16 or f32. Knows no heads.

CPUs differ: with AMX or AVX512_BF16 bf16 is two to three times as fast, with AVX2 alone it is
slower. So one product is timed, and the answer remembered: a run that goes on in another process
gets the same.
"""

from __future__ import annotations

from time import perf_counter

import torch

from model.storage.facts import recall, remember, this_machine

ROWS, INNER, COLUMNS = 64, 512, 4096  # of the timed product: 0.7 s where bf16 is emulated
RUNS = 2  # of each type, of which the fastest counts
LEAST_GAIN = 1.2  # conversions and rounding must be worth it


def use_bf16(device: torch.device) -> bool:
    """Say whether the device has fast bf16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    machine = f"{this_machine()} {torch.get_num_threads()}"
    key = f"{torch.__version__} {machine}"
    known = recall("bf16_products").get(key)
    if not isinstance(known, bool):
        seconds = {dtype: _seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
        known = seconds[torch.float32] > LEAST_GAIN * seconds[torch.bfloat16]
        remember("bf16_products", key, known)
    return known


def _seconds(dtype: torch.dtype) -> float:
    """Return how long one product takes."""
    left = torch.ones((ROWS, INNER), dtype=dtype)
    right = torch.ones((COLUMNS, INNER), dtype=dtype)
    times = []
    for _ in range(RUNS + 1):  # the first one warms up, and counts where it is the fastest
        began = perf_counter()
        left @ right.T
        times.append(perf_counter() - began)
    return min(times)
