"""How fast are states extracted to disk, against decoding the same batches with all logits and no embeddings?

    python benchmarks/extraction.py [--model FILE.gguf] [--tokens N] [--runs N] [--max_length N]

One process, the two in turn, medians; writes JSON to benchmarks/results/extraction.json. The goal is ≥ 0.95.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
    sys.path[0] = str(ROOT)

import click  # noqa: E402
import llama_cpp  # noqa: E402
import numpy as np  # noqa: E402

from config import Settings  # noqa: E402
from model.base.chat import ChatTemplate  # noqa: E402
from model.base.gguf_file import GGUFFile  # noqa: E402
from model.base.llama import LlamaBase  # noqa: E402
from model.base.llama_model import LlamaModel  # noqa: E402
from model.training.documents import read_documents  # noqa: E402
from model.training.extraction import open_base, pack  # noqa: E402
from model.training.states import CacheKey, cached_states  # noqa: E402
from model.training.text import Sample, make_samples  # noqa: E402


def plain(base: LlamaBase, samples: list[Sample]) -> float:
    """Decode the samples in the same batches, with logits for every token; return seconds."""
    start = time.perf_counter()
    base.clear()
    for batch in pack([sample.tokens for sample in samples], base.n_batch, base.n_seq_max):
        base.decode(batch.tokens, batch.pos, batch.seq, outputs=True)
        base.logits(len(batch.tokens))
        for seq in batch.finished:
            base.seq_rm(seq, -1, -1)
    return time.perf_counter() - start


def extraction(base: LlamaBase, samples: list[Sample], dim: int, max_length: int, dtype: str) -> float:
    """Extract the samples' states into a new cache, written, hashed and synced; return seconds."""
    key = CacheKey("", "", "", max_length, dtype)
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        start = time.perf_counter()
        cached_states(lambda: contextlib.nullcontext(base), dim, samples, Path(folder), key)
        return time.perf_counter() - start


@click.command()
@click.option("--model", "path", type=click.Path(path_type=Path), help="A GGUF file; default: MODEL_PATH.")
@click.option("--tokens", default=20_000, show_default=True, help="Tokens per run.")
@click.option("--runs", default=7, show_default=True, help="Runs of each.")
@click.option("--max_length", default=1024, show_default=True, help="Tokens per sequence.")
@click.option("--cache_dtype", type=click.Choice(["fp16", "fp8"]), default="fp16", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "benchmarks" / "results" / "extraction.json")
def main(path: Path | None, tokens: int, runs: int, max_length: int, cache_dtype: str, out: Path) -> None:
    """Measure extraction against plain decoding."""
    settings = Settings.load()
    file = GGUFFile(path or settings.model_path)
    model = LlamaModel(file.path, n_gpu_layers=settings.n_gpu_layers)
    samples = make_samples(read_documents(""), model, ChatTemplate(None), min(max_length, file.context_length), tokens)
    with_states, without = (open_base(model, max_length, settings.n_threads, embeddings=e) for e in (True, False))
    seconds: dict[str, list[float]] = {"plain": [], "extraction": []}
    for run in range(runs + 1):  # the first warms up
        measured = {
            "plain": lambda: plain(without, samples),
            "extraction": lambda: extraction(with_states, samples, file.n_embd, max_length, cache_dtype),
        }
        for name in sorted(measured, reverse=bool(run % 2)):
            taken = measured[name]()
            if run:
                seconds[name].append(taken)
    n_tokens = sum(len(sample.tokens) for sample in samples)
    speed = {name: n_tokens / statistics.median(values) for name, values in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["extraction"], strict=True)]
    result = {
        "command": " ".join(["python", "benchmarks/extraction.py", *sys.argv[1:]]),
        "model": file.name, "file_type": file.file_type, "tokens": n_tokens, "cache_dtype": cache_dtype,
        "max_length": max_length, "threads": settings.n_threads, "runs": runs,
        "plain_tokens_per_s": round(speed["plain"], 1), "extraction_tokens_per_s": round(speed["extraction"], 1),
        "ratio": round(float(np.median(ratios)), 4), "ratios": [round(ratio, 4) for ratio in ratios],
        "versions": {"llama_cpp_python": llama_cpp.__version__, "numpy": np.__version__},
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo(
        f"plain {speed['plain']:,.0f} tokens/s, extraction {speed['extraction']:,.0f}: {result['ratio']} of plain"
    )
    for base in (with_states, without):
        base.close()
    model.close()


if __name__ == "__main__":
    main()
