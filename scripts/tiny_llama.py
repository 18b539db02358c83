"""A llama-architecture language model in plain torch, and its GGUF file.

Small enough to train on two cores. Knows nothing of corpora, of optimisers and of the rest of the
project; `build_tiny_base.py` trains one, the tests write odd-shaped ones to try foreign files on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import sentencepiece as spm
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """Sizes of the model; `n_kv_heads < n_heads` is grouped-query attention."""

    vocab: int = 4096
    dim: int = 320
    layers: int = 6
    n_heads: int = 5
    n_kv_heads: int = 5
    ffn: int = 896
    context: int = 1024
    rope_base: float = 10_000.0
    eps: float = 1e-5
    tied: bool = False

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs, the order in which llama.cpp stores llama's queries and keys.

    x: (B, heads, T, head_dim); cos, sin: (T, head_dim / 2).
    """
    even = x[..., 0::2]
    odd = x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Block(nn.Module):
    def __init__(self, c: TinyConfig) -> None:
        super().__init__()
        self.c = c
        kv = c.n_kv_heads * c.head_dim
        self.attn_norm = nn.RMSNorm(c.dim, eps=c.eps)
        self.attn_q = nn.Linear(c.dim, c.dim, bias=False)
        self.attn_k = nn.Linear(c.dim, kv, bias=False)
        self.attn_v = nn.Linear(c.dim, kv, bias=False)
        self.attn_output = nn.Linear(c.dim, c.dim, bias=False)
        self.ffn_norm = nn.RMSNorm(c.dim, eps=c.eps)
        self.ffn_gate = nn.Linear(c.dim, c.ffn, bias=False)
        self.ffn_up = nn.Linear(c.dim, c.ffn, bias=False)
        self.ffn_down = nn.Linear(c.ffn, c.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c = self.c
        b, t, _ = x.shape
        h = self.attn_norm(x)
        q = rope(self.attn_q(h).view(b, t, c.n_heads, c.head_dim).transpose(1, 2), cos, sin)
        k = rope(self.attn_k(h).view(b, t, c.n_kv_heads, c.head_dim).transpose(1, 2), cos, sin)
        v = self.attn_v(h).view(b, t, c.n_kv_heads, c.head_dim).transpose(1, 2)
        if c.n_kv_heads != c.n_heads:
            k, v = (a.repeat_interleave(c.n_heads // c.n_kv_heads, dim=1) for a in (k, v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_output(a.transpose(1, 2).reshape(b, t, c.dim))
        h = self.ffn_norm(x)
        out: Tensor = x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))
        return out


class TinyLlama(nn.Module):
    def __init__(self, c: TinyConfig) -> None:
        super().__init__()
        self.c = c
        self.token_embd = nn.Embedding(c.vocab, c.dim)
        self.blk = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.output_norm = nn.RMSNorm(c.dim, eps=c.eps)
        self.output = nn.Linear(c.dim, c.vocab, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("attn_output.weight", "ffn_down.weight"))
                std = 0.02 / (2 * c.layers) ** 0.5 if residual else 0.02
                nn.init.normal_(p, std=std)
        if c.tied:
            self.output.weight = self.token_embd.weight
        freq = c.rope_base ** (-torch.arange(0, c.head_dim, 2).float() / c.head_dim)
        angle = torch.outer(torch.arange(c.context).float(), freq)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, T, V) of tokens (B, T)."""
        t = tokens.shape[1]
        x = self.token_embd(tokens)
        for block in self.blk:
            x = block(x, self.cos[:t], self.sin[:t])  # type: ignore[index]
        out: Tensor = self.output(self.output_norm(x))
        return out


def token_type(sp: spm.SentencePieceProcessor, token: int) -> gguf.TokenType:
    """Return how a GGUF names a token's kind."""
    if sp.is_unknown(token):
        return gguf.TokenType.UNKNOWN
    if sp.is_control(token):
        return gguf.TokenType.CONTROL
    if sp.is_byte(token):
        return gguf.TokenType.BYTE
    return gguf.TokenType.NORMAL


def write_gguf(path: Path, model: TinyLlama, sp: spm.SentencePieceProcessor, name: str) -> None:
    """Write the model and its tokenizer as an F32 GGUF that llama.cpp loads as `llama`."""
    # The shapes.
    c = model.c
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_name(name)
    w.add_context_length(c.context)
    w.add_embedding_length(c.dim)
    w.add_block_count(c.layers)
    w.add_feed_forward_length(c.ffn)
    w.add_head_count(c.n_heads)
    w.add_head_count_kv(c.n_kv_heads)
    w.add_rope_dimension_count(c.head_dim)
    w.add_rope_freq_base(c.rope_base)
    w.add_layer_norm_rms_eps(c.eps)
    w.add_vocab_size(c.vocab)
    w.add_file_type(gguf.LlamaFileType.ALL_F32)

    # The tokenizer.
    ids = range(sp.vocab_size())
    w.add_tokenizer_model("llama")
    w.add_token_list([sp.id_to_piece(i).encode() for i in ids])
    w.add_token_scores([sp.get_score(i) for i in ids])
    w.add_token_types([token_type(sp, i) for i in ids])
    w.add_bos_token_id(sp.bos_id())
    w.add_eos_token_id(sp.eos_id())
    w.add_unk_token_id(sp.unk_id())
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    w.add_add_space_prefix(False)

    # The weights.
    for key, p in model.state_dict().items():
        if not (c.tied and key == "output.weight"):
            w.add_tensor(key, np.ascontiguousarray(p.detach().float().numpy()))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
