"""With or without flash attention: the faster one is chosen, remembered and used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from model.base.llama import LlamaBase
from model.loaded_model import LoadedModel, LoadOptions
from model.planning import flash_attention
from model.planning.choice import DraftOptions, choose_in_slices
from model.planning.flash_attention import choose_flash_attention
from model.storage import facts
from model.trees.slices import Slices, begin, finish

OPTIONS = LoadOptions(n_threads=1, context_size=256, max_nodes=8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "folder", lambda: tmp_path)
    monkeypatch.setattr(flash_attention, "has_gpu", lambda: False)


@pytest.fixture(scope="module")
def model(bundled_gguf: Path) -> Iterator[LoadedModel]:
    loaded = LoadedModel(bundled_gguf, OPTIONS)
    yield loaded
    loaded.close()


@pytest.fixture
def loaded(model: LoadedModel) -> LoadedModel:
    """Of which nothing is known yet."""
    model.options = OPTIONS
    model.flash_attn = None
    return model


class FakeTimer:
    """Tells made-up times: of a base without flash attention, then of one with it."""

    seconds: tuple[dict[int, float], dict[int, float]]
    made = 0

    def __init__(self, base: LlamaBase) -> None:
        self._seconds = FakeTimer.seconds[FakeTimer.made % 2]
        FakeTimer.made += 1

    def prefill(self, context: int) -> Slices[None]:
        yield

    def run(self, n: int, context: int) -> float:
        assert n == 1, "plain steps"
        return self._seconds[context] / 100


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> type[FakeTimer]:
    FakeTimer.made = 0
    monkeypatch.setattr(flash_attention, "StepTimer", FakeTimer)
    return FakeTimer


@pytest.mark.parametrize(
    ("without", "using", "best"),
    [
        ({64: 1.0, 128: 2.0}, {64: 0.9, 128: 2.1}, True),
        ({64: 1.0, 128: 2.0}, {64: 0.9, 128: 2.5}, False),
        ({64: 1.0, 128: 2.0}, {64: 1.1, 128: 1.5}, True),
    ],
)
def test_the_faster_one_over_both_contexts_is_chosen(
    loaded: LoadedModel,
    timed: type[FakeTimer],
    without: dict[int, float],
    using: dict[int, float],
    best: bool,
) -> None:
    timed.seconds = (without, using)
    finish(choose_flash_attention(loaded))
    assert loaded.flash_attn is best


def test_it_is_measured_once_and_asked_for_again_afresh(
    loaded: LoadedModel, timed: type[FakeTimer]
) -> None:
    timed.seconds = ({64: 1.0, 128: 1.0}, {64: 0.5, 128: 0.5})
    assert begin(choose_flash_attention(loaded)) is None
    assert loaded.flash_attn is None, "nothing was measured before the first slice"
    finish(choose_flash_attention(loaded))
    assert timed.made == 2 and loaded.flash_attn

    # Remembered: for this number of threads alone.
    loaded.flash_attn = None
    finish(choose_flash_attention(loaded))
    assert timed.made == 2 and loaded.flash_attn
    loaded.flash_attn = None
    loaded.options = replace(OPTIONS, n_threads=2)
    finish(choose_flash_attention(loaded))
    assert timed.made == 4

    # Afresh.
    timed.seconds = timed.seconds[::-1]
    loaded.flash_attn = None
    finish(choose_flash_attention(loaded, afresh=True))
    assert timed.made == 6 and loaded.flash_attn is False


def test_what_was_asked_for_is_left_alone(
    loaded: LoadedModel, timed: type[FakeTimer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for asked in (False, True):
        loaded.flash_attn = asked
        finish(choose_flash_attention(loaded))
        assert loaded.flash_attn is asked
    loaded.flash_attn = None
    loaded.options = replace(OPTIONS, kv_type="q8_0")
    finish(choose_flash_attention(loaded))
    loaded.options = OPTIONS
    monkeypatch.setattr(flash_attention, "has_gpu", lambda: True)
    finish(choose_flash_attention(loaded))
    assert loaded.flash_attn is None and not timed.made


def test_real_steps_are_timed_and_later_contexts_follow(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash_attention, "ROUNDS", 2)
    drafting = finish(choose_in_slices(loaded, DraftOptions(sources="none"), []))
    assert drafting.description == "nothing" and isinstance(loaded.flash_attn, bool)
    with loaded.new_base(n_ctx=64) as base:
        assert base.flash_attn is loaded.flash_attn
    with loaded.new_base(n_ctx=64, flash_attn=not loaded.flash_attn) as other:
        assert other.flash_attn is not loaded.flash_attn
