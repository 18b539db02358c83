"""The builder of the bundled base model: Python source in, a small quantized GGUF out.

    python scripts/build_tiny_base.py --minutes 60 --out build/tiny-python

Reads the standard library of the Python that runs it, trains a SentencePiece tokenizer and a
llama-architecture model from scratch, writes F32 and Q4_0 GGUF files and `facts.json` with the
figures that the model card quotes. Files held out from training are chosen by a hash of their path.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import gguf
import numpy as np
import sentencepiece as spm
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from tiny_llama import TinyConfig, TinyLlama, write_gguf  # noqa: E402

from model.base.gguf_file import requantize  # noqa: E402
from model.base.llama import LlamaBase  # noqa: E402
from model.base.llama_model import LlamaModel  # noqa: E402
from model.storage.whole_file import whole_file  # noqa: E402
from model.training.data.standard_library import standard_library  # noqa: E402

WINDOW = 1024  # tokens that are scored at a time
# (until this share of the time, (batch, window))
PHASES = ((0.2, (16, 256)), (0.8, (16, 512)), (1.0, (8, 1024)))


def train_tokenizer(texts: list[str], out: Path, vocab: int) -> spm.SentencePieceProcessor:
    """Train a BPE with byte fallback that keeps white space as it is (code depends on it)."""
    lines = [line for text in texts for line in text.split("\n") if 0 < len(line) < 1000]
    with (out / "tokenizer.model").open("wb") as f:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=f,
            model_type="bpe",
            vocab_size=vocab,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            input_sentence_size=400_000,
            shuffle_input_sentence=True,
            num_threads=2,
            minloglevel=1,
        )
    return spm.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))


def encode(sp: spm.SentencePieceProcessor, texts: list[str]) -> Tensor:
    """Return all texts as one row of ids, each between begin and end marks."""
    ids = [i for text in sp.encode(texts) for i in (sp.bos_id(), *text, sp.eos_id())]
    return torch.tensor(ids, dtype=torch.long)


def overlapping_windows(data: Tensor, window: int) -> Iterator[tuple[Tensor, int]]:
    """Yield windows (window + 1,) that overlap by half, each with where its scored positions begin.

    So each token is scored once, with the longer context.
    """
    half = window // 2
    n_used = (len(data) - 1) // half * half + 1
    for n, row in enumerate(data[:n_used].unfold(0, window + 1, half)):
        yield row, half if n else 0


def mean_loss(logits_of: Callable[[Tensor], Tensor], data: Tensor, window: int = WINDOW) -> float:
    """Return nats per token over overlapping windows; logits_of: (T,) ids to (T, V) logits."""
    total = 0.0
    count = 0
    for row, since in overlapping_windows(data, window):
        logits = logits_of(row[:-1])[since:]
        total += F.cross_entropy(logits, row[1 + since :], reduction="sum").item()
        count += window - since
    return total / count


@torch.no_grad()
def held_out_loss(model: TinyLlama, data: Tensor) -> float:
    """Return the model's nats per token."""
    return mean_loss(lambda ids: model(ids[None])[0], data)


def quantized_loss(path: Path, data: Tensor) -> float:
    """Return nats per token of a GGUF file through llama.cpp."""
    model = LlamaModel(path)
    threads = torch.get_num_threads()
    with LlamaBase(model, n_ctx=WINDOW, n_batch=WINDOW, n_threads=threads) as base:

        def logits_of(ids: Tensor) -> Tensor:
            base.clear()
            base.decode(ids.numpy().astype(np.int32), 0, 0, outputs=True)
            return torch.from_numpy(base.logits(len(ids)))

        loss = mean_loss(logits_of, data)
    model.close()
    return loss


