"""Layers made fast for drafting: the quickest type on this machine, and modules as single calls.

int8 changes now and then which token is drafted, never which is emitted. Knows nothing of heads.

This is the one file that uses what torch has declared deprecated: TorchScript (`torch.jit`) and
quantized tensors (`torch.quantize_per_channel`). The exit is in place: where a torch lacks one or
both, modules are plain ones and types are bf16 or f32, and nothing else changes. It is not taken
while they exist: without TorchScript drafting takes 1.5 to 1.65 times as long with the bundled
heads (1.0 to 1.2 at D=2,048), without int8 1.35 to 1.65 times (4 to 8 at D=2,048, 4 with a draft
vocabulary), and torch.compile 2.0 to 2.6 times, a C++ compiler and 4 to 16 s at start
(benchmarks/results/NOTES.md).
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from model.storage.facts import recall, remember, this_machine

DType = Literal["auto", "f32", "bf16", "int8"]
TYPES = ("int8", "bf16", "f32")
Call = Callable[..., Tensor]
TIMED_RUNS = 10  # of each type, of which the fastest counts


class PerHead(nn.Module):
    """One layer where each head reads its own rows: (B,K,D) -> (B,K,H).

    weight: (K,H,D), bias: (K,H) or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: str) -> None:
        super().__init__()
        biases = [None] * len(weight) if bias is None else list(bias)
        self.heads = nn.ModuleList(
            linear(head_weight, head_bias, dtype)
            for head_weight, head_bias in zip(weight, biases, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Run all heads' layers."""
        return torch.stack([head(x[:, k]) for k, head in enumerate(self.heads)], 1)


class _Int8Linear(nn.Module):
    """A linear layer in int8: (*,D) -> (*,H), both f32.

    Weights have a scale per row, inputs are quantized as they come.
    Raises RuntimeError where torch has no quantized tensors, or no kernels for this processor.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        if not hasattr(torch, "quantize_per_channel"):
            raise RuntimeError(f"torch {torch.__version__} has no quantized tensors")
        scales = weight.abs().amax(1).clamp_min(1e-12) / 127  # a row of zeros has no scale
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        with _without_warnings():
            quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(quantized, bias)
        # Without VNNI, sums of 8 × 8 bits overflow, so inputs get 7.
        self.narrow = not torch.cpu.get_capabilities().get("avx512_vnni", False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.quantized.linear_dynamic(x, self.packed, self.narrow))


def linear(weight: Tensor, bias: Tensor | None, dtype: str) -> nn.Module:
    """Make a frozen linear layer of a type: weight (H,D), bias (H,) or None.

    Raises RuntimeError where torch has no such kernels here.
    """
    if dtype == "int8":
        return _Int8Linear(weight.float(), None if bias is None else bias.float())
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.to(kind), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(kind), requires_grad=False)
    return layer


def compiled(module: nn.Module, *examples: Tensor) -> Call:
    """Make a module one TorchScript call, or a plain one where torch has no TorchScript.

    examples: inputs of two rows at the least. The call is run on one and two of them until
    TorchScript has settled.
    """
    module.eval()
    if not hasattr(getattr(torch, "jit", None), "trace"):
        return torch.inference_mode()(module.forward)
    with _without_warnings(), torch.no_grad():
        call: Any = torch.jit.freeze(torch.jit.trace(module, examples, check_trace=False))
        for rows in (1, 1, 1, 2, 2, 2):
            call(*(example[:rows] for example in examples))
    return cast(Call, call)


def fastest(what: str, build: Callable[[str], Callable[[], object]]) -> str:
    """Time what `build` makes for each type, and name the fastest.

    what: names the heads and what they draft. The answer is remembered, so that the next process
    gets the same: a choice made anew each time would let runs that are to be repeated differ.
    """
    machine = f"{torch.get_num_threads()} {this_machine()}"
    key = f"{what} {torch.__version__} {machine}"
    known = recall("draft_types").get(key)
    if known in TYPES:
        return str(known)
    times: dict[str, float] = {}
    for dtype in TYPES:
        try:
            call = build(dtype)
        except RuntimeError:  # this processor or this build of torch has no such kernels
            continue
        times[dtype] = min(_seconds(call) for _ in range(TIMED_RUNS))
    best = min(times, key=lambda dtype: times[dtype])
    remember("draft_types", key, best)
    return best


def _seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide torch's notes that TorchScript and quantized tensors will go one day."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
