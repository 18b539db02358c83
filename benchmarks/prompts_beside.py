"""What does a chunk of a prompt cost beside running sequences' rows, against a batch of its own?

    python benchmarks/prompts_beside.py --type q4_0      # 1 B parameters (scale_up.py)

Without --type it takes the bundled model. Both ways in turn, in one process. With states wanted,
every row is an output, those of the prompt too, and pays the LM head; without, the last row alone.
Knows no heads and no scheduler.
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

from config import Settings  # noqa: E402
from model.base.known_models import BUNDLED  # noqa: E402
from model.base.llama import LlamaBase  # noqa: E402
from model.base.llama_model import LlamaModel  # noqa: E402
from model.evaluation.scaled_model import build  # noqa: E402

CONTEXT = 256  # tokens of each running sequence, and of the prompt before the chunk


class Batches:
    """Decodes batches over sequences of CONTEXT tokens each, and takes them back.

    base: its sequence ids are the prompt's, 0, and one for each running sequence.
    """

    def __init__(self, base: LlamaBase, max_chunk: int) -> None:
        self._base = base
        n_tokens = CONTEXT + max_chunk + base.n_seq_max
        rng = np.random.default_rng(0)
        self._tokens = rng.integers(3, base.n_vocab, n_tokens).astype(np.int32)
        for seq_id in range(base.n_seq_max):
            base.prefill(self._tokens[:CONTEXT], 0, seq_id)

    def seconds(self, *batches: tuple[int, int], states: bool) -> float:
        """Return the seconds of batches of so many sequences' rows and so many prompt tokens.

        states: whether the rows of sequences want their hidden states.
        """
        base = self._base
        began = perf_counter()
        for rows, chunk in batches:
            seq_ids = np.concatenate([np.zeros(chunk, int), np.arange(1, rows + 1)])
            pos = np.concatenate([np.arange(chunk), np.zeros(rows, int)]) + CONTEXT
            base.want_states(states and rows > 0)
            base.decode(
                self._tokens[: chunk + rows],
                pos.astype(np.int32),
                seq_ids.astype(np.int32),
                outputs=None if rows else False,
            )
            if rows:
                base.logits(1)
        seconds = perf_counter() - began
        base.seq_rm(-1, CONTEXT, -1)
        return seconds


def compare(batches: Batches, rows: int, chunk: int, states: bool, rounds: int) -> str:
    """Return the medians of a chunk apart from and together with rows, as cells of a table."""
    apart = list[float]()
    together = list[float]()
    for _ in range(rounds + 1):  # the first one warms up
        apart.append(batches.seconds((0, chunk), (rows, 0), states=states))
        together.append(batches.seconds((rows, chunk), states=states))
    del apart[0], together[0]
    ratio = median(a / t for a, t in zip(apart, together, strict=True))
    return f"{1e3 * median(apart):.1f} | {1e3 * median(together):.1f} | {ratio:.2f}"


@click.command()
@click.option(
    "--type", "kind", default="", help="Of scale_up.py's model; without: the bundled one."
)
@click.option(
    "--sequences",
    "--texts",
    "sequences",
    default="1,4",
    show_default=True,
    help="Running sequences, with commas. --texts is the older name.",
)
@click.option(
    "--chunks", default="16,64,256", show_default=True, help="Prompt tokens, with commas."
)
@click.option("--rounds", default=5, show_default=True)
def main(kind: str, sequences: str, chunks: str, rounds: int) -> None:
    """Print medians in milliseconds; above 1 the chunk is cheaper beside the sequences."""
    model = LlamaModel(build("1b", kind.upper()).model if kind else BUNDLED)
    counts = [int(n) for n in sequences.split(",")]
    sizes = [int(n) for n in chunks.split(",")]
    click.echo("| sequences | chunk | states | apart | together | apart / together |")
    click.echo("|---" * 6 + "|")
    n_seq_max = max(counts) + 1
    with LlamaBase(
        model,
        n_ctx=(n_seq_max + 1) * (CONTEXT + max(sizes)),
        n_threads=Settings.load().n_threads,
        n_seq_max=n_seq_max,
        embeddings=True,
    ) as base:
        batches = Batches(base, max(sizes))
        for rows in counts:
            for chunk in sizes:
                for states in (True, False):
                    figures = compare(batches, rows, chunk, states, rounds)
                    wanted = "yes" if states else "no"
                    click.echo(f"| {rows} | {chunk} | {wanted} | {figures} |")


if __name__ == "__main__":
    main()
