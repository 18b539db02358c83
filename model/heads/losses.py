"""Cross-entropy of a linear layer, and distillation into several, that never hold the logits of all tokens.

The logits of one chunk of tokens exist at a time; their gradient is taken at once and folded into those of the inputs,
so that the backward pass only scales. Products are in the type of the inputs (autocast's where it is on), sums in fp32
(fp64 for fp64). Knows neither heads nor training: it sees rows, a matrix and targets.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SoftTargets = Callable[[Tensor], Tensor]  # row numbers (n,) int64 -> probabilities (n,V)
CHUNK_BYTES = {"cpu": 3 * 2**24, "cuda": 2**29}  # for a chunk's logits; a GPU needs longer products to be busy


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | SoftTargets,
    sample_weight: Tensor | None = None,
    *,
    chunk: int = 0,
    logit_scale: float = 1.0,
    soft_cap: float = 0.0,
) -> Tensor:
    """Return sum over rows of sample_weight · cross-entropy(soft_cap(logit_scale · hidden @ weight.T), targets).

    hidden (N,D), weight (V,D); targets (N,) int64, or soft: (N,V), or a function that gives the rows asked for (so that
    those needn't exist at once either). Rows of weight zero are never computed, whatever they hold. The result is fp32;
    the caller divides. chunk: rows at a time, 0 for what suits the device. The gradient may be taken once, of hidden
    and of weight where they require it; targets and sample_weight get none.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    assert hidden.dtype == weight.dtype, (hidden.dtype, weight.dtype)
    if not chunk:
        chunk = _rows_at_a_time(hidden, len(weight), 1)
    if sample_weight is None:
        sample_weight = torch.ones(len(hidden), device=hidden.device)
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, sample_weight.detach(), chunk, logit_scale, soft_cap, torch.is_grad_enabled()
    )
    return loss


