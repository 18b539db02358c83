"""What the chunked losses share: chunk sizes, sums, and the cross-entropy of one chunk of logits.

The logits of a chunk are overwritten with their own gradient, as a second table would double the
memory. Knows neither the product that made them nor what becomes of the gradient.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Bytes of a chunk's logits; a GPU needs longer products to be busy.
CHUNK_BYTES = {"cpu": 3 * 2**24, "cuda": 2**29}
# On CPUs tables that stay in the cache are better, but products of few rows are slow. Two AVX2
# cores, 8,192 logits a row: a pass over them takes 0.1 ns a logit at 128 rows, 2 ns at 512;
# products run at 37 GFLOP/s of 32 rows, 80 of 128.
CACHED_BYTES = 3 * 2**22
CACHED_ROWS = 128
MIN_CHUNK = 16  # rows
WEIGHT_BLOCK = 4096  # rows of a weight's gradient that are converted at a time


@dataclass(frozen=True, kw_only=True)
class ChunkOptions:
    """How a chunked loss is computed. chunk: rows at a time; with_grad: take gradients too."""

    chunk: int
    logit_scale: float
    soft_cap: float
    with_grad: bool


def rows_per_chunk(hidden: Tensor, vocab: int, *, tables: int) -> int:
    """Return how many rows a chunk holds of so many fp32 tables (n,V) and the product's own."""
    bytes_each = 4 * tables
    if hidden.dtype.itemsize < 4:  # the product is another table, in a lower type
        bytes_each += hidden.dtype.itemsize
    row_bytes = bytes_each * vocab
    most = CHUNK_BYTES.get(hidden.device.type, 2**26) // row_bytes
    if hidden.device.type == "cpu":
        most = min(most, max(CACHED_ROWS, CACHED_BYTES // row_bytes))
    return max(MIN_CHUNK, most)


class Sums:
    """What a forward pass adds up: the loss, and the gradients of hidden and weight if needed.

    dtype: of the loss and of weight's gradient, float32 at the least.
    """

    def __init__(self, ctx: Any, hidden: Tensor, weight: Tensor, with_grad: bool) -> None:
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.loss = torch.zeros((), dtype=self.dtype, device=hidden.device)
        self.grad_hidden: Tensor | None = None
        self.grad_weight: Tensor | None = None
        if with_grad and of_hidden:
            self.grad_hidden = torch.zeros_like(hidden)
        if with_grad and of_weight:
            self.grad_weight = torch.zeros_like(weight, dtype=self.dtype)
        self.with_grad = with_grad and (of_hidden or of_weight)
        self._weight_dtype = weight.dtype

    def save(self, ctx: Any) -> None:
        """Keep the gradients for the backward pass."""
        ctx.gradients = (self.grad_hidden, self.grad_weight)
        ctx.weight_dtype = self._weight_dtype


def scaled_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients that the forward pass took, times that of the loss: in place."""
    assert ctx.gradients is not None, "the gradient can be taken once only"
    grad_hidden, grad_weight = ctx.gradients
    ctx.gradients = None
    if grad_hidden is not None:
        grad_hidden.mul_(grad)
    if grad_weight is not None:  # a copy would be as large as W
        grad_weight = grad_weight.mul_(grad).to(ctx.weight_dtype)
    return grad_hidden, grad_weight


def add_product(total: Tensor, grad: Tensor, h: Tensor) -> None:
    """Add grad.T @ h, (n,V) and (n,D), to total (V,D)."""
    if total.dtype == h.dtype:
        total.addmm_(grad.T, h)
        return
    # In blocks: the product in the lower type would be another matrix of total's size.
    blocks = torch.split(total, WEIGHT_BLOCK)
    parts = torch.split(grad, WEIGHT_BLOCK, 1)
    for block, part in zip(blocks, parts, strict=True):
        block += part.T @ h


def cross_entropy(
    logits: Tensor, targets: Tensor, factors: Tensor, *, soft_cap: float, with_grad: bool
) -> Tensor:
    """Return the losses (n,) of soft_cap(logits), and leave the gradient of factors · losses.

    targets: token ids (n,) int64, or weights (n,V), whose rows need not sum to 1.
    factors: (n,). with_grad: without, what is left in `logits` is of no use.
    """
    slope = cap(logits, soft_cap, with_slope=with_grad)
    hard = targets.dim() == 1
    if hard:
        at_target = logits.gather(1, targets[:, None]).squeeze(1)
        mass = torch.ones_like(factors)
    else:
        targets = targets.to(logits.dtype)
        at_target = torch.linalg.vecdot(logits, targets)
        mass = targets.sum(1)

    largest = logits.amax(1)
    total = logits.sub_(largest[:, None]).exp_().sum(1)
    losses = mass * (total.log() + largest) - at_target
    if not with_grad:
        return losses

    # The gradient: factors · (mass · softmax - targets) · slope.
    logits.mul_((factors * mass / total)[:, None])
    if hard:
        logits.scatter_add_(1, targets[:, None], -factors[:, None])
    else:
        logits.addcmul_(targets, factors[:, None], value=-1)
    if slope is not None:
        logits.mul_(slope)
    return losses


def cap(logits: Tensor, soft_cap: float, *, with_slope: bool) -> Tensor | None:
    """Replace logits with soft_cap · tanh(logits / soft_cap); 0: leave them alone.

    Returns the slope (n,V) where it is wanted and not 1.
    """
    if not soft_cap:
        return None
    logits.div_(soft_cap).tanh_()
    slope = logits.square().neg_().add_(1) if with_slope else None
    logits.mul_(soft_cap)
    return slope
