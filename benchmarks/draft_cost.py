"""What does a draft cost, from a numpy row to ranked tokens, by type, threads and shape?

    python benchmarks/draft_cost.py [--head_type hydra] [--runs N] [--threads 1] [--shape small]

Random weights (cost doesn't depend on them); medians and the best tenth. One type after another,
not row by row in turn: a step uses one type only, whose weights stay in the cache. Run it on a
quiet machine. The goals, with the best type and thread count: ≤ 70 µs at D=320, V=4,096, 3 heads;
≤ 2,500 µs at D=2,048, V=32,000, and about 400 with a draft vocabulary. Writes JSON to
benchmarks/results/draft_cost.json. Knows no base model.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, get_args

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
    sys.path[0] = str(ROOT)

import click  # noqa: E402
import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402
import torch  # noqa: E402

from model.decoding.drafters.drafter import TreeDrafter  # noqa: E402
from model.heads.fast import DType  # noqa: E402
from model.heads.hydra import HydraHeads  # noqa: E402
from model.heads.hydra_drafter import drafter_for  # noqa: E402
from model.heads.medusa import HeadsConfig, MedusaHeads  # noqa: E402
from model.trees.tree import Tree  # noqa: E402

HEADS = 3
WARM_UP_RUNS = 20


class Shape(NamedTuple):
    """What is drafted. draft_vocab: 0: all tokens. rows: sequences that are drafted for at once."""

    dim: int
    vocab: int
    draft_vocab: int
    rows: int
    ranks: int


SHAPES = {
    "small": Shape(320, 4096, 0, 1, 1),
    "small, 4 ranks": Shape(320, 4096, 0, 1, 4),
    "small, 8 rows": Shape(320, 4096, 0, 8, 1),
    "large": Shape(2048, 32000, 0, 1, 1),
    "large, draft vocabulary 4,096": Shape(2048, 32000, 4096, 1, 1),
}


def random_heads(head_type: str, dim: int, vocab: int) -> MedusaHeads:
    """Return heads of a type with random weights."""
    torch.manual_seed(0)
    lm_head = torch.randn(vocab, dim) * dim**-0.5
    config = HeadsConfig(k_heads=HEADS, dim=dim, vocab=vocab)
    heads = MedusaHeads(config, lm_head)
    if head_type == "hydra":
        heads = HydraHeads(config, lm_head, lm_head)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, 0, dim**-0.5)
    return heads


def measure(name: str, head_type: str, threads: int, runs: int) -> dict[str, Any]:
    """Time all types at one shape, drafting a chain, with siblings at depth 1 for further ranks."""
    shape = SHAPES[name]
    heads = random_heads(head_type, shape.dim, shape.vocab)
    siblings = [(rank,) for rank in range(1, shape.ranks)]
    tree = Tree([*Tree.chain(HEADS).paths, *siblings])
    drafters = {}
    build_s = {}
    for dtype in get_args(DType):
        began = perf_counter()
        drafters[dtype] = drafter_for(
            heads,
            n_heads=HEADS,
            ranks=shape.ranks,
            dtype=dtype,
            n_threads=threads,
            draft_vocab=shape.draft_vocab,
            token_counts=np.arange(shape.vocab, dtype=np.int32),
        )
        build_s[dtype] = perf_counter() - began
    rng = np.random.default_rng(0)
    states = rng.standard_normal((runs, shape.rows, shape.dim), np.float32)
    times = {dtype: draft_us(drafter, states, tree) for dtype, drafter in drafters.items()}
    return {
        "shape": name,
        "head_type": head_type,
        "threads": threads,
        "auto_chose": drafters["auto"].dtype,
        "auto_build_ms": build_s["auto"] * 1e3,
        "median_us": {dtype: float(np.median(values)) for dtype, values in times.items()},
        "tenth_us": {dtype: float(np.quantile(values, 0.1)) for dtype, values in times.items()},
    }


def draft_us(drafter: TreeDrafter, states: npt.NDArray[np.float32], tree: Tree) -> list[float]:
    """Return the microseconds of each draft, from states (runs, rows, D)."""
    runs, rows, _ = states.shape
    for i in range(min(runs, WARM_UP_RUNS)):
        drafter.draft(states[i], [0] * rows, [tree] * rows)
    times = list[float]()
    for hidden in states:
        began = perf_counter()
        drafter.draft(hidden, [0] * rows, [tree] * rows)
        times.append((perf_counter() - began) * 1e6)
    return times


def describe(result: dict[str, Any]) -> str:
    """Return a result as a line of text."""
    medians = "  ".join(f"{dtype} {us:8.1f}" for dtype, us in result["median_us"].items())
    return (
        f"{result['shape']:30} {result['threads']} thread(s)  {medians} µs  "
        f"(auto chose {result['auto_chose']})"
    )


@click.command()
@click.option("--head_type", default="medusa", type=click.Choice(["medusa", "hydra"]))
@click.option("--runs", default=500)
@click.option("--threads", multiple=True, default=[1, 2])
@click.option(
    "--shape", "shapes", multiple=True, type=click.Choice(list(SHAPES)), default=list(SHAPES)
)
@click.option(
    "--out",
    "--json",
    "out",
    type=click.Path(path_type=Path),
    default=ROOT / "benchmarks" / "results" / "draft_cost.json",
)
def main(
    head_type: str, runs: int, threads: tuple[int, ...], shapes: tuple[str, ...], out: Path
) -> None:
    """Measure, print and write JSON."""
    results = list[dict[str, Any]]()
    for name in shapes:
        for count in threads:
            results.append(measure(name, head_type, count, runs))
            click.echo(describe(results[-1]))
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
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    click.echo(out)


if __name__ == "__main__":
    main()
