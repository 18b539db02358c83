"""What one batch teaches: the loss of all heads together. Knows no files, no optimiser and no other batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.heads.losses import linear_cross_entropy, linear_distillation
from model.heads.medusa import MedusaHeads
from model.training.evaluation import head_weights
from model.training.options import TrainOptions


@dataclass(frozen=True)
class Lesson:
    """What the base model says of a batch: its LM head (V, D), and the states that decide each target (see Batch).

    Temperature and weight against the cross-entropy are `linear_distillation`'s.
    """

    lm_head: Tensor
    around: Tensor
    places: Tensor
    temperature: float
    kd_weight: float


def heads_loss(
    heads: MedusaHeads, states: Tensor, tokens: Tensor, targets: Tensor, lesson: Lesson | None = None,
    counts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the sum over heads of 0.8^k · mean loss; see Batch for what comes in.

    The loss is the cross-entropy with the targets, or distillation where there is a lesson. counts: (K,), by which
    the means are taken where these rows are a part of a batch; None: the rows' own targets.
    """
    config = heads.config
    hidden = heads.hidden(states, tokens)  # (K,N,D)
    wanted = targets.T.contiguous()  # (K,N)
    valid = wanted >= 0
    weights = (
        head_weights(config.k_heads).to(states.device)[:, None]
        * valid
        / (valid.sum(1) if counts is None else counts).clamp(min=1)[:, None]
    )
    wanted = wanted.clamp(min=0)
    scale: dict[str, Any] = {"logit_scale": heads.logit_scale, "soft_cap": heads.soft_cap}
    if lesson:
        taught_by = lesson.places + 1 + torch.arange(config.k_heads, device=states.device)[:, None]  # (K,N)
        return linear_distillation(
            hidden, heads.lm_head, lesson.around, lesson.lm_head, taught_by, wanted, weights,
            temperature=lesson.temperature, kd_weight=lesson.kd_weight, **scale,
        )  # fmt: skip
    if config.lm_head == "tied":  # one product for all heads
        flat = hidden.reshape(-1, config.dim)
        return linear_cross_entropy(flat, heads.lm_head, wanted.reshape(-1), weights.reshape(-1), **scale)
    # Unbound, not indexed: the gradient of an index is as large as all heads' matrices together, for each head.
    each = zip(hidden.unbind(0), heads.lm_head.unbind(0), wanted, weights, strict=True)
    return torch.stack([linear_cross_entropy(h, w, t, s, **scale) for h, w, t, s in each]).sum()


class Teaching(nn.Module):
    """The loss as a module, which several processes can share (DistributedDataParallel).

    teacher: the base model's LM head (V, D), for `--loss kd`.
    """

    def __init__(self, heads: MedusaHeads, options: TrainOptions, teacher: Tensor | None) -> None:
        super().__init__()
        assert teacher is not None or options.loss == "ce"
        # In a list: the teacher is not the module's own.
        self.heads, self._options, self._teacher = heads, options, [teacher if options.loss == "kd" else None]

    def forward(self, around: Tensor, places: Tensor, tokens: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
        """Return `heads_loss` of a batch or a part of one."""
        o, (teacher,) = self._options, self._teacher
        lesson = None if teacher is None else Lesson(teacher, around, places, o.kd_temperature, o.kd_weight)
        return heads_loss(self.heads, around[places], tokens, targets, lesson, counts)