def linear_distillation(
    hidden: Tensor, weight: Tensor, teachers: Tensor, teacher_weight: Tensor, taught_by: Tensor, targets: Tensor,
    sample_weight: Tensor, *, temperature: float = 1.0, kd_weight: float = 1.0, chunk: int = 0,
    logit_scale: float = 1.0, soft_cap: float = 0.0,
) -> Tensor:  # fmt: skip
    """Return sum of sample_weight · (kd_weight · T² · KL(teacher ‖ student) + (1 - kd_weight) · cross-entropy).

    After Hinton et al. 2015, arXiv 1503.02531: KL is between softmax(logits / T), T the temperature; logits are
    soft_cap(logit_scale · h @ W.T) on both sides. hidden (K,N,D) of K heads, weight (V,D) for all or (K,V,D);
    teachers (P,D), teacher_weight (V,D): never trained; taught_by (K,N) int64: the row of teachers for each of hidden,
    a row at most once per head, so that its logits are computed once for all heads; targets (K,N) int64.
    sample_weight (K,N): rows of weight zero are never computed, whatever they hold. chunk: teachers at a time. Else as
    `linear_cross_entropy`.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        shared = teacher_weight is weight
        hidden, weight, teachers = hidden.to(dtype), weight.to(dtype), teachers.to(dtype)
        teacher_weight = weight if shared else teacher_weight.to(dtype)
    assert hidden.dtype == weight.dtype == teachers.dtype == teacher_weight.dtype
    if not chunk:
        chunk = _rows_at_a_time(hidden, len(teacher_weight), 3)  # probabilities, logits, logits for the targets
    pupils = torch.full((len(hidden), len(teachers)), -1, device=hidden.device)  # (K,P): the row that each one teaches
    k, n = sample_weight.nonzero(as_tuple=True)
    pupils[k, taught_by[k, n]] = n
    loss: Tensor = _LinearDistillation.apply(  # type: ignore[no-untyped-call]
        hidden, weight, teachers.detach(), teacher_weight.detach(), pupils, targets, sample_weight.detach(),
        temperature, kd_weight, chunk, logit_scale, soft_cap, torch.is_grad_enabled(),
    )  # fmt: skip
    return loss


def _rows_at_a_time(hidden: Tensor, vocab: int, tables: int) -> int:
    """Return how many rows a chunk holds of so many fp32 tables (n,V), and one in the product's type."""
    bytes_each = 4 * tables + (hidden.dtype.itemsize if hidden.dtype.itemsize < 4 else 0)
    return max(16, CHUNK_BYTES.get(hidden.device.type, 2**26) // (bytes_each * vocab))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor | SoftTargets,
        sample_weight: Tensor,
        chunk: int,
        logit_scale: float,
        soft_cap: float,
        with_grad: bool,
    ) -> Tensor:
        loss, grad_hidden, grad_weight = _sums(ctx, hidden, weight, with_grad)
        sums, wanted_grad = loss.dtype, grad_hidden is not None or grad_weight is not None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in torch.split(sample_weight.nonzero().squeeze(1), chunk):
                h = hidden[rows] * logit_scale  # (n,D)
                wanted = targets(rows) if callable(targets) else targets[rows]
                logits = (h @ weight.T).to(sums)  # (n,V)
                factors = sample_weight[rows].to(sums)
                losses = _cross_entropy(logits, wanted, factors, soft_cap, wanted_grad)
                loss += factors @ losses
                grad = logits.to(hidden.dtype)  # `logits` now holds its own gradient
                if grad_hidden is not None:
                    grad_hidden[rows] = (grad @ weight) * logit_scale
                if grad_weight is not None:
                    _add_product(grad_weight, grad, h)
                del logits, grad  # or the next chunk's would stand beside them
        ctx.gradients, ctx.weight_dtype = (grad_hidden, grad_weight), weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_scaled_gradients(ctx, grad), *(None,) * 6


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, teachers: Tensor, teacher_weight: Tensor, pupils: Tensor,
        targets: Tensor, sample_weight: Tensor, temperature: float, kd_weight: float, chunk: int, logit_scale: float,
        soft_cap: float, with_grad: bool,
    ) -> Tensor:  # fmt: skip
        loss, grad_hidden, grad_weight = _sums(ctx, hidden, weight, with_grad)
        sums, wanted_grad = loss.dtype, grad_hidden is not None or grad_weight is not None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in torch.split((pupils >= 0).any(0).nonzero().squeeze(1), chunk):
                logits = ((teachers[rows] * logit_scale) @ teacher_weight.T).to(sums)
                wanted, entropy = _softened(logits, temperature, soft_cap)  # (n,V), (n,)
                for k, each in enumerate(pupils[:, rows]):
                    taught = (each >= 0).nonzero().squeeze(1)
                    mine, w = each[taught], weight if weight.dim() == 2 else weight[k]
                    h, factors = hidden[k, mine] * logit_scale, sample_weight[k, mine].to(sums)
                    logits = (h @ w.T).to(sums)
                    whole = len(taught) == len(rows)  # but at the ends of texts: then without a copy
                    soft = (wanted, entropy) if whole else (wanted[taught], entropy[taught])
                    losses = _distilled(
                        logits, *soft, targets[k, mine], factors, temperature, kd_weight, soft_cap,
                        wanted_grad,
                    )  # fmt: skip
                    loss += factors @ losses
                    grad = logits.to(hidden.dtype)  # `logits` now holds its own gradient
                    if grad_hidden is not None:
                        grad_hidden[k, mine] = (grad @ w) * logit_scale
                    if grad_weight is not None:
                        _add_product(grad_weight if weight.dim() == 2 else grad_weight[k], grad, h)
                    del logits, grad, soft  # or the next head's would stand beside them
                del wanted
        ctx.gradients, ctx.weight_dtype = (grad_hidden, grad_weight), weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_scaled_gradients(ctx, grad), *(None,) * 11


