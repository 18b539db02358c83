"""Evaluation of heads on held-out text: loss, accuracies, tokens per step of their drafts.

Measured on given text, token by token; what a running model accepts of its own text differs
somewhat. Knows no files and no optimiser.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.heads.medusa import MedusaHeads
from model.training.states.batches import Batch

RANKS = 10  # guesses of each head that are told apart
LOGIT_BYTES = 256 << 20  # of one chunk


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures of one validation; lists go by head.

    loss: cross-entropy, weighted as in training. rank_accuracies: (K, RANKS), how often the wanted
    token is the r-th best guess, given that the best guesses of all heads before were right. A
    token outside the heads' draft vocabulary is never right, and has no loss.
    acceptance_length: tokens per step of a chain of best guesses, the base model's own included.
    ranks: (positions, K) int8, which guess was right, RANKS for none, -1 where nothing was wanted.
    tree_length: tokens per step of the tuned tree, which has tree_nodes nodes.
    """

    loss: float
    losses: list[float]
    top1: list[float]
    top5: list[float]
    rank_accuracies: list[list[float]]
    acceptance_length: float
    positions: int
    ranks: Tensor
    tree_length: float = 0.0
    tree_nodes: int = 0

    def figures(self) -> dict[str, Any]:
        """Return the figures for a log: without the ranks."""
        return {key: value for key, value in vars(self).items() if "rank" not in key}


class _Sums:
    """What is counted, by head: (K,) or (K, RANKS + 1), the last column for worse ranks."""

    def __init__(self, k_heads: int) -> None:
        self.losses = torch.zeros(k_heads, dtype=torch.float64)
        self.n_losses = torch.zeros(k_heads, dtype=torch.int64)
        self.counts = torch.zeros(k_heads, dtype=torch.int64)
        self.ranks = torch.zeros((k_heads, RANKS + 1), dtype=torch.int64)
        self.reached = torch.zeros((k_heads, RANKS + 1), dtype=torch.int64)
        self.seen: list[Tensor] = []

    def add(self, logits: Tensor, targets: Tensor, rows: Tensor) -> None:
        """Count logits (K, n, R) against targets (n, K), which are their rows (-1: none)."""
        # Where the best guesses of all heads so far would have been accepted.
        accepted = torch.ones(len(targets), dtype=torch.bool, device=targets.device)
        seen = torch.full(targets.shape, -1, dtype=torch.int8)
        for k, (scores, row) in enumerate(zip(logits, rows.T, strict=True)):
            valid = targets[:, k] >= 0
            known = row >= 0
            mine = scores.gather(1, row.clamp(min=0)[:, None])
            losses = scores.logsumexp(1) - mine[:, 0]
            ranks = (scores > mine).sum(1).clamp(max=RANKS).where(known, RANKS)
            reached = accepted & valid
            self.losses[k] += losses[known].double().sum().cpu()
            self.n_losses[k] += int(known.sum())
            self.counts[k] += int(valid.sum())
            self.ranks[k] += torch.bincount(ranks[valid], minlength=RANKS + 1).cpu()
            self.reached[k] += torch.bincount(ranks[reached], minlength=RANKS + 1).cpu()
            accepted = reached & (ranks == 0)
            seen[:, k] = torch.where(valid, ranks, -1).to(torch.int8).cpu()
        self.seen.append(seen)


def head_weights(k_heads: int) -> Tensor:
    """Return the weights (K,) of the heads' losses: 0.8^k, as in the Medusa paper."""
    return 0.8 ** torch.arange(k_heads, dtype=torch.float32)


@torch.no_grad()
def evaluate(heads: MedusaHeads, batches: Iterable[Batch]) -> Evaluation:
    """Measure heads on batches of positions, in float32."""
    config = heads.config
    sums = _Sums(config.k_heads)
    device = heads.weight.device
    chunk = max(1, LOGIT_BYTES // (4 * config.n_rows * config.k_heads))
    positions = 0
    for batch in batches:
        parts = (batch.states.split(chunk), batch.tokens.split(chunk), batch.targets.split(chunk))
        for states, tokens, targets in zip(*parts, strict=True):
            logits = heads.logits(states.to(device, torch.float32), tokens.to(device))
            wanted = targets.to(device)
            sums.add(logits, wanted, heads.rows_of(wanted))
            positions += len(targets)
    counts = sums.counts.clamp(min=1)
    losses = sums.losses / sums.n_losses.clamp(min=1)
    rates = (sums.reached / sums.reached.sum(1, keepdim=True).clamp(min=1))[:, :RANKS]
    return Evaluation(
        loss=float((losses * head_weights(config.k_heads)).sum()),
        losses=losses.tolist(),
        top1=(sums.ranks[:, 0] / counts).tolist(),
        top5=(sums.ranks[:, :5].sum(1) / counts).tolist(),
        rank_accuracies=[[round(rate, 6) for rate in row] for row in rates.tolist()],
        acceptance_length=1.0 + float(rates[:, 0].cumprod(0).sum()),
        positions=positions,
        ranks=torch.cat([torch.zeros((0, config.k_heads), dtype=torch.int8), *sums.seen]),
    )
