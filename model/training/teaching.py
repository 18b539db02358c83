"""What one batch teaches: the loss of all heads together.

Knows no files, no optimiser, no other batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.heads.distillation import linear_distillation
from model.heads.losses import linear_cross_entropy
from model.heads.medusa import MedusaHeads
from model.training.evaluation import head_weights
from model.training.options import TrainOptions


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """What the base model says of a batch: its LM head (R, D), the states that decide targets.

    R: the heads' draft vocabulary, to which its distribution is restricted; all tokens without one.

    around, places: see Batch. Temperature and weight against the cross-entropy are
    `linear_distillation`'s.
    """

    lm_head: Tensor
    around: Tensor
    places: Tensor
    temperature: float
    kd_weight: float


def heads_loss(
    heads: MedusaHeads,
    states: Tensor,
    tokens: Tensor,
    targets: Tensor,
    teacher: Teacher | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Return the sum over heads of 0.8^k · mean loss; see Batch for what comes in.

    targets: (N, K) as rows of the heads' LM head (`MedusaHeads.rows_of`), -1: nothing to learn.
    The loss is the cross-entropy with the targets, or distillation where there is a teacher.
    counts: (K,), by which the means are formed where these rows are a part of a batch; None: the
    rows' own targets.
    """
    config = heads.config
    hidden = heads.hidden(states, tokens)  # (K,N,D)
    wanted = targets.T.contiguous()  # (K,N)
    valid = wanted >= 0
    if counts is None:
        counts = valid.sum(1)
    by_head = head_weights(config.k_heads).to(states.device)[:, None]
    weights = by_head * valid / counts.clamp(min=1)[:, None]  # (K,N)
    wanted = wanted.clamp(min=0)
    scale: dict[str, Any] = {"logit_scale": heads.logit_scale, "soft_cap": heads.soft_cap}

    if teacher:
        steps = 1 + torch.arange(config.k_heads, device=states.device)[:, None]
        taught_by = teacher.places + steps  # (K,N)
        return linear_distillation(
            hidden, heads.lm_head, teacher.around, teacher.lm_head, taught_by, wanted, weights,
            temperature=teacher.temperature, kd_weight=teacher.kd_weight, **scale,
        )  # fmt: skip
    if config.lm_head == "tied":  # one product for all heads
        flat = hidden.reshape(-1, config.dim)
        return linear_cross_entropy(
            flat, heads.lm_head, wanted.reshape(-1), weights.reshape(-1), **scale
        )
    # Unbound, not indexed: an index's gradient is as large as all heads' matrices, for each head.
    each = zip(hidden.unbind(0), heads.lm_head.unbind(0), wanted, weights, strict=True)
    return torch.stack([linear_cross_entropy(h, w, t, s, **scale) for h, w, t, s in each]).sum()


class HeadsLoss(nn.Module):
    """The loss as a module, which several processes can share (DistributedDataParallel).

    lm_head: the base model's (R, D), for `--loss kd`.
    """

    def __init__(self, heads: MedusaHeads, options: TrainOptions, lm_head: Tensor | None) -> None:
        super().__init__()
        assert lm_head is not None or options.loss == "ce"
        self.heads = heads
        self._options = options
        # In a list: the base model's LM head is not the module's own.
        self._lm_head = [lm_head if options.loss == "kd" else None]

    def forward(
        self, around: Tensor, places: Tensor, tokens: Tensor, targets: Tensor, counts: Tensor
    ) -> Tensor:
        """Return `heads_loss` of a batch or a part of one."""
        lm_head = self._lm_head[0]
        teacher = None
        if lm_head is not None:
            teacher = Teacher(
                lm_head=lm_head, around=around, places=places,
                temperature=self._options.kd_temperature, kd_weight=self._options.kd_weight,
            )  # fmt: skip
        return heads_loss(self.heads, around[places], tokens, targets, teacher, counts)
