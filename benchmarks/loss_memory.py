"""What does the chunked loss cost against materialised logits, and is it equal?

    python benchmarks/loss_memory.py [--rows 512] [--dim 2048] [--vocab 128256] [--runs 5] [--own]

Forward and backward in turn, in one process, W frozen (trained with --own). Memory: the most that
the process (or the GPU) held during a run above what it held before, with inputs and W already
there; on CPUs that is resident memory, which says little below 100 MB. The goals, for f32 on CPUs
and bf16 on CUDA: memory ≤ 0.25, speed ≥ 0.8, loss and gradients within 1e-4; exit status 1 where
one is missed. Writes JSON to benchmarks/results/loss_memory.json. Knows no base model.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import click  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from model.heads.losses import linear_cross_entropy  # noqa: E402

GOALS = {"memory_ratio": 0.25, "speed_ratio": 0.8, "error": 1e-4}
LARGE_HEADS, LARGE_TOKENS = 5, 8192
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def materialised(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the loss as it is usually computed."""
    return F.cross_entropy(hidden @ weight.T, targets)


def upcast(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return that loss with fp32 sums, against which equality is measured.

    A bf16 sum itself is off by 0.4 %.
    """
    return F.cross_entropy((hidden @ weight.T).float(), targets)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return ours."""
    return linear_cross_entropy(hidden, weight, targets) / len(hidden)


class Run(NamedTuple):
    """What a forward and a backward pass gave. values: the loss and its gradients."""

    values: list[Tensor]
    seconds: float
    held_bytes: int


def run(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> Run:
    """Run forward and backward."""
    inputs = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
    before = held(reset=True)
    began = perf_counter()
    value = loss(hidden, weight, targets)
    gradients = torch.autograd.grad(value, inputs)
    if hidden.is_cuda:
        torch.cuda.synchronize()
    seconds = perf_counter() - began
    return Run([value.detach(), *gradients], seconds, held() - before)


def held(reset: bool = False) -> int:
    """Return the bytes held at most since the last reset; at a reset, the bytes held now."""
    if torch.cuda.is_available():
        if reset:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts again from VmRSS
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(
    dtype: torch.dtype, rows: int, dim: int, vocab: int, runs: int, own: bool
) -> dict[str, Any]:
    """Compare the two in one type."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden = torch.randn(rows, dim, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocab, dim, device=device, dtype=dtype) * dim**-0.5).requires_grad_(own)
    targets = torch.randint(vocab, (rows,), device=device)
    seconds: dict[Loss, list[float]] = {materialised: [], chunked: []}
    memory: dict[Loss, int] = {materialised: 0, chunked: 0}
    for i in range(runs + 1):  # the first one warms up
        for loss in seconds:
            each = run(loss, hidden, weight, targets)
            memory[loss] = max(memory[loss], each.held_bytes)
            if i:
                seconds[loss].append(each.seconds)
    ours = run(chunked, hidden, weight, targets).values
    theirs = run(upcast, hidden, weight, targets).values
    errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
    larger = LARGE_HEADS * LARGE_TOKENS / rows
    materialised_mb = memory[materialised] / 1e6
    chunked_mb = memory[chunked] / 1e6
    gradients_mb = rows * dim * dtype.itemsize / 1e6  # all of ours that grows with the rows
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "materialised": {"mb": materialised_mb, "seconds": median(seconds[materialised])},
        "chunked": {"mb": chunked_mb, "seconds": median(seconds[chunked])},
        "memory_ratio": memory[chunked] / memory[materialised],
        "speed_ratio": median(seconds[materialised]) / median(seconds[chunked]),
        "loss_error": errors[0],
        "gradient_errors": errors[1:],
        f"computed_mb_{LARGE_HEADS}_heads_{LARGE_TOKENS}_tokens": {
            "materialised": materialised_mb * larger,
            "chunked": chunked_mb + gradients_mb * (larger - 1),
        },
    }


def relative_error(a: Tensor, b: Tensor) -> float:
    """Return how far a is from b, by their norms."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def describe(result: dict[str, Any]) -> str:
    """Return a result as a line of text."""
    errors = [result["loss_error"], *result["gradient_errors"]]
    return (
        f"{result['dtype']:9}  memory {result['chunked']['mb']:.0f} / "
        f"{result['materialised']['mb']:.0f} MB = {result['memory_ratio']:.3f}   "
        f"speed {result['speed_ratio']:.2f}   errors of loss and gradients "
        + ", ".join(f"{error:.1e}" for error in errors)
    )


@click.command()
@click.option("--rows", default=512)
@click.option("--dim", default=2048)
@click.option("--vocab", default=128256)
@click.option("--runs", default=5)
@click.option("--own", is_flag=True, help="W is trained too.")
@click.option(
    "--out",
    "--json",
    "out",
    type=click.Path(path_type=Path),
    default=ROOT / "benchmarks" / "results" / "loss_memory.json",
)
def main(rows: int, dim: int, vocab: int, runs: int, own: bool, out: Path) -> None:
    """Measure, print and write JSON."""
    f32 = measure(torch.float32, rows, dim, vocab, runs, own)
    bf16 = measure(torch.bfloat16, rows, dim, vocab, runs, own)
    on_gpu = torch.cuda.is_available()
    counted = bf16 if on_gpu else f32
    passed = (
        counted["memory_ratio"] <= GOALS["memory_ratio"]
        and counted["speed_ratio"] >= GOALS["speed_ratio"]
        and max(counted["loss_error"], *counted["gradient_errors"]) <= GOALS["error"]
    )
    report = {
        "command": " ".join(["python", "benchmarks/loss_memory.py", *sys.argv[1:]]),
        "shape": {"rows": rows, "dim": dim, "vocab": vocab, "own": own},
        "goals": GOALS,
        "passed": passed,
        "results": [f32, bf16],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "cpu",
        "python": platform.python_version(),
    }
    click.echo(describe(f32))
    click.echo(describe(bf16))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    click.echo(f"{'all goals met' if passed else 'A GOAL WAS MISSED'}; {out}")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
