"""How many sequences at once: the smallest number that is about as fast as the fastest."""

from __future__ import annotations

import pytest

from model.training.distillation.parallelism import Parallelism, Rates, choose


@pytest.mark.parametrize(
    ("rates", "asked", "n", "flash_attn"),
    [
        ({False: {1: 200, 4: 150, 32: 190}, True: {1: 190, 4: 140}}, 0, 1, False),
        ({False: {1: 200, 32: 500, 64: 510}, True: {1: 190, 32: 400}}, 0, 32, False),
        ({False: {1: 200, 32: 500, 64: 510}, True: {1: 210, 32: 505, 64: 600}}, 0, 64, True),
        ({False: {8: 200}, True: {8: 300}}, 8, 8, True),
        ({False: {}, True: {}}, 0, 1, False),
        ({False: {}}, 8, 8, False),
    ],
)
def test_the_choice(rates: Rates, asked: int, n: int, flash_attn: bool) -> None:
    assert choose(rates, asked) == Parallelism(n=n, flash_attn=flash_attn)
