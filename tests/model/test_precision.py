"""Number types: measured once, then remembered."""

from __future__ import annotations

import pytest
import torch

from model.training import precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(("bf16_seconds", "faster"), [(0.5, True), (0.95, False), (2.0, False)])
def test_bf16_is_used_where_it_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, bf16_seconds: float, faster: bool
) -> None:
    facts: dict[str, object] = {}
    monkeypatch.setattr(precision, "recall", lambda kind: facts)
    monkeypatch.setattr(
        precision, "remember", lambda kind, key, value: facts.__setitem__(key, value)
    )
    seconds = {torch.float32: 1.0, torch.bfloat16: bf16_seconds}
    monkeypatch.setattr(precision, "_seconds", lambda dtype: seconds[dtype])
    assert precision.use_bf16(CPU) is faster
    seconds[torch.bfloat16] = 1e9 if faster else 1e-9  # a later measurement changes nothing
    assert precision.use_bf16(CPU) is faster
    facts.clear()
    assert precision.use_bf16(CPU) is not faster


def test_products_are_timed() -> None:
    assert precision._seconds(torch.float32) > 0
