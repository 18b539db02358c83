"""Layers as drafting wants them: in the type that is fastest here, each module one TorchScript call.

int8 changes now and then which token is drafted, never the text. Knows nothing of heads.
"""

import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Literal, cast

import torch
from torch import Tensor, nn

from model.base.remember import recall, remember

DType = Literal["auto", "f32", "bf16", "int8"]
TYPES = ("int8", "bf16", "f32")


class PerHead(nn.Module):
    """One layer where each head reads its own rows: (B,K,D) -> (B,K,H); weight (K,H,D), bias (K,H)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: str) -> None:
        super().__init__()
        biases = [None] * len(weight) if bias is None else list(bias)
        self.heads = nn.ModuleList(linear(w, b, dtype) for w, b in zip(weight, biases, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """Run all heads' layers."""
        return torch.stack([head(x[:, k]) for k, head in enumerate(self.heads)], 1)


class _Int8Linear(nn.Module):
    """A linear layer in int8: weights with a scale per row, inputs quantised as they come. (*,D) -> (*,H)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        scales = weight.abs().amax(1).clamp_min(1e-12) / 127  # a row of zeros has no scale of its own
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        with quietly():
            quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(quantized, bias)
        # Without VNNI sums of 8 × 8 bits overflow, so inputs get 7.
        self.narrow = not torch.cpu.get_capabilities().get("avx512_vnni", False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.quantized.linear_dynamic(x, self.packed, self.narrow))


def linear(weight: Tensor, bias: Tensor | None, dtype: str) -> nn.Module:
    """Return a linear layer of a type."""
    if dtype == "int8":
        return _Int8Linear(weight.float(), None if bias is None else bias.float())
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.to(kind), requires_grad=False)
    layer.bias = nn.Parameter(torch.empty(0) if bias is None else bias.to(kind), requires_grad=False)
    if bias is None:
        layer.register_parameter("bias", None)
    return layer


def compiled(module: nn.Module, *examples: Tensor) -> torch.jit.ScriptModule:
    """Make a module one TorchScript call, and run it on one and two rows until TorchScript has settled."""
    with quietly(), torch.no_grad():
        call = cast(torch.jit.ScriptModule, torch.jit.freeze(torch.jit.trace(module.eval(), examples)))
        for rows in (1, 1, 1, 2, 2, 2):
            call(*(example[:rows] for example in examples))
    return call


def fastest(what: str, build: Callable[[str], Callable[[], object]]) -> str:
    """Time what `build` makes for each type, and name the fastest; the next process hears the same.

    what: names heads and what they draft. A choice made anew each time would let runs that are to be repeated differ.
    """
    key = f"{what} {torch.__version__} {torch.get_num_threads()} {platform.node()} {platform.processor()}"
    if (known := recall("draft_types").get(key)) in TYPES:
        return str(known)
    times = {}
    for dtype in TYPES:
        try:
            call = build(dtype)
        except RuntimeError:  # this processor or this build of torch has no such kernels
            continue
        runs = []
        for _ in range(10):
            start = perf_counter()
            call()
            runs.append(perf_counter() - start)
        times[dtype] = min(runs)
    best = min(times, key=lambda dtype: times[dtype])
    remember("draft_types", key, best)
    return best


@contextmanager
def quietly() -> Iterator[None]:
    """Hide torch's notes that TorchScript and quantized tensors will go one day; its version is pinned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
