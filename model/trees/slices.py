"""Measurements in slices, which whoever runs them takes one by one, when nothing else runs.

A measurement is a generator: it yields after each slice, is sent whether something disturbed that
slice, and returns its result. Knows not what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Slices = Generator[None, bool | None, T]


def undisturbed(run: Callable[[], T]) -> Slices[T]:
    """Run something in a slice of its own, again until nothing has disturbed it."""
    while True:
        result = run()
        disturbed = yield
        if not disturbed:
            return result


def begin(slices: Slices[T]) -> T | None:
    """Take the first slice; return the result where there was nothing to measure, else None."""
    try:
        next(slices)
    except StopIteration as done:
        result: T = done.value
        return result
    return None


def finish(slices: Slices[T]) -> T:
    """Take all slices at once, where nothing else runs, and return the result."""
    try:
        while True:
            next(slices)
    except StopIteration as done:
        result: T = done.value
        return result
