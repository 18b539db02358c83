"""What a chunk of a prompt costs in a batch of its own and beside running texts' rows, in turn, in one process.

    python benchmarks/prompts_beside.py --type q4_0      # scale_up.py's: 1 B parameters; without: the bundled model

With states wanted, every row is an output, those of the prompt too, and pays the LM head; without, the last row alone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
    sys.path[0] = str(ROOT)

import click  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.scale_up import BUNDLED, build  # noqa: E402
from config import Settings  # noqa: E402
from model.base.llama import LlamaBase  # noqa: E402
from model.base.llama_model import LlamaModel  # noqa: E402

CONTEXT = 256  # tokens of each running text, and of the prompt before the chunk


@click.command()
@click.option("--type", "kind", default="", help="Of scale_up.py's model; without: the bundled one.")
@click.option("--texts", default="1,4", show_default=True, help="Running texts, with commas.")
@click.option("--chunks", default="16,64,256", show_default=True, help="Prompt tokens, with commas.")
@click.option("--rounds", default=5, show_default=True)
def main(kind: str, texts: str, chunks: str, rounds: int) -> None:
    """Print medians in milliseconds; above 1 the chunk is cheaper beside the texts."""
    model = LlamaModel(build("1b", kind.upper()).model if kind else BUNDLED)
    rng = np.random.default_rng(0)
    counts, sizes = ([int(n) for n in each.split(",")] for each in (texts, chunks))
    click.echo("| texts | chunk | states | apart | together | apart / together |\n" + "|---" * 6 + "|")
    most = max(counts)
    with LlamaBase(
        model, n_ctx=(most + 2) * (CONTEXT + max(sizes)), n_threads=Settings.load().n_threads,
        n_seq_max=most + 1, embeddings=True,
    ) as base:  # fmt: skip
        tokens = rng.integers(3, base.n_vocab, CONTEXT + max(sizes) + 1).astype(np.int32)
        for seq in range(most + 1):
            base.prefill(tokens[:CONTEXT], 0, seq)

        def timed(*batches: tuple[int, int]) -> float:
            """Decode batches of so many texts' rows and so many prompt tokens; return the seconds."""
            since = perf_counter()
            for rows, chunk in batches:
                seqs = np.concatenate([np.zeros(chunk, np.int32), np.arange(1, rows + 1, dtype=np.int32)])
                positions = np.concatenate([np.arange(chunk), np.zeros(rows)]).astype(np.int32) + CONTEXT
                base.want_states(states and rows > 0)
                base.decode(tokens[: chunk + rows], positions, seqs, outputs=None if rows else False)
                if rows:
                    base.logits(1)
            took = perf_counter() - since
            base.seq_rm(-1, CONTEXT, -1)
            return took

        for rows in counts:
            for chunk in sizes:
                for states in (True, False):
                    turns = [(timed((0, chunk), (rows, 0)), timed((rows, chunk))) for _ in range(rounds + 1)][1:]
                    apart, together = (median(times) for times in zip(*turns, strict=True))
                    ratio = median(a / t for a, t in turns)
                    figures = f"{1e3 * apart:.1f} | {1e3 * together:.1f} | {ratio:.2f}"
                    click.echo(f"| {rows} | {chunk} | {'yes' if states else 'no'} | {figures} |")


if __name__ == "__main__":
    main()
