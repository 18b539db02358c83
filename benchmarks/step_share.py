"""Which share of a step is not llama_decode's, when the model has the size of a real one?

    python benchmarks/step_share.py [--layers 22] [--tokens 60]

Writes a llama GGUF of 1.1 B parameters with random Q4_0 weights (D=2,048, V=32,000; 0.6 GB, in a temporary folder),
drafts chains of three with random heads, with the whole vocabulary and with 4,096 tokens, at temperature 0 and 0.8,
and reports medians over texts to benchmarks/results/step_share.json. The goal is ≤ 10 %. Random weights cost what
trained ones cost; nothing is accepted, so verification is at its cheapest (one node per step) and said so.
"""

import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
    sys.path[0] = str(ROOT)

import click  # noqa: E402
import gguf  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from config import usable_cores  # noqa: E402
from model.base.llama import LlamaBase  # noqa: E402
from model.base.llama_model import LlamaModel  # noqa: E402
from model.decoding.generation import Generation, Request  # noqa: E402
from model.decoding.planning import FixedPlan  # noqa: E402
from model.decoding.sampling import SamplingParams  # noqa: E402
from model.heads.drafter import MedusaDrafter  # noqa: E402
from model.heads.medusa import HeadsConfig, MedusaHeads  # noqa: E402
from model.trees.tree import Tree  # noqa: E402

D, V, FFN, HEADS, KV_HEADS = 2048, 32000, 5632, 32, 4


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
    w.add_tokenizer_model("llama")
    pieces = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % i for i in range(256))]
    pieces += [b"w%d" % i for i in range(V - len(pieces))]
    w.add_token_list(pieces)
    w.add_token_scores([0.0] * V)
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    w.add_token_types([*kinds, *[gguf.TokenType.NORMAL] * (V - len(kinds))])
    kv = D // HEADS * KV_HEADS
    shapes = {"token_embd": (V, D), "output": (V, D)}
    for i in range(layers):
        shapes |= {
            f"blk.{i}.attn_{n}": s for n, s in {"q": (D, D), "k": (kv, D), "v": (kv, D), "output": (D, D)}.items()
        }
        shapes |= {f"blk.{i}.ffn_{n}": s for n, s in {"gate": (FFN, D), "up": (FFN, D), "down": (D, FFN)}.items()}
    for name, (rows, columns) in shapes.items():
        blocks = rng.integers(0, 256, (rows, columns // 32, 18), dtype=np.uint8)
        blocks[..., :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        w.add_tensor(f"{name}.weight", blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    for name in ["output_norm", *(f"blk.{i}.{n}_norm" for i in range(layers) for n in ("attn", "ffn"))]:
        w.add_tensor(f"{name}.weight", np.ones(D, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


@click.command()
@click.option("--layers", default=22)
@click.option("--tokens", default=60)
@click.option("--texts", default=5)
def main(layers: int, tokens: int, texts: int) -> None:
    """Measure, print and write the shares."""
    tree, threads, rows = Tree.chain(3), usable_cores(), []
    torch.manual_seed(0)
    heads = MedusaHeads(HeadsConfig(3, D, V), torch.randn(V, D) / D**0.5)
    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder) / "random.gguf", layers)
        model = LlamaModel(Path(folder) / "random.gguf")
        for vocab in (0, 4096):
            drafter = MedusaDrafter(
                heads, n_heads=3, ranks=1, draft_vocab=vocab, token_counts=np.ones(V, np.int32), n_threads=threads
            )
            for temperature in (0.0, 0.8):
                shares: list[list[float]] = []
                with LlamaBase(model, n_ctx=512, n_threads=threads, embeddings=True) as base:
                    for i in range(texts):
                        base.clear()
                        request = Request([1, *range(300, 400)], tokens, SamplingParams(temperature, seed=i))
                        text = Generation(
                            base, model.piece, frozenset(), request, context=500, plan=FixedPlan(tree), drafter=drafter
                        )
                        text.run()
                        s = text.slot.stats
                        us = [1e6 * x / s.steps for x in (s.draft_s, s.verify_s, s.other_s, s.decode_s)]
                        shares.append([*us, sum(us[:3]) / sum(us)])
                draft, verify, other, decode, share = (median(column) for column in zip(*shares, strict=True))
                rows.append(
                    {
                        "draft_vocab": vocab,
                        "temperature": temperature,
                        "type": drafter.dtype,
                        "draft_us": draft,
                        "verify_us": verify,
                        "other_us": other,
                        "decode_us": decode,
                        "share": share,
                    }
                )
                click.echo(
                    f"draft_vocab {vocab or 'all':>5}  temperature {temperature}  draft {draft:7.0f} µs  verify "
                    f"{verify:5.0f}  other {other:4.0f}  decode {decode:8.0f}  outside decode {share:.1%}"
                )
        model.close()
    result = {
        "threads": threads,
        "layers": layers,
        "rows": rows,
        "command": " ".join(["python", *sys.argv]),
        "versions": {name: version(name) for name in ("llama-cpp-python", "torch", "numpy")},
    }
    (ROOT / "benchmarks" / "results" / "step_share.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
