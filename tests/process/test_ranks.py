"""One run in two processes: the same losses as in one; nothing is lost when one is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from model.errors import UsageError
from model.train_medusa import main
from model.training.checkpoints import read_run
from model.training.precision import use_bf16
from model.training.ranks import ALONE, Ranks, ranks_asked_for

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"def f_{n}(x):\n    return x + {n}\n" for n in range(400)))
    return path


def options(gguf: Path, text: Path, folder: Path, *more: str) -> list[str]:
    places = ["--output_dir", str(folder / "out"), "--cache_dir", str(folder / "cache")]
    sizes = [
        "--k_heads",
        "2",
        "--max_length",
        "64",
        "--batch_size",
        "2",
        "--max_tokens",
        "3000",
        "--device",
        "cpu",
    ]
    return ["--base_model_path", str(gguf), "--dataset_name", str(text), *places, *sizes, *more]


def torchrun(arguments: list[str]) -> subprocess.Popen[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.Popen(
        [*run, str(ROOT / "model" / "train_medusa.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "N_THREADS": "2"},
    )


def losses(folder: Path) -> list[tuple[str, int, float]]:
    lines = map(json.loads, (folder / "out" / "metrics.jsonl").read_text().splitlines())
    return [(line["kind"], line["step"], line["loss"]) for line in lines]


def test_two_processes_learn_what_one_does(
    foreign_gguf: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--head_type", "hydra", "--loss", "kd", "--gradient_accumulation_steps", "3"]
    monkeypatch.setenv("N_THREADS", "1")
    both = torchrun(options(foreign_gguf, text, tmp_path / "both", *more, "--epochs", "2"))
    out, errors = both.communicate(timeout=200)
    assert both.returncode == 0, errors
    assert out.count("heads   2") == 1 and out.count("now     measure") == 1, "one of them tells"
    arguments = options(foreign_gguf, text, tmp_path / "alone", *more, "--epochs", "2")
    alone = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert alone.exit_code == 0, alone.output
    wanted, found = losses(tmp_path / "alone"), losses(tmp_path / "both")
    assert len(wanted) > 4 and [line[:2] for line in found] == [line[:2] for line in wanted]
    in_bf16 = use_bf16(torch.device("cpu"))  # of 8 bits: sums of other halves round otherwise
    for (_, _, a), (_, _, b) in zip(wanted, found, strict=True):
        assert b == pytest.approx(a, rel=2e-3 if in_bf16 else 1e-4)
    assert wanted[0][2] != pytest.approx(wanted[-1][2], rel=1e-2), "something was learnt"
    heads = [
        load_file(tmp_path / run / "out/medusa_heads_latest/medusa_lm_head.safetensors")
        for run in ("alone", "both")
    ]
    for name, tensor in heads[0].items():
        assert torch.allclose(
            tensor.float(), heads[1][name].float(), atol=5e-3 if in_bf16 else 1e-4
        ), name


def workers(torchrun: int) -> dict[str, int]:
    """Return the processes of a run by rank."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    found = dict[str, int]()
    for pid in children:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {v[5:].decode(): int(pid) for v in variables if v.startswith(b"RANK=")}
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes below /proc")
def test_a_killed_process_ends_the_run_and_loses_nothing(
    foreign_gguf: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = torchrun(options(foreign_gguf, text, tmp_path, "--epochs", "10"))
    metrics, deadline = tmp_path / "out" / "metrics.jsonl", time.monotonic() + 100
    while not metrics.exists() or metrics.read_text().count("validation") < 2:
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()
        time.sleep(0.02)
    os.kill(workers(run.pid)["0"], signal.SIGKILL)  # the one that writes
    _, errors = run.communicate(timeout=100)
    assert run.returncode != 0
    assert (
        "error: a process of this run failed" in errors and "go on with --resume_from" in errors
    ), errors
    saved = read_run(tmp_path / "out")
    done = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert saved["progress"]["step"] >= done - 10
    monkeypatch.setenv("N_THREADS", "1")
    again = CliRunner().invoke(
        main, ["--resume_from", str(tmp_path / "out")], catch_exceptions=False
    )
    assert again.exit_code == 0, again.output
    steps = [step for kind, step, _ in losses(tmp_path) if kind == "validation"]
    assert len(steps) == 10 and len(set(steps)) == 10, "no epoch is missing, none was made twice"


def test_what_torchrun_says_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (
        ranks_asked_for() == ALONE
        and ALONE.first
        and ALONE.gather([1]) == [[1]]
        and not ALONE.any(False)
    )
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="use torchrun"):
        ranks_asked_for()
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert ranks_asked_for() == Ranks(3, 4, 1, 2) and not ranks_asked_for().first
