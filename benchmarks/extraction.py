"""How fast are states extracted to disk, against decoding the same batches without outputs?

    python benchmarks/extraction.py [--model FILE.gguf] [--tokens N] [--runs N] [--max_length N]

One process, the two in turn, medians; a third way, with the LM head over every row, is what
extraction was before it stopped the graph. Writes JSON to benchmarks/results/extraction.json. The
goal is ≥ 0.97. Knows no heads.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

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
from model.base.state_reader import StateReader  # noqa: E402
from model.training.data.documents import read_documents  # noqa: E402
from model.training.data.samples import Sample, make_samples  # noqa: E402
from model.training.states.cached_states import cached_states  # noqa: E402
from model.training.states.extraction import open_base, pack  # noqa: E402
from model.training.states.manifest import CacheKey  # noqa: E402


def decoding_seconds(base: LlamaBase, samples: list[Sample], *, outputs: bool) -> float:
    """Decode the samples in the same batches, with outputs for every token or none."""
    began = perf_counter()
    base.clear()
    for batch in pack([sample.tokens for sample in samples], base.n_batch, base.n_seq_max):
        base.decode(batch.tokens, batch.pos, batch.seq, outputs=outputs)
        if outputs:
            base.hidden(len(batch.tokens))
        for seq_id in batch.finished:
            base.seq_rm(seq_id, -1, -1)
    return perf_counter() - began


def extraction_seconds(
    base: LlamaBase, samples: list[Sample], dim: int, max_length: int, dtype: str
) -> float:
    """Extract the samples' states into a new cache, written, hashed and synced; return seconds."""
    key = CacheKey(
        base_fingerprint="", tokenizer="", data_sha256="", max_length=max_length, dtype=dtype
    )
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        began = perf_counter()
        cached_states(lambda: contextlib.nullcontext(base), dim, samples, Path(folder), key)
        return perf_counter() - began


@click.command()
@click.option(
    "--model", "path", type=click.Path(path_type=Path), help="A GGUF file; default: MODEL_PATH."
)
@click.option("--tokens", default=20_000, show_default=True, help="Tokens per run.")
@click.option("--runs", default=7, show_default=True, help="Runs of each.")
@click.option("--max_length", default=1024, show_default=True, help="Tokens per sequence.")
@click.option(
    "--cache_dtype", type=click.Choice(["fp16", "fp8"]), default="fp16", show_default=True
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=ROOT / "benchmarks" / "results" / "extraction.json",
)
def main(
    path: Path | None, tokens: int, runs: int, max_length: int, cache_dtype: str, out: Path
) -> None:
    """Measure extraction against plain decoding."""
    settings = Settings.load()
    file = GGUFFile(path or settings.model_path)
    model = LlamaModel(file.path, n_gpu_layers=settings.n_gpu_layers)
    length = min(max_length, file.context_length)
    samples = make_samples(read_documents(""), model, ChatTemplate(None), length, tokens)
    reader = open_base(model, max_length, settings.n_threads)
    options: dict[str, Any] = {
        "n_ctx": reader.n_ctx,
        "n_threads": settings.n_threads,
        "n_seq_max": reader.n_seq_max,
        "n_batch": reader.n_batch,
    }
    without = LlamaBase(model, **options)
    with_lm_head = LlamaBase(model, embeddings=True, **options)

    # In turn; the order changes from run to run, and the first one warms up.
    plain = list[float]()
    extraction = list[float]()
    lm_head = list[float]()
    for run in range(runs + 1):
        if run % 2:
            plain.append(decoding_seconds(without, samples, outputs=False))
        extraction.append(extraction_seconds(reader, samples, file.n_embd, max_length, cache_dtype))
        if not run % 2:
            plain.append(decoding_seconds(without, samples, outputs=False))
        lm_head.append(decoding_seconds(with_lm_head, samples, outputs=True))
    del plain[0], extraction[0], lm_head[0]

    n_tokens = sum(len(sample.tokens) for sample in samples)
    ratios = [p / e for p, e in zip(plain, extraction, strict=True)]
    plain_rate = n_tokens / median(plain)
    extraction_rate = n_tokens / median(extraction)
    result = {
        "command": " ".join(["python", "benchmarks/extraction.py", *sys.argv[1:]]),
        "model": file.name,
        "file_type": file.file_type,
        "tokens": n_tokens,
        "cache_dtype": cache_dtype,
        "max_length": max_length,
        "threads": settings.n_threads,
        "runs": runs,
        "plain_tokens_per_s": round(plain_rate, 1),
        "extraction_tokens_per_s": round(extraction_rate, 1),
        "with_lm_head_tokens_per_s": round(n_tokens / median(lm_head), 1),
        "stops_before_lm_head": isinstance(reader, StateReader),
        "ratio": round(median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "versions": {"llama_cpp_python": llama_cpp.__version__, "numpy": np.__version__},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo(
        f"plain {plain_rate:,.0f} tokens/s, extraction {extraction_rate:,.0f}: "
        f"{result['ratio']} of plain; with the LM head {result['with_lm_head_tokens_per_s']:,.0f}"
    )
    for base in (reader, without, with_lm_head):
        base.close()
    model.close()


if __name__ == "__main__":
    main()
