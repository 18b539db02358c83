"""Trackers: what they are told, and one clear line where one is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from model.errors import UsageError
from model.training import tracking
from model.training.run_record import RunRecord
from model.training.tracking import require_tracker


def test_wandb_gets_all_numbers_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    wandb = ModuleType("wandb")

    def init(**given: Any) -> SimpleNamespace:
        calls.append(given)
        return SimpleNamespace(
            log=lambda numbers, step: calls.append((numbers, step)),
            finish=lambda: calls.append("end"),
        )

    monkeypatch.setattr(wandb, "init", init, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(tracking, "require_tracker", lambda name: None)
    record = RunRecord(tmp_path, 4, "wandb")
    record.add("validation", 5, {"loss": 2.0, "top1": [0.5, 0.25]})
    record.close()
    begun, logged, ended = calls
    assert (begun["dir"], begun["group"]) == (str(tmp_path), tmp_path.name)
    assert logged == (
        {"validation/loss": 2.0, "validation/top1/head1": 0.5, "validation/top1/head2": 0.25},
        5,
    )
    assert ended == "end"
    assert not (tmp_path / "runs").exists()


def test_a_missing_tracker_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="wandb is not installed"):
        require_tracker("wandb")
    require_tracker("tensorboard")
    require_tracker("none")


@pytest.mark.parametrize("name", ["tensorboard", "none"])
def test_the_record_itself_is_always_written(tmp_path: Path, name: str) -> None:
    record = RunRecord(tmp_path, 0, name)
    record.add("train", 1, {"loss": 1.0})
    record.close()
    assert "loss" in (tmp_path / "metrics.jsonl").read_text()
    assert (tmp_path / "runs").exists() == (name == "tensorboard")
