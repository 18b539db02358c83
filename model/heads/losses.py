"""Cross-entropy of a linear layer that never holds the logits of all tokens.

The logits of one chunk of tokens exist at a time; their gradient is taken at once and folded into
those of the inputs, so that the backward pass only scales. Products are in the type of the inputs
(autocast's where it is on), sums in fp32 (fp64 for fp64). Knows neither heads nor training: it sees
rows, a matrix and targets.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.heads.chunks import (
    ChunkOptions,
    Sums,
    add_product,
    cross_entropy,
    rows_per_chunk,
    scaled_gradients,
)

SoftTargets = Callable[[Tensor], Tensor]  # row numbers (n,) int64 -> probabilities (n,V)


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
    """Return the sum over rows of sample_weight · cross-entropy(logits, targets).

    logits = soft_cap(logit_scale · hidden @ weight.T). hidden (N,D), weight (V,D); targets (N,)
    int64, or soft: (N,V), or a function that gives the rows asked for (so that those needn't exist
    at once either). Rows of weight zero are never computed, whatever they hold. The result is fp32;
    the caller divides. chunk: rows at a time, 0 for what suits the device. The gradient may be
    taken once, of hidden and of weight where they require it; targets and sample_weight get none.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden = hidden.to(dtype)
        weight = weight.to(dtype)
    assert hidden.dtype == weight.dtype, (hidden.dtype, weight.dtype)
    if sample_weight is None:
        sample_weight = torch.ones(len(hidden), device=hidden.device)
    options = ChunkOptions(
        chunk=chunk or rows_per_chunk(hidden, len(weight), tables=1),
        logit_scale=logit_scale,
        soft_cap=soft_cap,
        with_grad=torch.is_grad_enabled(),
    )
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, sample_weight.detach(), options
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
        options: ChunkOptions,
    ) -> Tensor:
        sums = Sums(ctx, hidden, weight, options.with_grad)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in torch.split(sample_weight.nonzero().squeeze(1), options.chunk):
                h = hidden[rows] * options.logit_scale  # (n,D)
                chunk_targets = targets(rows) if callable(targets) else targets[rows]
                logits = (h @ weight.T).to(sums.dtype)  # (n,V)
                factors = sample_weight[rows].to(sums.dtype)
                losses = cross_entropy(
                    logits,
                    chunk_targets,
                    factors,
                    soft_cap=options.soft_cap,
                    with_grad=sums.with_grad,
                )
                sums.loss += factors @ losses
                grad = logits.to(hidden.dtype)  # `logits` now holds its own gradient
                if sums.grad_hidden is not None:
                    sums.grad_hidden[rows] = (grad @ weight) * options.logit_scale
                if sums.grad_weight is not None:
                    add_product(sums.grad_weight, grad, h)
                del logits, grad  # else the next chunk's would be in memory beside them
        sums.save(ctx)
        return sums.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled_gradients(ctx, grad), *(None,) * 3
