"""What does a draft cost, from a numpy row to ranked tokens, by type, threads and shape?

    python benchmarks/draft_cost.py [--head_type hydra] [--runs N] [--threads 1 --threads 2] [--shape small]

Random weights (cost doesn't depend on them); medians and the best tenth. One type after another, not row by row in
turn: a step uses one type only, whose weights stay in the cache. Run it on a quiet machine. The goals, with the best
type and thread count: ≤ 70 µs at D=320, V=4,096, 3 heads; ≤ 2,500 µs at D=2,048, V=32,000, and about 400 with a draft
vocabulary. Writes JSON to benchmarks/results/draft_cost.json.
"""

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
    sys.path[0] = str(ROOT)

import click  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from model.heads.fast import DType  # noqa: E402
from model.heads.hydra import HydraHeads  # noqa: E402
from model.heads.hydra_drafter import drafter_for  # noqa: E402
from model.heads.medusa import HeadsConfig, MedusaHeads  # noqa: E402
from model.trees.tree import Tree  # noqa: E402

HEADS = 3
# D, V, draft vocabulary, rows drafted at once, ranks
SHAPES = {
    "small": (320, 4096, 0, 1, 1),
    "small, 4 ranks": (320, 4096, 0, 1, 4),
    "small, 8 rows": (320, 4096, 0, 8, 1),
    "large": (2048, 32000, 0, 1, 1),
    "large, draft vocabulary 4,096": (2048, 32000, 4096, 1, 1),
}


def random_heads(head_type: str, dim: int, vocab: int) -> MedusaHeads:
    """Return heads of a type with random weights."""
    torch.manual_seed(0)
    lm_head, config = torch.randn(vocab, dim) * dim**-0.5, HeadsConfig(HEADS, dim, vocab)
    heads = HydraHeads(config, lm_head, lm_head) if head_type == "hydra" else MedusaHeads(config, lm_head)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, 0, dim**-0.5)
    return heads


def measure(name: str, head_type: str, threads: int, runs: int) -> dict[str, Any]:
    """Time all types at one shape, drafting a chain (with siblings for the first token where there are ranks)."""
    dim, vocab, draft_vocab, rows, ranks = SHAPES[name]
    heads, tree = (
        random_heads(head_type, dim, vocab),
        Tree([*Tree.chain(HEADS).paths, *((r,) for r in range(1, ranks))]),
    )
    counts = np.arange(vocab, dtype=np.int32)
    drafters = {}
    for dtype in get_args(DType):
        start = time.perf_counter()
        vocabulary: dict[str, Any] = {"draft_vocab": draft_vocab, "token_counts": counts}
        drafter = drafter_for(heads, n_heads=HEADS, ranks=ranks, dtype=dtype, n_threads=threads, **vocabulary)
        drafters[dtype] = (drafter, time.perf_counter() - start)
    states = np.random.default_rng(0).standard_normal((runs, rows, dim), np.float32)
    times: dict[str, list[float]] = {dtype: [] for dtype in drafters}
    for dtype, (drafter, _) in drafters.items():
        for i in range(-min(runs, 20), runs):  # those below zero warm up
            start = time.perf_counter()
            drafter.draft(states[i], [0] * rows, [tree] * rows)
            if i >= 0:
                times[dtype].append((time.perf_counter() - start) * 1e6)
    return {
        "shape": name,
        "head_type": head_type,
        "threads": threads,
        "auto_chose": drafters["auto"][0].dtype,
        "auto_build_ms": drafters["auto"][1] * 1e3,
        "median_us": {dtype: float(np.median(values)) for dtype, values in times.items()},
        "tenth_us": {dtype: float(np.quantile(values, 0.1)) for dtype, values in times.items()},
    }


@click.command()
@click.option("--head_type", default="medusa", type=click.Choice(["medusa", "hydra"]))
@click.option("--runs", default=500)
@click.option("--threads", multiple=True, default=[1, 2])
@click.option("--shape", "shapes", multiple=True, type=click.Choice(list(SHAPES)), default=list(SHAPES))
@click.option("--json", "out", type=click.Path(path_type=Path), default=ROOT / "benchmarks/results/draft_cost.json")
def main(head_type: str, runs: int, threads: tuple[int, ...], shapes: tuple[str, ...], out: Path) -> None:
    """Measure, print and write JSON."""
    results = [measure(name, head_type, count, runs) for name in shapes for count in threads]
    report = {
        "command": " ".join(["python", "benchmarks/draft_cost.py", *sys.argv[1:]]),
        "heads": HEADS,
        "results": results,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    for result in results:
        medians = "  ".join(f"{dtype} {value:8.1f}" for dtype, value in result["median_us"].items())
        print(f"{result['shape']:30} {result['threads']} thread(s)  {medians} µs  (auto chose {result['auto_chose']})")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main()
