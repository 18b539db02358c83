"""Cross-entropy of a linear layer that never holds the logits of all tokens.

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
CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**29}  # for a chunk's logits; a GPU needs longer products to be busy


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
        bytes_each = 4 + (hidden.dtype.itemsize if hidden.dtype.itemsize < 4 else 0)  # fp32 beside the product's type
        chunk = max(16, CHUNK_BYTES.get(hidden.device.type, 2**26) // (bytes_each * len(weight)))
    if sample_weight is None:
        sample_weight = torch.ones(len(hidden), device=hidden.device)
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, sample_weight.detach(), chunk, logit_scale, soft_cap, torch.is_grad_enabled()
    )
    return loss


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
        sums = torch.promote_types(hidden.dtype, torch.float32)
        for_hidden, for_weight = (with_grad and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden = torch.zeros_like(hidden) if for_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=sums) if for_weight else None
        loss = torch.zeros((), dtype=sums, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in torch.split(sample_weight.nonzero().squeeze(1), chunk):
                h = hidden[rows] * logit_scale  # (n,D)
                wanted = targets(rows) if callable(targets) else targets[rows]
                logits = (h @ weight.T).to(sums)  # (n,V)
                factors = sample_weight[rows].to(sums)
                losses = _cross_entropy(logits, wanted, factors, soft_cap, for_hidden or for_weight)
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
        assert ctx.gradients is not None, "the gradient can be taken once only"
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        if grad_hidden is not None:
            grad_hidden.mul_(grad)
        if grad_weight is not None:  # in place: a copy would be as large as W
            grad_weight = grad_weight.mul_(grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _cross_entropy(logits: Tensor, wanted: Tensor, factors: Tensor, soft_cap: float, with_grad: bool) -> Tensor:
    """Return the losses (n,) of logits (n,V), which are overwritten with the gradient of factors · losses."""
    slope = None
    if soft_cap:
        logits.div_(soft_cap).tanh_()
        slope = logits.square().neg_().add_(1) if with_grad else None
        logits.mul_(soft_cap)
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
