"""Distillation into several linear layers that never holds the logits of all tokens.

Works in chunks as `losses.py` does; the teacher's logits are computed once for all layers. Knows
neither heads nor training: it sees rows, matrices and which row teaches which.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.heads.chunks import (
    ChunkOptions,
    Sums,
    add_product,
    cap,
    cross_entropy,
    rows_per_chunk,
    scaled_gradients,
)


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    teachers: Tensor,
    teacher_weight: Tensor,
    taught_by: Tensor,
    targets: Tensor,
    sample_weight: Tensor,
    *,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    chunk: int = 0,
    logit_scale: float = 1.0,
    soft_cap: float = 0.0,
) -> Tensor:
    """Return the sum of sample_weight · loss of K students, each taught by some of P states.

    A loss is kd_weight · T² · KL(teacher ‖ student) + (1 - kd_weight) · cross-entropy, after Hinton
    et al. 2015, arXiv 1503.02531: KL is between softmax(logits / T), T the temperature; logits are
    soft_cap(logit_scale · h @ W.T) on both sides.

    hidden (K,N,D), weight (V,D) for all or (K,V,D); teachers (P,D), teacher_weight (V,D): never
    trained; taught_by (K,N) int64: the row of teachers for each of hidden, a row at most once per
    head, so that its logits are computed once for all heads; targets (K,N) int64.
    sample_weight (K,N): rows of weight zero are never computed, whatever they hold.
    chunk: teachers at a time. Else as `linear_cross_entropy`.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        shared = teacher_weight is weight
        hidden = hidden.to(dtype)
        weight = weight.to(dtype)
        teachers = teachers.to(dtype)
        teacher_weight = weight if shared else teacher_weight.to(dtype)
    assert hidden.dtype == weight.dtype == teachers.dtype == teacher_weight.dtype
    # The row of hidden that each teacher teaches, by head; -1: none.
    students = torch.full((len(hidden), len(teachers)), -1, device=hidden.device)  # (K,P)
    k, n = sample_weight.nonzero(as_tuple=True)
    students[k, taught_by[k, n]] = n
    # Three tables: the teacher's probabilities, a student's logits, and these for the targets.
    options = _Options(
        chunk=chunk or rows_per_chunk(hidden, len(teacher_weight), tables=3),
        logit_scale=logit_scale,
        soft_cap=soft_cap,
        with_grad=torch.is_grad_enabled(),
        temperature=temperature,
        kd_weight=kd_weight,
    )
    loss: Tensor = _LinearDistillation.apply(  # type: ignore[no-untyped-call]
        hidden,
        weight,
        teachers.detach(),
        teacher_weight.detach(),
        students,
        targets,
        sample_weight.detach(),
        options,
    )
    return loss


@dataclass(frozen=True, kw_only=True)
class _Options(ChunkOptions):
    temperature: float
    kd_weight: float


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teachers: Tensor,
        teacher_weight: Tensor,
        students: Tensor,
        targets: Tensor,
        sample_weight: Tensor,
        options: _Options,
    ) -> Tensor:
        sums = Sums(ctx, hidden, weight, options.with_grad)
        own = weight.dim() == 3  # each head has a matrix of its own
        scale = options.logit_scale
        with torch.autocast(hidden.device.type, enabled=False):
            used = (students >= 0).any(0).nonzero().squeeze(1)
            for rows in torch.split(used, options.chunk):
                # The teacher's distribution, once for all heads.
                logits = ((teachers[rows] * scale) @ teacher_weight.T).to(sums.dtype)
                teacher = _softened(logits, options.temperature, options.soft_cap)
                for k, student_rows in enumerate(students[:, rows]):
                    # Those of its rows that teach this head.
                    taught = (student_rows >= 0).nonzero().squeeze(1)
                    mine = student_rows[taught]
                    head_weight = weight[k] if own else weight
                    h = hidden[k, mine] * scale
                    factors = sample_weight[k, mine].to(sums.dtype)
                    logits = (h @ head_weight.T).to(sums.dtype)
                    head_teacher = teacher
                    if len(taught) < len(rows):  # at the ends of samples; else without a copy
                        head_teacher = (teacher[0][taught], teacher[1][taught])
                    losses = _losses(
                        logits,
                        head_teacher,
                        targets[k, mine],
                        factors,
                        temperature=options.temperature,
                        kd_weight=options.kd_weight,
                        soft_cap=options.soft_cap,
                        with_grad=sums.with_grad,
                    )
                    sums.loss += factors @ losses
                    grad = logits.to(hidden.dtype)  # `logits` now holds its own gradient
                    if sums.grad_hidden is not None:
                        sums.grad_hidden[k, mine] = (grad @ head_weight) * scale
                    if sums.grad_weight is not None:
                        total = sums.grad_weight[k] if own else sums.grad_weight
                        add_product(total, grad, h)
                    # Else the next head's would be in memory beside them.
                    del logits, grad, head_teacher
                del teacher
        sums.save(ctx)
        return sums.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled_gradients(ctx, grad), *(None,) * 6


def _softened(logits: Tensor, temperature: float, soft_cap: float) -> tuple[Tensor, Tensor]:
    """Return softmax(soft_cap(logits) / temperature) (n,V) and its entropy (n,)."""
    cap(logits, soft_cap, with_slope=False)
    if temperature != 1:
        logits.div_(temperature)
    logits = torch.log_softmax(logits, 1)
    probabilities = logits.exp()
    return probabilities, -torch.linalg.vecdot(probabilities, logits)


def _losses(
    logits: Tensor,
    teacher: tuple[Tensor, Tensor],
    targets: Tensor,
    factors: Tensor,
    *,
    temperature: float,
    kd_weight: float,
    soft_cap: float,
    with_grad: bool,
) -> Tensor:
    """Return the losses (n,) of a student's logits, and leave the gradient of factors · losses.

    A loss is kd_weight · T² · KL(teacher ‖ student) + (1 - kd_weight) · cross-entropy, with
    T = temperature (Hinton et al. 2015, arXiv 1503.02531).
    teacher: as `_softened` returns it. targets: (n,) int64. factors: (n,).
    """
    probabilities, entropy = teacher
    slope = cap(logits, soft_cap, with_slope=with_grad)
    hard = logits.clone() if kd_weight < 1 else None
    soft_factor = kd_weight * temperature  # of T², one T is lost to the slope of logits / T
    soft_losses = cross_entropy(
        logits.div_(temperature),
        probabilities,
        factors * soft_factor,
        soft_cap=0.0,
        with_grad=with_grad,
    )
    losses = (soft_losses - entropy).mul_(soft_factor * temperature)
    if hard is not None:
        hard_factor = 1 - kd_weight
        hard_losses = cross_entropy(
            hard, targets, factors * hard_factor, soft_cap=0.0, with_grad=with_grad
        )
        losses += hard_factor * hard_losses
        logits.add_(hard)
    if slope is not None:
        logits.mul_(slope)
    return losses
