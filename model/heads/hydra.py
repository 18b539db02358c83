"""Hydra heads: Medusa heads that also read the tokens drafted before theirs.

After Ankner et al. 2024, "Hydra: Sequentially-Dependent Draft Heads for Medusa Decoding" (arXiv 2402.05109). Tokens
enter as the base model's own embeddings, through a matrix for each head and place, and are added to the state.
This module doesn't know how heads are taught, kept on disk or made fast for drafting.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.heads.medusa import HeadsConfig, MedusaHeads


class HydraHeads(MedusaHeads):
    """K heads; head i (from 1), at the state of position t, drafts the token at t+1+i, given those at t+1 … t+i.

    What the blocks of head i read is `state + sum over j of P_ij · embedding(token at t+j)`, j = 1 … i; P is zero at
    first, so that an untrained head repeats the base model's own guess. The rest is as in MedusaHeads.

    Args: embeddings (V,D), the base's, frozen and out of the state dict. They may be of any size, so they are read
    times `embedding_scale`, which belongs to the heads: it brings them to an RMS of 1.
    """

    embeddings: Tensor
    embedding_scale: Tensor

    def __init__(
        self, config: HeadsConfig, lm_head: Tensor, embeddings: Tensor, logit_scale: float = 1.0, soft_cap: float = 0.0
    ) -> None:
        super().__init__(config, lm_head, logit_scale, soft_cap)
        heads, dim = config.k_heads, config.dim
        assert embeddings.shape == (config.vocab, dim), (embeddings.shape, config)
        self.register_buffer("embeddings", embeddings.detach(), persistent=False)
        self.register_buffer("embedding_scale", embeddings.detach().square().mean().rsqrt())
        self.places = list(range(heads, 0, -1))  # the token at t+j is read by the heads from j on
        self.embed = nn.Parameter(torch.zeros(sum(self.places), dim, dim))  # by place, then by head

    def inputs(self, states: Tensor, tokens: Tensor | None) -> Tensor:
        """Give what the heads' first blocks read, (N,D) and tokens (N,K) -> (K,N,D)."""
        assert tokens is not None, "Hydra heads read tokens too"
        x = states.repeat(self.config.k_heads, 1, 1)
        for j, matrices in enumerate(self.embed.split(self.places)):
            embedded = F.embedding(tokens[:, j], self.embeddings) * self.embedding_scale
            read = F.linear(embedded, matrices.flatten(0, 1))  # (N,(K-j)·D)
            x[j:] += read.view(len(read), -1, self.config.dim).transpose(0, 1)
        return x

    def reader(self, k: int) -> Tensor:
        """Give the matrix (D,(k+1)·D) by which the head with index k (from 0) reads the embeddings in a row."""
        by_place = self.embed.detach().split(self.places)
        return torch.cat([by_place[j][k - j] for j in range(k + 1)], 1) * self.embedding_scale
