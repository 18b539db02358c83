"""Hydra heads: Medusa heads that also read the tokens drafted before theirs.

After Ankner et al. 2024, "Hydra: Sequentially-Dependent Draft Heads for Medusa Decoding" (arXiv
2402.05109). Tokens enter as the base model's own embeddings, through a matrix for each head and
each token that it reads, and are added to the state. This module doesn't know how heads are taught,
kept on disk or made fast for drafting.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.heads.medusa import HeadsConfig, MedusaHeads


class HydraHeads(MedusaHeads):
    """K heads; head i (from 1), at the state of position t, drafts the token at t+1+i.

    It is given the tokens at t+1 … t+i. What its blocks read is
    `state + sum over j of P_ij · embedding(token at t+j)`, j = 1 … i; P is zero at first, so that
    an untrained head repeats the base model's own guess. The rest is as in MedusaHeads.

    Args: embeddings (V,D), the base's, frozen and out of the state dict. They may be of any size,
    so they are read times `embedding_scale`, which belongs to the heads: it brings them to an RMS
    of 1. They may be of a smaller type than the heads.
    """

    embeddings: Tensor
    embedding_scale: Tensor

    def __init__(
        self,
        config: HeadsConfig,
        lm_head: Tensor,
        embeddings: Tensor,
        logit_scale: float = 1.0,
        soft_cap: float = 0.0,
        draft_ids: Tensor | None = None,
    ) -> None:
        super().__init__(config, lm_head, logit_scale, soft_cap, draft_ids)
        heads = config.k_heads
        dim = config.dim
        assert embeddings.shape == (config.vocab, dim), (embeddings.shape, config)
        self.register_buffer("embeddings", embeddings.detach(), persistent=False)
        scale = torch.ones(())
        # On the meta device torch would import its compiler, 3 s, to say that this is one number.
        if not embeddings.is_meta:
            norm = torch.linalg.vector_norm(embeddings.detach(), dtype=torch.float32)
            scale = embeddings.numel() ** 0.5 / norm
        self.register_buffer("embedding_scale", scale)
        # The token at t+j is read by the heads from j on: K matrices, then K-1, …, then one.
        self.readers = list(range(heads, 0, -1))
        self.embed = nn.Parameter(torch.zeros(sum(self.readers), dim, dim))  # by j, then by head

    def inputs(self, states: Tensor, tokens: Tensor | None) -> Tensor:
        """Return what the heads' first blocks read, (N,D) and tokens (N,K) -> (K,N,D)."""
        assert tokens is not None, "Hydra heads read tokens too"
        x = states.repeat(self.config.k_heads, 1, 1)
        for j, matrices in enumerate(self.embed.split(self.readers)):
            embedded = F.embedding(tokens[:, j], self.embeddings).to(x.dtype) * self.embedding_scale
            read = F.linear(embedded, matrices.flatten(0, 1))  # (N,(K-j)·D)
            x[j:] += read.view(len(read), -1, self.config.dim).transpose(0, 1)
        return x

    def reader(self, k: int) -> Tensor:
        """Return the matrix (D,(k+1)·D) by which head k (from 0) reads k+1 embeddings in a row."""
        by_token = self.embed.detach().split(self.readers)
        matrices = [by_token[j][k - j] for j in range(k + 1)]
        return torch.cat(matrices, 1) * self.embedding_scale
