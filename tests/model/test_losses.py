"""The chunked losses: equal to autograd's, and never more than one chunk of logits in memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.heads.distillation import linear_distillation
from model.heads.losses import linear_cross_entropy

N, D, V, CHUNK = 50, 12, 33, 7


def reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    factors: Tensor,
    scale: float = 1.0,
    cap: float = 0.0,
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
    loss = linear_cross_entropy(
        hidden, weight, targets, factors, chunk=CHUNK, logit_scale=scale, soft_cap=cap
    )
    expected = reference(hidden, weight, targets, factors, scale, cap)
    torch.testing.assert_close(loss, expected)
    got = torch.autograd.grad(3 * loss, (hidden, weight))
    torch.testing.assert_close(got, torch.autograd.grad(3 * expected, (hidden, weight)))


def test_gradients_equal_differences() -> None:
    hidden, weight, targets, factors = inputs()
    with torch.no_grad():
        direction = torch.randn_like(hidden)
        near = [
            linear_cross_entropy(
                hidden + step * direction, weight, targets, factors, chunk=CHUNK, soft_cap=3.0
            )
            for step in (-1e-5, 1e-5)
        ]
    loss = linear_cross_entropy(hidden, weight, targets, factors, chunk=CHUNK, soft_cap=3.0)
    gradient = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    torch.testing.assert_close(
        (gradient * direction).sum(), (near[1] - near[0]) / 2e-5, rtol=1e-6, atol=0
    )
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
    got = torch.autograd.grad(loss, low)
    expected = torch.autograd.grad(exact, low)
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
    rows = 512
    vocab = 3000
    chunk = 32
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


K = 3


def lesson(own: bool = False) -> dict[str, Any]:
    """Rows of N neighbouring positions; the last ones and some in between are taught by none."""
    torch.manual_seed(0)
    weight = (
        torch.randn(K, V, D, dtype=torch.float64) if own else torch.randn(V, D, dtype=torch.float64)
    )
    factors = torch.rand(K, N, dtype=torch.float64)
    factors[:, 10:17] = 0
    factors[1, 30] = 0
    return {
        "hidden": torch.randn(K, N, D, dtype=torch.float64, requires_grad=True),
        "weight": weight.requires_grad_(),
        "teachers": torch.randn(N + K, D, dtype=torch.float64),
        "teacher_weight": torch.randn(V, D, dtype=torch.float64),
        "taught_by": torch.arange(N) + 1 + torch.arange(K)[:, None],
        "targets": torch.randint(V, (K, N)),
        "sample_weight": factors,
    }


def materialised(
    given: dict[str, Any], temperature: float, kd_weight: float, scale: float, cap: float
) -> Tensor:
    def shaped(logits: Tensor) -> Tensor:
        return cap * torch.tanh(scale * logits / cap) if cap else scale * logits

    student = shaped(given["hidden"] @ given["weight"].mT)  # (K,N,V)
    teacher = shaped(given["teachers"] @ given["teacher_weight"].T)[given["taught_by"]]
    soft = F.kl_div(
        (student / temperature).log_softmax(-1),
        (teacher / temperature).log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    hard = F.cross_entropy(
        student.flatten(0, 1), given["targets"].flatten(), reduction="none"
    ).view(K, N)
    loss: Tensor = (
        given["sample_weight"] * (kd_weight * temperature**2 * soft + (1 - kd_weight) * hard)
    ).sum()
    return loss


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    ("temperature", "kd_weight"), [(1.0, 1.0), (2.0, 1.0), (0.5, 0.3), (1.0, 0.0)]
)
@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.7, 3.0)])
def test_distillation_equals_materialised_logits(
    own: bool, temperature: float, kd_weight: float, scale: float, cap: float
) -> None:
    given = lesson(own)
    kind: dict[str, Any] = {
        "temperature": temperature,
        "kd_weight": kd_weight,
        "logit_scale": scale,
        "soft_cap": cap,
    }
    loss = linear_distillation(**given, **kind, chunk=CHUNK)
    expected = materialised(given, temperature, kd_weight, scale, cap)
    torch.testing.assert_close(loss, expected)
    trained = [given["hidden"], given["weight"]]
    got = torch.autograd.grad(3 * loss, trained)
    torch.testing.assert_close(got, torch.autograd.grad(3 * expected, trained))


def test_the_comparison_sees_a_teacher_one_place_off() -> None:
    given = lesson()
    losses = (
        linear_distillation(**{**given, "taught_by": given["taught_by"] - 1}, chunk=CHUNK),
        materialised(given, 1.0, 1.0, 1.0, 0.0),
    )
    wrong, right = (torch.autograd.grad(loss, given["hidden"])[0] for loss in losses)
    assert abs(losses[0] - losses[1]) > 1e-3 * losses[1]
    assert (wrong - right).norm() > 0.1 * right.norm()
    equal = {
        **given,
        "hidden": given["teachers"][given["taught_by"]],
        "weight": given["teacher_weight"],
    }
    nothing_to_learn = float(linear_distillation(**equal))
    assert nothing_to_learn == pytest.approx(0.0, abs=1e-9)


def test_distillation_leaves_masked_rows_alone() -> None:
    given = lesson()
    clean = linear_distillation(**given, chunk=CHUNK)
    dirty = {name: given[name].detach().clone() for name in ("hidden", "teachers")}
    dirty["hidden"][:, 10:17] = torch.nan
    dirty["teachers"][0] = torch.nan
    dirty["hidden"].requires_grad_()
    loss = linear_distillation(**{**given, **dirty}, chunk=CHUNK)
    torch.testing.assert_close(loss, clean)
    loss.backward()
    gradient = dirty["hidden"].grad
    assert gradient is not None and gradient.isfinite().all() and not gradient[:, 10:17].any()


def test_teachers_are_computed_once_for_all_heads() -> None:
    given = lesson()
    asked: list[int] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if (
                func is torch.ops.aten.mm.default
                and args[1].data_ptr() == given["teacher_weight"].data_ptr()
            ):
                asked.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    with Counting(), torch.no_grad():  # type: ignore[no-untyped-call]
        linear_distillation(**given, chunk=CHUNK)
    used = given["taught_by"][given["sample_weight"] > 0].unique()
    assert sum(asked) == len(used) < (given["sample_weight"] > 0).sum() / 2
    assert max(asked) == CHUNK


def test_distillation_holds_no_more_than_a_chunk() -> None:
    rows = 512
    vocab = 3000
    chunk = 32
    given: dict[str, Any] = {
        "hidden": torch.randn(K, rows, 8, requires_grad=True),
        "weight": torch.randn(vocab, 8),
        "teachers": torch.randn(rows + K, 8),
        "taught_by": torch.arange(rows) + 1 + torch.arange(K)[:, None],
        "targets": torch.randint(vocab, (K, rows)),
        "sample_weight": torch.ones(K, rows),
    }
    with Largest() as seen:
        linear_distillation(
            **given, teacher_weight=given["weight"], kd_weight=0.5, chunk=chunk
        ).backward()
    assert seen.numel == chunk * vocab


def test_distillation_in_bf16_stays_close() -> None:
    given = {name: t.float() if t.is_floating_point() else t for name, t in lesson().items()}
    expected = materialised(given, 1.0, 1.0, 1.0, 0.0)
    with torch.autocast("cpu", torch.bfloat16), Largest() as seen:
        loss = linear_distillation(**given, chunk=CHUNK)
    assert torch.bfloat16 in seen.types_of_products
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
