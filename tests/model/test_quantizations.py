"""What other types would bring: extrapolation is exact where it can be, no file is left behind."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.base.gguf_file import GGUFFile, requantize
from model.base.llama import LlamaBase
from model.errors import ModelFileError, OutputError, UsageError
from model.evaluation import partial_copies, quantizations
from model.evaluation.partial_copies import (
    ColdCacheTimer,
    extrapolate,
    layers_timed,
    time_in_turn,
)
from model.evaluation.quantizations import TypeRow, compare_types, parse_types, table
from model.loaded_model import LoadedModel, LoadOptions
from model.planning.auto_tuning import Tuning
from model.planning.measured_steps import StepTimer
from model.trees.costs import CostCurve
from model.trees.search import best_tree

SIZES = (1, 2, 3, 4, 6, 8, 12, 16)
RATES = [[0.7, 0.15], [0.6, 0.1], [0.5, 0.1]]
TUNING = Tuning(CostCurve((64,), (1, 2), ((1.0, 2.0),)), [1e-4, 2e-4, 3e-4], RATES, 100)


@pytest.fixture(scope="module")
def loaded(bundled_gguf: Path) -> Iterator[LoadedModel]:
    loaded = LoadedModel(bundled_gguf, LoadOptions(n_threads=1, context_size=512, max_nodes=16))
    yield loaded
    loaded.close()


def cost(kind: str, layers: int, n: int) -> float:
    """Seconds that a step is said to take."""
    ends, each, more = {"Q4_0": (1e-3, 2e-3, 0.1), "BF16": (3e-3, 5e-3, 0.01)}[kind]
    return ends * (1 + more * n) + layers * each * (
        1 + more * n + (0.5 if kind == "Q4_0" and n % 4 > 1 else 0.0)
    )


class FakeTimer:
    """Stands for ColdCacheTimer; says what `cost` says."""

    def __init__(self, base: LlamaBase, evicting: np.ndarray[Any, Any]) -> None:
        file = GGUFFile(base.model.path)
        self._kind, self._layers = file.file_type, file.n_layer

    def run(self, n: int, context: int) -> float:
        assert context == 64
        return cost(self._kind, self._layers, n)


def test_all_layers_are_extrapolated_from_a_few_exactly() -> None:
    def a(n: int) -> float:
        return 0.004 + 0.001 * n

    def b(n: int) -> float:
        return 0.002 + 0.0001 * n + 0.001 * (n == 3)

    runs = {k: (lambda n, context, k=k: a(n) + k * b(n)) for k in (2, 4)}
    seconds = time_in_turn(runs, SIZES, 64, 0.0)
    curve = extrapolate(seconds, (2, 4), 22, 64)
    exact = [a(n) + 22 * b(n) for n in SIZES]
    np.testing.assert_allclose(curve.seconds[0], exact, rtol=1e-12)
    assert (curve.contexts, curve.sizes) == ((64,), SIZES)
    in_proportion = extrapolate(seconds, (4,), 22, 64).seconds[0][0] * 22 / 4
    assert in_proportion / exact[0] > 1.2, "a must not be counted once per layer"


def test_extrapolation_supposes_equal_layers_and_notices_nothing_else() -> None:
    """The control: times that are not a + layers · b are not recovered: the test above can fail."""
    runs = {k: (lambda n, context, k=k: 0.01 + 0.001 * n * k**1.2) for k in (2, 4)}
    curve = extrapolate(time_in_turn(runs, SIZES, 64, 0.0), (2, 4), 22, 64)
    assert abs(curve.seconds[0][-1] / (0.01 + 0.016 * 22**1.2) - 1) > 0.1


def test_spikes_and_layers_that_seem_free_do_no_harm() -> None:
    calls = {2: 0, 4: 0}

    def run(k: int) -> float:
        calls[k] += 1
        spike = 0.1 if calls[k] % (3 * len(SIZES)) == k else 0.0  # in one of three rounds
        return 0.01 + 0.001 * k + spike

    seconds = time_in_turn(
        {2: lambda n, context: run(2), 4: lambda n, context: run(4)}, SIZES, 64, 0.5
    )
    assert max(seconds[2][2]) > 0.1 and max(seconds[4][4]) > 0.1, "there are spikes"
    np.testing.assert_allclose(extrapolate(seconds, (2, 4), 22, 64).seconds[0], 0.032)
    backwards = {1: {2: [0.5], 4: [0.4]}, 2: {2: [0.6], 4: [0.7]}}
    np.testing.assert_allclose(extrapolate(backwards, (2, 4), 22, 64).seconds[0], [0.5, 1.6])


def test_copies_have_the_layers_that_there_are() -> None:
    assert [layers_timed(n) for n in (1, 2, 3, 4, 5, 22)] == [
        (1,),
        (1, 2),
        (1, 3),
        (2, 4),
        (2, 4),
        (2, 4),
    ]


def test_types_are_compared_by_a_few_layers(
    loaded: LoadedModel,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(partial_copies, "ColdCacheTimer", FakeTimer)
    timed = list[str]()
    rows = compare_types(
        loaded, TUNING, ["bf16", "q4_0+q4_0"], budget_s=0.0, folder=tmp_path, on_timing=timed.append
    )
    assert not list(tmp_path.iterdir())
    assert timed == ["the file as it is", "bf16", "q4_0+q4_0"]
    assert [row.name for row in rows] == ["q4_0, this file", "q4_0, by its parts", *timed[1:]]
    assert [row.layers for row in rows] == [(6,), (2, 4), (2, 4), (2, 4)]
    for row, kind in zip(rows, ("Q4_0", "Q4_0", "BF16", "Q4_0"), strict=True):
        expected = [cost(kind, 6, n) for n in SIZES]
        np.testing.assert_allclose(row.curve.seconds[0], expected, rtol=1e-9)
        assert row.plain_tokens_per_s == pytest.approx(1 / expected[0])
        assert row.ratio_4 == pytest.approx(expected[3] / expected[0])
        on_offer = np.full(16, np.inf)
        on_offer[np.array(SIZES) - 1] = expected
        best = best_tree(RATES, on_offer, draft_seconds=TUNING.draft_s, max_nodes=16)
        np.testing.assert_array_equal(row.best.tree.parents, best.tree.parents)
        assert row.best.tokens_per_s == pytest.approx(best.tokens_per_s)
        assert row.best.speedup == pytest.approx(best.speedup) and row.best.speedup > 1.2
    assert rows[0].size == rows[1].size == loaded.file.path.stat().st_size
    assert len(rows[2].best.tree) != len(rows[3].best.tree), "each type has its own tree"
    assert rows[3].size < rows[0].size < rows[2].size
    whole = tmp_path_factory.mktemp("whole") / "x.gguf"
    requantize(loaded.file.path, whole, "q4_0", "q4_0", threads=1)
    assert rows[3].size == whole.stat().st_size


def test_whole_copies_are_timed_as_they_are(loaded: LoadedModel, tmp_path: Path) -> None:
    rows = compare_types(loaded, TUNING, ["q4_0+q4_0"], full=True, budget_s=0.0, folder=tmp_path)
    assert [row.layers for row in rows] == [(6,), (6,)] and not list(tmp_path.iterdir())
    assert rows[1].size < rows[0].size
    assert all(0 < row.plain_tokens_per_s < 50_000 and row.ratio_4 > 0 for row in rows)
    assert "--full" not in table(rows), "nothing was extrapolated"
    keys = {
        "type",
        "bytes",
        "plain_tokens_per_s",
        "ratio_4",
        "tree_nodes",
        "tree_depth",
        "speedup",
        "tokens_per_s",
    }
    assert keys <= rows[1].to_json().keys()


def test_nothing_is_left_when_it_is_stopped(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(FakeTimer):
        def run(self, n: int, context: int) -> float:
            assert len(list(tmp_path.rglob("*.gguf"))) == (4 if self._kind == "BF16" else 2)
            if self._kind == "BF16":
                raise KeyboardInterrupt
            return super().run(n, context)

    monkeypatch.setattr(partial_copies, "ColdCacheTimer", Stopped)
    with pytest.raises(KeyboardInterrupt):
        compare_types(loaded, TUNING, ["bf16"], budget_s=0.0, folder=tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1000)
    )
    with pytest.raises(OutputError, match="are free"):
        compare_types(loaded, TUNING, ["bf16"], budget_s=0.0, folder=tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OutputError, match=r"nowhere: cannot be written .* set TMPDIR"):
        compare_types(loaded, TUNING, ["bf16"], folder=tmp_path / "nowhere")


def test_what_a_few_layers_cannot_tell(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="quantization 'q9' is unknown"):
        compare_types(loaded, TUNING, ["q4_0", "q9"], folder=tmp_path)
    monkeypatch.setattr(quantizations, "layers_alike", lambda file: False)
    with pytest.raises(ModelFileError, match=r"its layers differ.*use --full"):
        compare_types(loaded, TUNING, ["q4_0"], folder=tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(
        loaded, "options", LoadOptions(n_threads=1, context_size=512, n_gpu_layers=3)
    )
    with pytest.raises(UsageError, match=r"N_GPU_LAYERS=3: .*use --full"):
        compare_types(loaded, TUNING, ["q4_0"], folder=tmp_path)


def test_the_caches_are_filled_before_each_step(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = list[str]()

    class Evicting:
        def sum(self) -> None:
            events.append("evict")

    def steps(timer: StepTimer, n: int) -> float:
        events.append("step")
        return 0.001

    monkeypatch.setattr(StepTimer, "_step", steps)
    with loaded.new_base() as base:
        timer: Any = ColdCacheTimer(base, Evicting())  # type: ignore[arg-type]
        assert timer.run(1, 64) == 0.001
    assert events == ["evict", "step"] * 3  # a quick step is timed twice more


def test_lists_of_types() -> None:
    assert parse_types(" q4_0,Q4_0+Q4_0,,bf16,q4_0") == ["q4_0", "q4_0+q4_0", "bf16"]
    for text, words in (
        ("", "no types in ''"),
        ("q4_0,q9", "'q9' is unknown"),
        ("q4_0+", "tensor type ''"),
    ):
        with pytest.raises(UsageError, match=words):
            parse_types(text)


def row(
    name: str,
    plain: float,
    kind: str | None = None,
    output_type: str | None = None,
    *,
    layers: tuple[int, ...] = (2, 4),
    size: int = 620_000_000,
) -> TypeRow:
    curve = CostCurve((64,), (1, 4), ((1 / plain, 1.6 / plain),))
    best = best_tree(
        RATES, np.array([1, np.inf, np.inf, 1.6]) / plain, draft_seconds=0.0, max_nodes=4
    )
    return TypeRow(
        name=name,
        size=size,
        curve=curve,
        best=best,
        layers=layers,
        kind=kind,
        output_type=output_type,
    )


def test_the_table_says_all_and_what_to_do() -> None:
    this, parts = row("q4_k_m, this file", 50.0, layers=(22,)), row("q4_k_m, by its parts", 55.0)
    rows = [
        this,
        parts,
        row("q4_0+q4_0", 70.0, "Q4_0", "Q4_0"),
        row("bf16", 20.0, "BF16", None, size=2_200_000_000),
    ]
    text = table(rows)
    lines = text.splitlines()
    assert len({len(line) for line in lines[:5]}) == 1, "columns"
    for words in (
        *(r.name for r in rows),
        "620.0 MB",
        "2.20 GB",
        " 1.60 ",
        "70.0",
        "chain of 3, 3 drafted",
    ):
        assert words in text, words
    assert (
        f"{rows[2].best.speedup:.2f}x" in lines[3]
        and f"{rows[2].best.tokens_per_s:.1f}" in lines[3]
    )
    assert (
        "by 2 and 4 of 22 layers. For this file that gives 0.91 times what a token really takes"
        in lines[5]
    )
    command = "python main.py requantize --type q4_0 --output_type q4_0 OUT.gguf"
    assert lines[6] == f"Expected 1.27 times as fast as this file with its best tree: {command}", (
        "held against its parts"
    )
    assert "None of these types" in table([this, parts, rows[3]])
    assert table([this, row("bf16", 60.0, "BF16", None, layers=(22,))]).endswith(
        "requantize --type bf16 OUT.gguf"
    )
    far = table([this, row("q4_k_m, by its parts", 75.0), rows[2]])
    assert "too far off to go by" in far and "requantize" not in far
