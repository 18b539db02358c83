"""Fast drafting: hidden rows in, ranked tokens out, both numpy.

A small model's step takes 300 µs, so each Python call counts: the first layers of all heads are one product, so are
their logits, and the chain between two numpy arrays is one TorchScript call. Measured (Xeon with AVX512-VNNI, D=320,
V=4,096, 3 heads): `benchmarks/draft_cost.py`. Knows nothing of acceptance and llama.cpp.
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
from model.heads.fast import DType, PerHead, compiled, fastest, linear
from model.heads.medusa import MedusaHeads
from model.trees.tree import Tree

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
PROBE_VOCAB = 4096  # rows of the LM head that `auto` times the types with


class HeadsDrafter:
    """What drafting with the first heads of a set needs, whichever type they are.

    ranks: how many tokens per head. draft_vocab: draft only from the so many most frequent tokens by token_counts (V,)
    (0: from all; `covering` says how many matter). dtype: "auto" keeps the fastest on this machine. n_threads: torch's
    threads, process-wide; they fight with llama.cpp's for the cores. with_probs: give probabilities (over the draft
    vocabulary) too, at the cost of a softmax. Raises HeadsError where the heads can't do what is asked.
    """

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
        if not 1 <= n_heads <= heads.config.k_heads:
            raise HeadsError(f"cannot draft with {n_heads} heads: the file holds {heads.config.k_heads}")
        torch.set_num_threads(n_threads)
        self.ids = _draft_ids(heads.config.vocab, draft_vocab, token_counts)
        if not 1 <= ranks <= len(self.ids):
            raise HeadsError(f"cannot rank {ranks} tokens of a draft vocabulary of {len(self.ids)}")
        self._n_heads, self._ranks, self._with_probs = n_heads, ranks, with_probs
        self._scale, self._cap = heads.logit_scale, heads.soft_cap
        self.dtype = self._fastest(heads) if dtype == "auto" else dtype
        self._prepare(heads)

    def _fastest(self, heads: MedusaHeads) -> str:
        """Time one row in each type, with a part of the LM head only, and name the fastest."""
        ids = np.arange(min(heads.config.vocab, PROBE_VOCAB), dtype=np.int32)
        return fastest(f"{heads.config} {self._n_heads}", lambda dtype: self._one_row(heads, ids, dtype))

    def _one_row(self, heads: MedusaHeads, ids: Int32Array, dtype: str) -> Callable[[], object]:
        """Compile the drafting of one made-up row over these tokens, to be timed."""
        raise NotImplementedError

    def _prepare(self, heads: MedusaHeads) -> None:
        """Compile what drafting calls, in `self.dtype`."""
        raise NotImplementedError

    def _ranked(self, scores: Tensor, ranks: int) -> tuple[Int32Array, Float32Array | None]:
        """Return the best tokens (rows,R) by logits (rows,V), which are spoilt, and their probabilities or None."""
        logits = scores.numpy()
        if ranks == 1 and not self._with_probs:
            return self.ids[logits.argmax(1)][:, None], None
        rows = len(logits)
        best, top = np.empty((rows, ranks), np.intp), np.empty((rows, ranks), np.float32)
        total = self._normaliser(logits) if self._with_probs else None
        each = np.arange(rows)
        for rank in range(ranks):  # an argmax is 1 to 6 µs; torch's topk 28 to 200 (V = 4,096 to 32,000)
            at = logits.argmax(1)
            best[:, rank], top[:, rank] = at, logits[each, at]
            logits[each, at] = -np.inf
        return self.ids[best], None if total is None else np.exp(self._shaped(top) - total)

    def _shaped(self, logits: Float32Array) -> Float32Array:
        """Apply what the base model does to its logits; it changes no order, so ranking goes without."""
        logits = logits * np.float32(self._scale)
        return np.float32(self._cap) * np.tanh(logits / np.float32(self._cap)) if self._cap else logits

    def _normaliser(self, logits: Float32Array) -> Float32Array:
        """Return log sum exp (rows,1)."""
        return torch.logsumexp(torch.from_numpy(self._shaped(logits)), 1, keepdim=True).numpy()


class MedusaDrafter(HeadsDrafter):
    """Drafts with Medusa heads; a `Drafter` of `model/decoding/drafting.py`. Their guesses hang on the state alone."""

    def rank(self, hidden: Float32Array, tokens: object = None) -> tuple[Int32Array, Float32Array | None]:
        """Return for states (B,D) each head's tokens (B,K,R), best first, and their probabilities or None."""
        best, probabilities = self._ranked(self._logits(torch.from_numpy(hidden)), self._ranks)  # (B·K,V)
        shape = (len(hidden), self._n_heads, self._ranks)
        return best.reshape(shape), None if probabilities is None else probabilities.reshape(shape)

    def draft(self, hidden: Float32Array, roots: Sequence[int], trees: Sequence[Tree]) -> list[list[int]]:
        """See Drafter."""
        return [tree.fill(guesses) for tree, guesses in zip(trees, self.rank(hidden)[0], strict=True)]

    def _one_row(self, heads: MedusaHeads, ids: Int32Array, dtype: str) -> Callable[[], object]:
        return partial(_compile(heads, self._n_heads, ids, dtype), torch.randn(1, heads.config.dim))

    def _prepare(self, heads: MedusaHeads) -> None:
        self._logits = _compile(heads, self._n_heads, self.ids, self.dtype)


