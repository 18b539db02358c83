"""Which share of a step is not llama_decode's, when the model has the size of a real one?

    python benchmarks/step_share.py [--layers 22] [--tokens 60]

Writes a llama GGUF of 1.1 B parameters with random Q4_0 weights (D=2,048, V=32,000; 0.6 GB, in a
temporary folder), drafts chains of three with random heads, with the whole vocabulary and with
4,096 tokens, at temperature 0 and 0.8, and reports medians over sequences to
benchmarks/results/step_share.json. The goal is ≤ 10 %. Random weights cost what trained ones cost;
nothing is accepted, so verification is at its cheapest (one node per step) and said so.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
    sys.path[0] = str(ROOT)

import click  # noqa: E402
import gguf  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from config import Settings  # noqa: E402
from model.base.llama import LlamaBase  # noqa: E402
from model.base.llama_model import LlamaModel  # noqa: E402
from model.decoding.decoder import Decoder  # noqa: E402
from model.decoding.draft_policy import FixedPolicy  # noqa: E402
from model.decoding.drafters.drafter import HEADS as HEADS_SOURCE  # noqa: E402
from model.decoding.drafters.drafter import Drafters  # noqa: E402
from model.decoding.request import Request  # noqa: E402
from model.decoding.sampling import SamplingParams  # noqa: E402
from model.decoding.statistics import DraftStatistics  # noqa: E402
from model.heads.drafter import MedusaDrafter  # noqa: E402
from model.heads.medusa import HeadsConfig, MedusaHeads  # noqa: E402
from model.trees.tree import Tree  # noqa: E402

D = 2048
V = 32000
FFN = 5632
HEADS = 32
KV_HEADS = 4
DRAFT_HEADS = 3
CONTEXT = 500
PROMPT = [1, *range(300, 400)]


def tensor_shapes(layers: int) -> dict[str, tuple[int, int]]:
    """Return the shapes of all matrices by name, rows first."""
    kv = D // HEADS * KV_HEADS
    shapes = {"token_embd": (V, D), "output": (V, D)}
    for i in range(layers):
        shapes |= {
            f"blk.{i}.attn_q": (D, D),
            f"blk.{i}.attn_k": (kv, D),
            f"blk.{i}.attn_v": (kv, D),
            f"blk.{i}.attn_output": (D, D),
            f"blk.{i}.ffn_gate": (FFN, D),
            f"blk.{i}.ffn_up": (FFN, D),
            f"blk.{i}.ffn_down": (D, FFN),
        }
    return shapes


def write_random(path: Path, layers: int) -> None:
    """Write the GGUF: Q4_0 blocks of 32 weights are an fp16 scale and 16 bytes."""
    rng = np.random.default_rng(0)
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_context_length(2048)
    w.add_embedding_length(D)
    w.add_block_count(layers)
    w.add_feed_forward_length(FFN)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(V)

    # A vocabulary: control tokens, bytes, and words that mean nothing.
    w.add_tokenizer_model("llama")
    control = [b"<unk>", b"<s>", b"</s>"]
    single_bytes = [b"<0x%02X>" % i for i in range(256)]
    words = [b"w%d" % i for i in range(V - len(control) - len(single_bytes))]
    w.add_token_list([*control, *single_bytes, *words])
    w.add_token_scores([0.0] * V)
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * len(single_bytes)
    kinds += [gguf.TokenType.NORMAL] * len(words)
    w.add_token_types(kinds)

    # Weights.
    scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    for name, (rows, columns) in tensor_shapes(layers).items():
        blocks = rng.integers(0, 256, (rows, columns // 32, 18), dtype=np.uint8)
        blocks[..., :2] = scale
        w.add_tensor(
            f"{name}.weight", blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q4_0
        )
    norms = [f"blk.{i}.{kind}_norm" for i in range(layers) for kind in ("attn", "ffn")]
    for name in ["output_norm", *norms]:
        w.add_tensor(f"{name}.weight", np.ones(D, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def stage_us(statistics: DraftStatistics) -> dict[str, float]:
    """Return the microseconds of a step by stage, and the share of all but llama_decode."""
    us = {
        stage: 1e6 * seconds / statistics.steps
        for stage, seconds in statistics.seconds_by_stage.items()
    }
    total = sum(us.values())
    return {
        "draft_us": us["draft"],
        "verify_us": us["verify"],
        "other_us": us["tree"] + us["cache"] + us["policy"],
        "decode_us": us["decode"],
        "share": 1 - us["decode"] / total,
    }


def measure(
    model: LlamaModel,
    drafter: MedusaDrafter,
    temperature: float,
    *,
    n_threads: int,
    max_tokens: int,
    n_sequences: int,
) -> dict[str, float]:
    """Generate sequences of their own seeds; return medians over them."""
    policy = FixedPolicy(Tree.chain(DRAFT_HEADS))
    base = LlamaBase(model, n_ctx=CONTEXT + 12, n_threads=n_threads, embeddings=True)
    measured = list[dict[str, float]]()
    with Decoder(
        base, model, policy, context=CONTEXT, drafters=Drafters({HEADS_SOURCE: drafter})
    ) as decoder:
        for seed in range(n_sequences):
            sampling = SamplingParams(temperature=temperature, seed=seed)
            request = Request(prompt=PROMPT, max_tokens=max_tokens, sampling=sampling)
            measured.append(stage_us(decoder.run(request).statistics))
    return {name: median(each[name] for each in measured) for name in measured[0]}


def describe(row: dict[str, Any]) -> str:
    """Return a row as a line of text."""
    return (
        f"draft_vocab {row['draft_vocab'] or 'all':>5}  temperature {row['temperature']}  "
        f"draft {row['draft_us']:7.0f} µs  verify {row['verify_us']:5.0f}  "
        f"other {row['other_us']:4.0f}  decode {row['decode_us']:8.0f}  "
        f"outside decode {row['share']:.1%}"
    )


@click.command()
@click.option("--layers", default=22)
@click.option("--max_tokens", "--tokens", default=60, help="New tokens per sequence.")
@click.option("--sequences", "--texts", "n_sequences", default=5)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=ROOT / "benchmarks" / "results" / "step_share.json",
)
def main(layers: int, max_tokens: int, n_sequences: int, out: Path) -> None:
    """Measure, print and write the shares."""
    n_threads = Settings.load().n_threads
    torch.manual_seed(0)
    config = HeadsConfig(k_heads=DRAFT_HEADS, dim=D, vocab=V)
    heads = MedusaHeads(config, torch.randn(V, D) / D**0.5)
    rows = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder) / "random.gguf", layers)
        model = LlamaModel(Path(folder) / "random.gguf")
        for draft_vocab in (0, 4096):
            drafter = MedusaDrafter(
                heads,
                n_heads=DRAFT_HEADS,
                ranks=1,
                draft_vocab=draft_vocab,
                token_counts=np.ones(V, np.int32),
                n_threads=n_threads,
            )
            for temperature in (0.0, 0.8):
                figures = measure(
                    model,
                    drafter,
                    temperature,
                    n_threads=n_threads,
                    max_tokens=max_tokens,
                    n_sequences=n_sequences,
                )
                labels = {"draft_vocab": draft_vocab, "temperature": temperature}
                rows.append({**labels, "type": drafter.dtype, **figures})
                click.echo(describe(rows[-1]))
        model.close()
    result = {
        "threads": n_threads,
        "layers": layers,
        "rows": rows,
        "command": " ".join(["python", "benchmarks/step_share.py", *sys.argv[1:]]),
        "versions": {name: version(name) for name in ("llama-cpp-python", "torch", "numpy")},
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
