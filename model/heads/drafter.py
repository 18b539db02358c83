"""Fast drafting: hidden rows in, ranked tokens out, both numpy.

A small model's step takes 300 µs, so each Python call counts: the first layers of all heads are one product, so are
their logits, and the chain between two numpy arrays is one TorchScript call. Measured (Xeon with AVX512-VNNI, D=320,
V=4,096, 3 heads): `benchmarks/draft_cost.py`. int8 changes now and then which token is drafted, never the text.
Knows nothing of trees, acceptance and llama.cpp.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.errors import HeadsError
from model.heads.medusa import MedusaHeads

DType = Literal["auto", "f32", "bf16", "int8"]
PROBE_VOCAB = 4096  # rows of the LM head that `auto` times the types with


class MedusaDrafter:
    """Drafts with the first heads of a set; a `Drafter` of `model/decoding/drafting.py`.

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
        token_counts: npt.NDArray[np.int32] | None = None,
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
        self.dtype = _fastest(heads, n_heads) if dtype == "auto" else dtype
        self._logits = _compile(heads, n_heads, self.ids, self.dtype)

    def draft(self, hidden: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32] | None]:
        """Return for states (B,D) each head's tokens (B,K,R), best first, and their probabilities or None."""
        logits = self._logits(torch.from_numpy(hidden)).numpy()  # (B·K,V)
        rows = len(logits)
        shape = (len(hidden), self._n_heads, self._ranks)
        if self._ranks == 1 and not self._with_probs:
            return self.ids[logits.argmax(1)].reshape(shape), None
        best, top = np.empty((rows, self._ranks), np.intp), np.empty((rows, self._ranks), np.float32)
        total = self._normaliser(logits) if self._with_probs else None
        each = np.arange(rows)
        for rank in range(self._ranks):  # an argmax is 1 to 6 µs; torch's topk 28 to 200 (V = 4,096 to 32,000)
            at = logits.argmax(1)
            best[:, rank], top[:, rank] = at, logits[each, at]
            logits[each, at] = -np.inf
        tokens = self.ids[best].reshape(shape)
        return tokens, None if total is None else np.exp(self._shaped(top) - total).reshape(shape)

    def _shaped(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Apply what the base model does to its logits; it changes no order, so ranking goes without."""
        logits = logits * np.float32(self._scale)
        return np.float32(self._cap) * np.tanh(logits / np.float32(self._cap)) if self._cap else logits

    def _normaliser(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return log sum exp (rows,1)."""
        return torch.logsumexp(torch.from_numpy(self._shaped(logits)), 1, keepdim=True).numpy()


class _Chain(nn.Module):
    """States (B,D) to the first heads' logits (B·K,V), in one type throughout."""

    def __init__(self, heads: MedusaHeads, n_heads: int, ids: npt.NDArray[np.int32], dtype: str) -> None:
        super().__init__()
        self.n_heads, self.dim, layers = n_heads, heads.config.dim, heads.config.head_layers
        self.kind = torch.bfloat16 if dtype == "bf16" else torch.float32
        weight, bias = heads.weight.detach()[:, :n_heads], heads.bias.detach()[:, :n_heads]
        self.inner = weight.shape[2]
        self.first = _linear(weight[0].flatten(0, 1), bias[0].flatten(), dtype)  # all heads read the same states
        self.blocks = nn.ModuleList(_PerHead(weight[i], bias[i], dtype) for i in range(1, layers))
        self.ups = nn.ModuleList()
        if heads.up is not None:
            self.ups.extend(_PerHead(heads.up.detach()[i, :n_heads], None, dtype) for i in range(layers))
        rows = torch.from_numpy(ids.astype(np.int64))
        whole = len(ids) == heads.config.vocab
        if heads.config.lm_head == "own":
            own = heads.lm_head.detach()[:n_heads]
            self.lm_head: nn.Module = _PerHead(own if whole else own[:, rows], None, dtype)
        else:
            self.lm_head = _linear(heads.lm_head.detach() if whole else heads.lm_head.detach()[rows], None, dtype)

    def forward(self, states: Tensor) -> Tensor:
        states = states.to(self.kind)
        inner = F.silu(self.first(states)).view(-1, self.n_heads, self.inner)
        x = states.unsqueeze(1) + (self.ups[0](inner) if len(self.ups) else inner)  # (B,K,D)
        for i, block in enumerate(self.blocks):
            inner = F.silu(block(x))
            x = x + (self.ups[i + 1](inner) if len(self.ups) else inner)
        if isinstance(self.lm_head, _PerHead):
            return cast(Tensor, self.lm_head(x)).flatten(0, 1).float()
        return cast(Tensor, self.lm_head(x.view(-1, self.dim))).float()


class _PerHead(nn.Module):
    """One layer where each head reads its own rows: (B,K,D) -> (B,K,H); weight (K,H,D), bias (K,H)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: str) -> None:
        super().__init__()
        biases = [None] * len(weight) if bias is None else list(bias)
        self.heads = nn.ModuleList(_linear(w, b, dtype) for w, b in zip(weight, biases, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([head(x[:, k]) for k, head in enumerate(self.heads)], 1)


class _Int8Linear(nn.Module):
    """A linear layer in int8: weights with a scale per row, inputs quantised as they come. (*,D) -> (*,H)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        scales = weight.abs().amax(1).clamp_min(1e-12) / 127  # a row of zeros has no scale of its own
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(quantized, bias)
        # Without VNNI sums of 8 × 8 bits overflow, so inputs get 7.
        self.narrow = not torch.cpu.get_capabilities().get("avx512_vnni", False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.quantized.linear_dynamic(x, self.packed, self.narrow))


def _linear(weight: Tensor, bias: Tensor | None, dtype: str) -> nn.Module:
    if dtype == "int8":
        return _Int8Linear(weight.float(), None if bias is None else bias.float())
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.to(kind), requires_grad=False)
    layer.bias = nn.Parameter(torch.empty(0) if bias is None else bias.to(kind), requires_grad=False)
    if bias is None:
        layer.register_parameter("bias", None)
    return layer


def _compile(heads: MedusaHeads, n_heads: int, ids: npt.NDArray[np.int32], dtype: str) -> torch.jit.ScriptModule:
    """Make the chain one TorchScript call, and run it until TorchScript has settled."""
    with _quietly(), torch.no_grad():
        chain = _Chain(heads, n_heads, ids, dtype).eval()
        example = torch.randn(2, heads.config.dim)
        compiled = cast(torch.jit.ScriptModule, torch.jit.freeze(torch.jit.trace(chain, example)))
        for rows in (1, 1, 1, 2, 2, 2):
            compiled(example[:rows])
    return compiled


def _fastest(heads: MedusaHeads, n_heads: int) -> str:
    """Time one row in each type, with a part of the LM head only, and name the fastest."""
    ids = np.arange(min(heads.config.vocab, PROBE_VOCAB), dtype=np.int32)
    example, times = torch.randn(1, heads.config.dim), {}
    for dtype in ("int8", "bf16", "f32"):
        try:
            chain = _compile(heads, n_heads, ids, dtype)
        except RuntimeError:  # this processor or this build of torch has no such kernels
            continue
        runs = []
        for _ in range(10):
            start = perf_counter()
            chain(example)
            runs.append(perf_counter() - start)
        times[dtype] = min(runs)
    return min(times, key=lambda dtype: times[dtype])


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


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide torch's notes that TorchScript and quantized tensors will go one day; its version is pinned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
