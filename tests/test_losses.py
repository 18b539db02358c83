"""The chunked loss: equal to autograd's, and never more than one chunk of logits in memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.heads.losses import linear_cross_entropy

N, D, V, CHUNK = 50, 12, 33, 7


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, factors: Tensor, scale: float = 1.0, cap: float = 0.0
) -> Tensor:
    logits = scale * hidden @ weight.T
    if cap:
        logits = cap * torch.tanh(logits / cap)
    soft = F.one_hot(targets, V).to(logits.dtype) if targets.dim() == 1 else targets
    return -(factors * (soft * logits.log_softmax(1)).sum(1)).sum()


def inputs(soft: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(N, V, dtype=torch.float64) if soft else torch.randint(V, (N,))
    factors = torch.rand(N, dtype=torch.float64)
    factors[10:30] = 0  # two whole chunks and parts of others
    return hidden, weight, targets, factors


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.7, 0.0), (0.7, 3.0)])
def test_loss_and_gradients_equal_autograd(soft: bool, scale: float, cap: float) -> None:
    hidden, weight, targets, factors = inputs(soft)
    loss = linear_cross_entropy(hidden, weight, targets, factors, chunk=CHUNK, logit_scale=scale, soft_cap=cap)
    expected = reference(hidden, weight, targets, factors, scale, cap)
    torch.testing.assert_close(loss, expected)
    got = torch.autograd.grad(3 * loss, (hidden, weight))
    torch.testing.assert_close(got, torch.autograd.grad(3 * expected, (hidden, weight)))


def test_gradients_equal_differences() -> None:
    hidden, weight, targets, factors = inputs()
    with torch.no_grad():
        direction = torch.randn_like(hidden)
        near = [
            linear_cross_entropy(hidden + step * direction, weight, targets, factors, chunk=CHUNK, soft_cap=3.0)
            for step in (-1e-5, 1e-5)
        ]
    loss = linear_cross_entropy(hidden, weight, targets, factors, chunk=CHUNK, soft_cap=3.0)
    gradient = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    torch.testing.assert_close((gradient * direction).sum(), (near[1] - near[0]) / 2e-5, rtol=1e-6, atol=0)
    with pytest.raises(AssertionError, match="once"):  # it was scaled in place
        torch.autograd.grad(loss, hidden)


def test_the_comparison_sees_a_wrong_target() -> None:
    hidden, weight, targets, factors = inputs()
    wrong = targets.clone()
    wrong[0] = (wrong[0] + 1) % V
    loss = linear_cross_entropy(hidden, weight, wrong, factors, chunk=CHUNK)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(loss, reference(hidden, weight, targets, factors))


def test_frozen_weight_gets_no_gradient_and_plain_cross_entropy_is_the_default() -> None:
    hidden, weight, targets, _ = inputs()
    weight = weight.detach()
    loss = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, targets, reduction="sum"))
    loss.backward()
    assert weight.grad is None
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets), loss.detach())


def test_masked_rows_are_never_touched() -> None:
    hidden, weight, targets, factors = inputs()
    clean = linear_cross_entropy(hidden, weight, targets, factors, chunk=CHUNK)
    dirty = hidden.detach().clone()
    dirty[10:30] = torch.nan
    dirty.requires_grad_()
    asked: list[int] = []

    def rows_of(rows: Tensor) -> Tensor:
        asked.extend(rows.tolist())
        return F.one_hot(targets[rows], V).double()

    loss = linear_cross_entropy(dirty, weight, rows_of, factors, chunk=CHUNK)
    torch.testing.assert_close(loss, clean)
    loss.backward()
    assert dirty.grad is not None
    assert not dirty.grad[10:30].any()
    assert dirty.grad.isfinite().all()
    assert asked == [*range(10), *range(30, N)]
    nothing = linear_cross_entropy(dirty, weight, targets, torch.zeros(N))
    assert nothing.item() == 0.0
    nothing.backward()


def test_bf16_products_with_fp32_sums_stay_close() -> None:
    hidden, weight, targets, factors = inputs()
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight)]
    loss = linear_cross_entropy(low[0], low[1], targets, factors.float(), chunk=CHUNK)
    exact = reference(low[0].double(), low[1].double(), targets, factors)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=5e-3, atol=0)
    got, expected = torch.autograd.grad(loss, low), torch.autograd.grad(exact, low)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - b).norm() < 0.01 * b.norm()


def test_autocast_decides_the_type_of_the_products() -> None:
    hidden, weight, targets, _ = (t.float() if t.is_floating_point() else t for t in inputs())
    with torch.autocast("cpu", torch.bfloat16), Largest() as seen:
        linear_cross_entropy(hidden, weight, targets)
    assert torch.bfloat16 in seen.types_of_products


class Largest(TorchDispatchMode):
    """Watches every tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0
        self.types_of_products: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
                if "mm" in func.__name__:
                    self.types_of_products.add(tensor.dtype)
        return result


@pytest.mark.parametrize("own", [False, True])
def test_no_tensor_is_larger_than_a_chunk_of_logits(own: bool) -> None:
    rows, vocab, chunk = 512, 3000, 32
    hidden = torch.randn(rows, 8, requires_grad=True)
    weight = torch.randn(vocab, 8, requires_grad=own)
    targets = torch.randint(vocab, (rows,))

    def largest(loss: Callable[[], Tensor]) -> int:
        with Largest() as seen:
            loss().backward()
        return int(seen.numel)

    ours = largest(lambda: linear_cross_entropy(hidden, weight, targets, chunk=chunk))
    assert ours == chunk * vocab
    materialised = largest(lambda: F.cross_entropy(hidden @ weight.T, targets))
    assert materialised == rows * vocab  # the watch does see it
