"""Medusa heads: residual SiLU blocks on the base model's final hidden state, a head per depth.

After Cai et al. 2024, "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding
Heads" (arXiv 2401.10774). The parameters of all heads are stacked, so that a layer of all heads is
one batched matrix product. This module doesn't know how heads are taught, kept on disk or made fast
for drafting.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """What decides the shapes of a set of heads.

    k_heads: K. dim: D. vocab: V. head_layers: L, blocks of a head. hidden_dim: H, the width inside
    a block; 0 or dim: no bottleneck. lm_head: "tied", the base model's, or "own", one per head.
    draft_vocab: R, how many of the V tokens the heads draft from; 0: all.
    """

    k_heads: int
    dim: int
    vocab: int
    head_layers: int = 1
    hidden_dim: int = 0
    lm_head: Literal["tied", "own"] = "tied"
    head_type: Literal["medusa", "hydra"] = "medusa"
    draft_vocab: int = 0

    @property
    def n_rows(self) -> int:
        """Return R, the rows of an LM head: the draft vocabulary's, or all."""
        return self.draft_vocab or self.vocab

    @property
    def bottleneck(self) -> bool:
        """Whether blocks go through a narrower layer and back."""
        return self.hidden_dim not in (0, self.dim)


class MedusaHeads(nn.Module):
    """K heads; head i (from 1), at the state of position t, drafts the token at t+1+i.

    A block is `x + silu(W x + b)`, W and b zero at first as upstream has it, so that an untrained
    head repeats the base model's own guess; with a bottleneck it is `x + U silu(W x + b)`, U zero
    at first.

    Args: lm_head (R,D), the base's; "tied" keeps it frozen and out of the state dict, "own" gives
    each head a trained copy ((K,R,D) is taken as it is). logit_scale and soft_cap (0: none) are the
    base model's, applied to all logits. draft_ids: (R,) the tokens that the rows of lm_head stand
    for, ascending; None: all V. Only a draft vocabulary's are kept in the state dict.
    """

    lm_head: Tensor  # tied (R,D) or own (K,R,D)
    draft_ids: Tensor  # (R,) int32
    _row_of: Tensor  # (V,) int32: which row a token has; -1: none

    def __init__(
        self,
        config: HeadsConfig,
        lm_head: Tensor,
        logit_scale: float = 1.0,
        soft_cap: float = 0.0,
        draft_ids: Tensor | None = None,
    ) -> None:
        super().__init__()
        heads = config.k_heads
        dim = config.dim
        layers = config.head_layers
        inner = config.hidden_dim if config.bottleneck else dim
        assert lm_head.shape[-2:] == (config.n_rows, dim), (lm_head.shape, config)
        if draft_ids is None:
            assert not config.draft_vocab, "a draft vocabulary needs its tokens"
            draft_ids = torch.arange(config.vocab, dtype=torch.int32)
        assert draft_ids.shape == (config.n_rows,), (draft_ids.shape, config)
        self.config = config
        self.logit_scale = logit_scale
        self.soft_cap = soft_cap
        self.weight = nn.Parameter(torch.zeros(layers, heads, inner, dim))  # (L,K,H,D)
        self.bias = nn.Parameter(torch.zeros(layers, heads, inner))  # (L,K,H)
        self.up: nn.Parameter | None = None
        if config.bottleneck:
            self.up = nn.Parameter(torch.zeros(layers, heads, dim, inner))  # (L,K,D,H)
            # With both factors at zero nothing would ever move.
            nn.init.uniform_(self.weight, -(dim**-0.5), dim**-0.5)
        if config.lm_head == "own":
            self.lm_head = nn.Parameter(lm_head.detach().expand(heads, -1, -1).clone())
        else:
            self.register_buffer("lm_head", lm_head.detach(), persistent=False)
        self.register_buffer("draft_ids", draft_ids, persistent=bool(config.draft_vocab))
        row_of = torch.full((config.vocab,), -1, dtype=torch.int32)
        if not draft_ids.is_meta:  # there arange would import torch's compiler: 33 MB
            row_of[draft_ids.long()] = torch.arange(config.n_rows, dtype=torch.int32)
        self.register_buffer("_row_of", row_of, persistent=False)

    def rows_of(self, tokens: Tensor) -> Tensor:
        """Return the rows (int64) of the LM head that stand for tokens; -1: none, or no token."""
        return torch.where(tokens >= 0, self._row_of[tokens.clamp(min=0)].long(), -1)

    def inputs(self, states: Tensor, tokens: Tensor | None) -> Tensor:
        """Return what the heads' first blocks read, (N,D) -> (K,N,D): the state itself."""
        return states.expand(self.config.k_heads, -1, -1)

    def hidden(self, states: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Run all heads' blocks: (…,D) -> (K,…,D), what the LM head reads.

        tokens: (…,K) int64, those behind each state, the next one first; Medusa heads don't look at
        them.
        """
        flat_tokens = None if tokens is None else tokens.reshape(-1, self.config.k_heads)
        x = self.inputs(states.reshape(-1, self.config.dim), flat_tokens)  # (K,N,D)
        for layer in range(self.config.head_layers):
            product = torch.baddbmm(self.bias[layer].unsqueeze(1), x, self.weight[layer].mT)
            inner = F.silu(product)  # (K,N,H)
            x = x + (inner if self.up is None else inner @ self.up[layer].mT)
        return x.reshape(self.config.k_heads, *states.shape)

    def logits(self, states: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Return all heads' logits, (…,D) -> (K,…,R).

        For small inputs; training uses the chunked losses.
        """
        hidden = self.hidden(states, tokens)
        flat = hidden.reshape(self.config.k_heads, -1, self.config.dim)
        logits = (flat @ self.lm_head.mT) * self.logit_scale
        if self.soft_cap:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits.reshape(*hidden.shape[:-1], self.config.n_rows)

    def lm_head_weight(self, k: int) -> Tensor:
        """Return the LM head (R,D) of the head with index k (from 0)."""
        return self.lm_head[k] if self.config.lm_head == "own" else self.lm_head