def _sums(ctx: Any, hidden: Tensor, weight: Tensor, with_grad: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return zeros to add up in: the loss (float32 at the least), the gradients of hidden and weight where needed."""
    sums = torch.promote_types(hidden.dtype, torch.float32)
    for_hidden, for_weight = (with_grad and needed for needed in ctx.needs_input_grad[:2])
    grad_hidden = torch.zeros_like(hidden) if for_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=sums) if for_weight else None
    return torch.zeros((), dtype=sums, device=hidden.device), grad_hidden, grad_weight


def _scaled_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of hidden and weight that the forward pass took, times that of the loss."""
    assert ctx.gradients is not None, "the gradient can be taken once only"
    (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
    if grad_hidden is not None:
        grad_hidden.mul_(grad)
    if grad_weight is not None:  # in place: a copy would be as large as W
        grad_weight = grad_weight.mul_(grad).to(ctx.weight_dtype)
    return grad_hidden, grad_weight


def _softened(logits: Tensor, temperature: float, soft_cap: float) -> tuple[Tensor, Tensor]:
    """Return softmax(logits / T) (n,V) and its entropy (n,); logits are overwritten."""
    _capped(logits, soft_cap, False)
    logits.div_(temperature)
    logits.sub_(logits.logsumexp(1, keepdim=True))
    wanted = logits.exp()
    return wanted, -torch.linalg.vecdot(wanted, logits)


def _distilled(
    logits: Tensor, wanted: Tensor, entropy: Tensor, tokens: Tensor, factors: Tensor, temperature: float,
    kd_weight: float, soft_cap: float, with_grad: bool,
) -> Tensor:  # fmt: skip
    """Return the losses (n,) of logits (n,V), which are overwritten with the gradient of factors · losses."""
    slope = _capped(logits, soft_cap, with_grad)
    hard = logits.clone() if kd_weight < 1 else None
    share = kd_weight * temperature  # of T², one T is lost to the slope of logits / T
    losses = _cross_entropy(logits.div_(temperature), wanted, factors * share, 0.0, with_grad) - entropy
    losses.mul_(share * temperature)
    if hard is not None:
        losses += (1 - kd_weight) * _cross_entropy(hard, tokens, factors * (1 - kd_weight), 0.0, with_grad)
        logits.add_(hard)
    if slope is not None:
        logits.mul_(slope)
    return losses


def _capped(logits: Tensor, soft_cap: float, with_slope: bool) -> Tensor | None:
    """Cap logits in place; return the slope where it is wanted and not 1."""
    if not soft_cap:
        return None
    logits.div_(soft_cap).tanh_()
    slope = logits.square().neg_().add_(1) if with_slope else None
    logits.mul_(soft_cap)
    return slope


def _cross_entropy(logits: Tensor, wanted: Tensor, factors: Tensor, soft_cap: float, with_grad: bool) -> Tensor:
    """Return the losses (n,) of logits (n,V), which are overwritten with the gradient of factors · losses."""
    slope = _capped(logits, soft_cap, with_grad)
    hard = wanted.dim() == 1
    if hard:
        at_target, mass = logits.gather(1, wanted[:, None]).squeeze(1), torch.ones_like(factors)
    else:
        wanted = wanted.to(logits.dtype)
        at_target, mass = torch.linalg.vecdot(logits, wanted), wanted.sum(1)
    largest = logits.amax(1)
    total = logits.sub_(largest[:, None]).exp_().sum(1)
    losses = mass * (total.log() + largest) - at_target
    if with_grad:
        logits.mul_((factors * mass / total)[:, None])
        if hard:
            logits.scatter_add_(1, wanted[:, None], -factors[:, None])
        else:
            logits.addcmul_(wanted, factors[:, None], value=-1)
        if slope is not None:
            logits.mul_(slope)
    return losses


def _add_product(total: Tensor, grad: Tensor, h: Tensor) -> None:
    """Add grad.T @ h, (n,V) and (n,D), to total (V,D)."""
    if total.dtype == h.dtype:
        total.addmm_(grad.T, h)
    else:  # in blocks: the product in the lower type would be another matrix of total's size
        for block, part in zip(torch.split(total, 4096), torch.split(grad, 4096, 1), strict=True):
            block += part.T @ h
