"""Fast drafting with draft heads: hidden states in, ranked tokens out, both numpy.

A small model's step takes 300 µs, so each Python call counts: the first layers of all heads are one
product, so are their logits, and what lies between two numpy arrays is one call. Measured (Xeon
with AVX512-VNNI, D=320, V=4,096, 3 heads): `benchmarks/draft_cost.py`. Knows nothing of acceptance
and llama.cpp.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.errors import HeadsError
from model.heads.draft_vocabulary import commonest
from model.heads.fast import Call, DType, PerHead, compiled, fastest, linear
from model.heads.medusa import MedusaHeads
from model.trees.likeliest import likeliest
from model.trees.tree import Tree

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
PROBE_VOCAB = 4096  # rows of the LM head that `auto` times the types with


class HeadsDrafter:
    """What drafting with the first heads of a set needs, whichever type they are.

    name: of the draft source, `HEADS` of `model/decoding/drafters/drafter.py`.
    ranks: how many guesses per head. draft_vocab: draft only from the so many most frequent tokens
    by token_counts (V,); 0: from all that the heads know. dtype: "auto" keeps the
    fastest on this machine. n_threads: torch's threads, process-wide; they fight with llama.cpp's
    for the cores. with_probs: give probabilities (over the draft vocabulary) too, at the cost of a
    softmax. Raises HeadsError where the heads can't do what is asked.
    """

    name = "heads"

    def __init__(
        self,
        heads: MedusaHeads,
        *,
        n_heads: int,
        ranks: int,
        draft_vocab: int = 0,
        token_counts: Int32Array | None = None,
        dtype: DType = "auto",
        n_threads: int = 1,
        with_probs: bool = False,
    ) -> None:
        k_heads = heads.config.k_heads
        if not 1 <= n_heads <= k_heads:
            raise HeadsError(f"cannot draft with {n_heads} heads: the file holds {k_heads}")
        torch.set_num_threads(n_threads)
        known = heads.draft_ids.numpy()
        self._rows = _draft_rows(known, draft_vocab, token_counts)
        self.ids: Int32Array = known[self._rows]
        if not 1 <= ranks <= len(self.ids):
            raise HeadsError(f"cannot rank {ranks} tokens of a draft vocabulary of {len(self.ids)}")
        self._n_heads = n_heads
        self._ranks = ranks
        self._with_probs = with_probs
        self._scale = heads.logit_scale
        self._cap = heads.soft_cap
        self.dtype = self._fastest(heads) if dtype == "auto" else dtype
        self._prepare(heads)

    def _fastest(self, heads: MedusaHeads) -> str:
        """Time one row in each type, with a part of the LM head only, and name the fastest."""
        rows = np.arange(min(heads.config.n_rows, PROBE_VOCAB), dtype=np.int32)
        what = f"{heads.config} {self._n_heads}"
        return fastest(what, lambda dtype: self._one_row(heads, rows, dtype))

    def _one_row(self, heads: MedusaHeads, rows: Int32Array, dtype: str) -> Callable[[], object]:
        """Compile the drafting of one made-up state over these rows of the LM head, to be timed."""
        raise NotImplementedError

    def _prepare(self, heads: MedusaHeads) -> None:
        """Compile what drafting calls, in `self.dtype`."""
        raise NotImplementedError

    def _ranked(self, scores: Tensor, ranks: int) -> tuple[Int32Array, Float32Array | None]:
        """Return the best tokens (rows,R) by logits (rows,V), and their probabilities or None.

        The logits are overwritten.
        """
        logits = scores.numpy()
        if ranks == 1 and not self._with_probs:
            return self.ids[logits.argmax(1)][:, None], None
        log_total = self._log_total(logits) if self._with_probs else None
        n = len(logits)
        best = np.empty((n, ranks), np.intp)
        top = np.empty((n, ranks), np.float32)
        rows = np.arange(n)
        # An argmax per rank takes 1 to 6 µs; torch's topk 28 to 200 (V = 4,096 to 32,000).
        for rank in range(ranks):
            columns = logits.argmax(1)
            best[:, rank] = columns
            top[:, rank] = logits[rows, columns]
            logits[rows, columns] = -np.inf
        if log_total is None:
            return self.ids[best], None
        return self.ids[best], np.exp(self._shaped(top) - log_total)

    def _likeliest(self, scores: Tensor) -> tuple[list[list[int]], list[list[float]]]:
        """Return the best tokens and about their probabilities, for each row of logits (rows,V)."""
        tokens = list[list[int]]()
        probabilities = list[list[float]]()
        for row in self._shaped(scores.numpy()):
            columns, shares = likeliest(row)
            tokens.append([int(self.ids[column]) for column in columns])
            probabilities.append(shares)
        return tokens, probabilities

    def _shaped(self, logits: Float32Array) -> Float32Array:
        """Scale and cap logits as the base model does; it changes no order, so ranking needn't."""
        if self._scale != 1.0:
            logits = logits * np.float32(self._scale)
        if not self._cap:
            return logits
        cap = np.float32(self._cap)
        capped: Float32Array = cap * np.tanh(logits / cap)
        return capped

    def _log_total(self, logits: Float32Array) -> Float32Array:
        """Return log sum exp (rows,1)."""
        shaped = torch.from_numpy(self._shaped(logits))
        return torch.logsumexp(shaped, 1, keepdim=True).numpy()