class _Chain(nn.Module):
    """States (B,D) to the first heads' logits (B·K,V), in one type throughout."""

    def __init__(self, heads: MedusaHeads, n_heads: int, ids: npt.NDArray[np.int32], dtype: str) -> None:
        super().__init__()
        self.n_heads, self.dim, layers = n_heads, heads.config.dim, heads.config.head_layers
        self.kind = torch.bfloat16 if dtype == "bf16" else torch.float32
        weight, bias = heads.weight.detach()[:, :n_heads], heads.bias.detach()[:, :n_heads]
        self.inner = weight.shape[2]
        self.first = linear(weight[0].flatten(0, 1), bias[0].flatten(), dtype)  # all heads read the same states
        self.blocks = nn.ModuleList(PerHead(weight[i], bias[i], dtype) for i in range(1, layers))
        self.ups = nn.ModuleList()
        if heads.up is not None:
            self.ups.extend(PerHead(heads.up.detach()[i, :n_heads], None, dtype) for i in range(layers))
        rows = torch.from_numpy(ids.astype(np.int64))
        whole = len(ids) == heads.config.vocab
        if heads.config.lm_head == "own":
            own = heads.lm_head.detach()[:n_heads]
            self.lm_head: nn.Module = PerHead(own if whole else own[:, rows], None, dtype)
        else:
            self.lm_head = linear(heads.lm_head.detach() if whole else heads.lm_head.detach()[rows], None, dtype)

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


def _compile(heads: MedusaHeads, n_heads: int, ids: Int32Array, dtype: str) -> torch.jit.ScriptModule:
    return compiled(_Chain(heads, n_heads, ids, dtype), torch.randn(2, heads.config.dim))


def covering(counts: npt.NDArray[np.int32], share: float) -> int:
    """Return how many of the commonest tokens make up `share` of a counted text: a multiple of 64, at least 1,024."""
    most = np.sort(counts.astype(np.int64))[::-1].cumsum()
    return max(1024, -(-(int(np.searchsorted(most, share * most[-1])) + 1) // 64) * 64)


def _draft_ids(vocab: int, draft_vocab: int, counts: npt.NDArray[np.int32] | None) -> npt.NDArray[np.int32]:
    """Return the token ids to draft from, ascending."""
    if not 0 < draft_vocab < vocab:
        return np.arange(vocab, dtype=np.int32)
    if counts is None:
        raise HeadsError("these heads hold no token_counts, which draft_vocab needs: train them anew, or set it to 0")
    return np.sort(np.argsort(-counts.astype(np.int64), kind="stable")[:draft_vocab]).astype(np.int32)