def optimisers(model: TinyLlama, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices, AdamW for embeddings, norms and the LM head."""
    matrices = [p for p in model.blk.parameters() if p.dim() == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    ]


def load_weights(model: TinyLlama, path: Path) -> None:
    """Take the weights of an F32 GGUF that this script wrote."""
    tensors = gguf.GGUFReader(path).tensors
    model.load_state_dict({t.name: torch.from_numpy(t.data.copy()) for t in tensors})


class Windows:
    """Training batches: short windows first, long ones at the end of the time; see PHASES."""

    def __init__(self, data: Tensor) -> None:
        self._data = data
        self._rng = np.random.default_rng(0)
        self._shape = (0, 0)
        self._starts = np.empty(0, np.int64)
        self._next = 0

    def batch(self, share: float) -> Tensor:
        """Return the next (batch, window + 1) ids; share: of the time that has passed."""
        shape = next(shape for until, shape in PHASES if share < until)
        size, window = shape
        if shape != self._shape or self._next + size > len(self._starts):
            self._shape = shape
            self._next = 0
            first = int(self._rng.integers(window))
            starts = np.arange(first, len(self._data) - window - 1, window)
            self._starts = self._rng.permutation(starts)
        starts = self._starts[self._next : self._next + size]
        self._next += size
        return torch.stack([self._data[i : i + window + 1] for i in starts])


def train(
    model: TinyLlama,
    data: Tensor,
    valid: Tensor,
    minutes: float,
    lr: float,
    save: Callable[[], None],
) -> None:
    """Train for a span of time: warm-up, a flat part, and a linear decay to zero.

    In F32: without AMX, bf16 matrix products are slower on CPUs (165 against 290 GFLOP/s on two
    cores). The loss is compiled with the model: at 8,192 tokens a step that saves 30 % (2.5 s
    instead of 3.6 on two cores). save: called now and then.
    """
    opts = optimisers(model, lr)
    windows = Windows(data)

    def next_token_loss(rows: Tensor) -> Tensor:
        return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    loss_of = torch.compile(next_token_loss, dynamic=False)
    start = time.monotonic()
    step = 0
    n_tokens = 0
    running_loss = 0.0
    while True:
        seconds = time.monotonic() - start
        share = seconds / (60 * minutes)
        if share >= 1:
            return

        # One step.
        scale = min(1.0, (step + 1) / 100) * min(1.0, (1 - share) / 0.6)
        set_learning_rate(opts, lr * scale)
        rows = windows.batch(share)
        loss = loss_of(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        step += 1
        n_tokens += rows.shape[0] * (rows.shape[1] - 1)

        # What is said of it, and saved.
        last = loss.item()
        running_loss = last if step == 1 else 0.98 * running_loss + 0.02 * last
        if step % 50 == 0:
            note = ""
            if step % 400 == 0:
                note = f"  held-out {held_out_loss(model, valid[:32_769]):.3f}"
                save()
            rate = n_tokens / (time.monotonic() - start)
            progress = f"{share:6.1%}  step {step}  loss {running_loss:.3f}"
            print(f"{progress}  {rate:,.0f} tokens/s{note}", flush=True)


def set_learning_rate(opts: list[torch.optim.Optimizer], lr: float) -> None:
    """Give all parameters one learning rate."""
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = lr


@click.command()
@click.option("--minutes", default=60.0, help="How long to train.")
@click.option("--lr", default=5e-3, help="Peak learning rate.")
@click.option("--threads", default=2, help="Threads to train with.")
@click.option("--vocab", default=4096, help="Tokens of the tokenizer's vocabulary.")
@click.option(
    "--start",
    type=click.Path(path_type=Path, exists=True),
    help="Go on from this F32 GGUF (and its tokenizer).",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/tiny-python"))
def main(
    minutes: float, lr: float, threads: int, vocab: int, start: Path | None, out: Path
) -> None:
    """Train the bundled base model from scratch."""
    # The text and its tokenizer.
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    learn = [text for _, text in standard_library()]
    held = list(standard_library(held=True))
    if start:
        sp = spm.SentencePieceProcessor(model_file=str(start.parent / "tokenizer.model"))
        (out / "tokenizer.model").write_bytes(sp.serialized_model_proto())
    else:
        sp = train_tokenizer(learn, out, vocab)
    data = encode(sp, learn)
    valid = encode(sp, [text for _, text in held])
    held_bytes = sum(len(text.encode()) for _, text in held)

    # The model.
    model = TinyLlama(TinyConfig(vocab=sp.vocab_size()))
    if start:
        load_weights(model, start)
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{len(learn)} files, {len(data):,} tokens; {n_params:,} parameters")
    print(f"held out: {len(held)} files, {len(valid):,} tokens")
    f32 = out / "tiny-python-f32.gguf"

    def save() -> None:
        with whole_file(f32) as new:
            write_gguf(new, model, sp, "tiny-python")

    train(model, data, valid, minutes, lr, save)
    save()

    # Its file and figures.
    nats = held_out_loss(model, valid)
    requantize(f32, out / "tiny-python.Q4_0.gguf", "Q4_0")
    facts = {
        "python": sys.version.split()[0],
        "parameters": n_params,
        "train_files": len(learn),
        "train_tokens": len(data),
        "held_out_tokens": len(valid),
        "held_out_bytes": held_bytes,
        "held_out_nats_per_token": nats,
        "held_out_bits_per_byte": nats / math.log(2) * len(valid) / held_bytes,
        "held_out_nats_per_token_q4_0": quantized_loss(out / "tiny-python.Q4_0.gguf", valid),
        "held_out_files": [name for name, _ in held],
    }
    (out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    bits = facts["held_out_bits_per_byte"]
    print(f"held out: {nats:.3f} nats per token, {bits:.3f} bits per byte")


if __name__ == "__main__":
    main()
