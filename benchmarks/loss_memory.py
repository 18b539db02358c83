"""What does the chunked loss cost in memory and time against materialised logits, and is it equal?

    python benchmarks/loss_memory.py [--rows 512] [--dim 2048] [--vocab 128256] [--runs 5] [--own]

Forward and backward in turn, in one process, W frozen (trained with --own). Memory: the most that the process (or the
GPU) held during a run above what it held before, with inputs and W already there; on CPUs that is resident memory,
which says little below 100 MB. The goals, for f32 on CPUs and bf16 on CUDA: memory ≤ 0.25, speed ≥ 0.8, loss and
gradients within 1e-4; exit status 1 where one is missed. Writes JSON to benchmarks/results/loss_memory.json.
"""

import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

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
    """Give the ordinary way's loss."""
    return F.cross_entropy(hidden @ weight.T, targets)


def upcast(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Do so with fp32 sums: what equality is held against, as a bf16 sum itself is off by 0.4 %."""
    return F.cross_entropy((hidden @ weight.T).float(), targets)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Give ours."""
    return linear_cross_entropy(hidden, weight, targets) / len(hidden)


def run(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[list[Tensor], float, int]:
    """Run forward and backward; return [loss, gradients …], seconds and bytes."""
    inputs = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
    before = held(reset=True)
    start = time.perf_counter()
    value = loss(hidden, weight, targets)
    gradients = torch.autograd.grad(value, inputs)
    if hidden.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return [value.detach(), *gradients], seconds, held() - before


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


def measure(dtype: torch.dtype, rows: int, dim: int, vocab: int, runs: int, own: bool) -> dict[str, Any]:
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
            _, time_taken, bytes_held = run(loss, hidden, weight, targets)
            memory[loss] = max(memory[loss], bytes_held)
            if i:
                seconds[loss].append(time_taken)
    ours = run(chunked, hidden, weight, targets)[0]
    theirs = run(upcast, hidden, weight, targets)[0]
    errors = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(ours, theirs, strict=True)]
    large = LARGE_HEADS * LARGE_TOKENS
    gradients = rows * dim * dtype.itemsize  # the only part of ours that grows with the rows
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "materialised": {"mb": memory[materialised] / 1e6, "seconds": median(seconds[materialised])},
        "chunked": {"mb": memory[chunked] / 1e6, "seconds": median(seconds[chunked])},
        "memory_ratio": memory[chunked] / memory[materialised],
        "speed_ratio": median(seconds[materialised]) / median(seconds[chunked]),
        "loss_error": errors[0],
        "gradient_errors": errors[1:],
        f"computed_mb_{LARGE_HEADS}_heads_{LARGE_TOKENS}_tokens": {
            "materialised": memory[materialised] / 1e6 * large / rows,
            "chunked": (memory[chunked] + gradients * (large / rows - 1)) / 1e6,
        },
    }


@click.command()
@click.option("--rows", default=512)
@click.option("--dim", default=2048)
@click.option("--vocab", default=128256)
@click.option("--runs", default=5)
@click.option("--own", is_flag=True, help="W is trained too.")
@click.option("--json", "out", type=click.Path(path_type=Path), default=ROOT / "benchmarks/results/loss_memory.json")
def main(rows: int, dim: int, vocab: int, runs: int, own: bool, out: Path) -> None:
    """Measure, print and write JSON."""
    results = [measure(dtype, rows, dim, vocab, runs, own) for dtype in (torch.float32, torch.bfloat16)]
    counted = results[1 if torch.cuda.is_available() else 0]
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
        "results": results,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "python": platform.python_version(),
    }
    for result in results:
        errors = ", ".join(f"{error:.1e}" for error in [result["loss_error"], *result["gradient_errors"]])
        print(
            f"{result['dtype']:9}  memory {result['chunked']['mb']:.0f} / {result['materialised']['mb']:.0f} MB ="
            f" {result['memory_ratio']:.3f}   speed {result['speed_ratio']:.2f}   errors of loss and gradients {errors}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{'all goals met' if passed else 'A GOAL WAS MISSED'}; {out}")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