class MedusaDrafter(HeadsDrafter):
    """Drafts with Medusa heads, whose guesses depend on the state alone.

    A `RankingDrafter` of `model/decoding/drafters/drafter.py`.
    """

    # The last states that were looked at, and what was guessed from them.
    _looked: tuple[Float32Array, tuple[list[list[int]], list[list[float]]]] | None = None

    def rank(
        self, hidden: Float32Array, tokens: object = None
    ) -> tuple[Int32Array, Float32Array | None]:
        """Return for states (B,D) each head's tokens (B,K,R) and their probabilities or None.

        The best come first. tokens: not looked at.
        """
        logits = self._logits(torch.from_numpy(hidden))  # (B·K,V)
        best, probabilities = self._ranked(logits, self._ranks)
        shape = (len(hidden), self._n_heads, self._ranks)
        if probabilities is not None:
            probabilities = probabilities.reshape(shape)
        return best.reshape(shape), probabilities

    def look(
        self, hidden: Float32Array, states: Sequence[int], paths: Sequence[Sequence[int]]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """See LevelDrafter. All levels come at once: the first look keeps them for the others."""
        if self._looked is None or self._looked[0] is not hidden:
            self._looked = (hidden, self._likeliest(self._logits(torch.from_numpy(hidden))))
        tokens, probabilities = self._looked[1]
        level = len(paths[0]) - 1
        rows = [state * self._n_heads + level for state in states]
        return [tokens[row] for row in rows], [probabilities[row] for row in rows]

    def draft(
        self, hidden: Float32Array, roots: Sequence[int], trees: Sequence[Tree]
    ) -> list[list[int]]:
        """See TreeDrafter."""
        guesses, _ = self.rank(hidden)
        return [tree.fill(table) for tree, table in zip(trees, guesses, strict=True)]

    def _one_row(self, heads: MedusaHeads, rows: Int32Array, dtype: str) -> Callable[[], object]:
        call = _compile(heads, self._n_heads, rows, dtype)
        return partial(call, torch.randn(1, heads.config.dim))

    def _prepare(self, heads: MedusaHeads) -> None:
        self._logits = _compile(heads, self._n_heads, self._rows, self.dtype)


class _AllHeads(nn.Module):
    """States (B,D) to the first heads' logits (B·K,V), in one type throughout."""

    def __init__(self, heads: MedusaHeads, n_heads: int, rows: Int32Array, dtype: str) -> None:
        super().__init__()
        layers = heads.config.head_layers
        weight = heads.weight.detach()[:, :n_heads]  # (L,K,H,D)
        bias = heads.bias.detach()[:, :n_heads]  # (L,K,H)
        self.n_heads = n_heads
        self.dim = heads.config.dim
        self.inner = weight.shape[2]
        self.kind = torch.bfloat16 if dtype == "bf16" else torch.float32

        # All heads read the same states, so their first layers are one product.
        self.first = linear(weight[0].flatten(0, 1), bias[0].flatten(), dtype)
        self.blocks = nn.ModuleList(PerHead(weight[i], bias[i], dtype) for i in range(1, layers))
        self.ups = nn.ModuleList()
        if heads.up is not None:
            up = heads.up.detach()[:, :n_heads]  # (L,K,D,H)
            self.ups.extend(PerHead(up[i], None, dtype) for i in range(layers))

        lm_head = heads.lm_head.detach()
        if heads.config.lm_head == "own":
            own = rows_of(lm_head[:n_heads], rows)
            self.lm_head: nn.Module = PerHead(own, None, dtype)
        else:
            self.lm_head = linear(rows_of(lm_head, rows), None, dtype)

    def forward(self, states: Tensor) -> Tensor:
        states = states.to(self.kind)
        inner = F.silu(self.first(states)).view(-1, self.n_heads, self.inner)
        x = states.unsqueeze(1) + (self.ups[0](inner) if len(self.ups) else inner)  # (B,K,D)
        for i, block in enumerate(self.blocks):
            inner = F.silu(block(x))
            x = x + (self.ups[i + 1](inner) if len(self.ups) else inner)
        if isinstance(self.lm_head, PerHead):
            return cast(Tensor, self.lm_head(x)).flatten(0, 1).float()
        return cast(Tensor, self.lm_head(x.view(-1, self.dim))).float()


def _compile(heads: MedusaHeads, n_heads: int, rows: Int32Array, dtype: str) -> Call:
    return compiled(_AllHeads(heads, n_heads, rows, dtype), torch.randn(2, heads.config.dim))


def rows_of(lm_head: Tensor, rows: Int32Array) -> Tensor:
    """Return some rows of an LM head (…,R,D), without a copy where they are all."""
    if len(rows) == lm_head.shape[-2]:
        return lm_head
    return lm_head.index_select(-2, torch.from_numpy(rows.astype(np.int64)))


def _draft_rows(known: Int32Array, draft_vocab: int, counts: Int32Array | None) -> Int32Array:
    """Return which of the tokens that the heads know (R,) to draft from, ascending."""
    if not 0 < draft_vocab < len(known):
        return np.arange(len(known), dtype=np.int32)
    if counts is None:
        raise HeadsError(
            "these heads hold no token_counts, which draft_vocab needs: train them anew, "
            "or set it to 0"
        )
    return commonest(counts[known], draft_vocab)
