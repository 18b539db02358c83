"""The recipe as a command: from a GGUF that is not ours to heads that load, and bad input in one line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from itertools import permutations
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from config import HEADS_FOLDER
from model import train_medusa
from model.base.gguf_file import GGUFFile
from model.errors import UsageError
from model.heads.files import load_heads
from model.train_medusa import choose_output_dir, default_output_dir, main
from model.training.options import TrainOptions, read_config

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "--k_heads",
    "2",
    "--epochs",
    "2",
    "--max_length",
    "64",
    "--batch_size",
    "4",
    "--max_tokens",
    "3000",
    "--device",
    "cpu",
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text("".join(f"def f{i}_{n}(x):\n    return x + {n}\n" for n in range(40)))
    return folder


def command(gguf: Path, text: Path, folder: Path, *more: str) -> list[str]:
    places = ["--output_dir", str(folder / "out"), "--cache_dir", str(folder / "cache")]
    return ["--base_model_path", str(gguf), "--dataset_name", str(text), *places, *SMALL, "--max_tokens", "3000", *more]


def launch(arguments: list[str], cwd: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "N_THREADS": "1", "XDG_CACHE_HOME": str(cwd / "user-cache")}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "model" / "train_medusa.py"), *arguments], cwd=cwd, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("more", [(), ("--cache", "off"), ("--cache_dtype", "fp8", "--lm_head", "own")])
def test_from_gguf_to_heads(foreign_gguf: Path, text: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, command(foreign_gguf, text, tmp_path, *more), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    file = GGUFFile(foreign_gguf)
    heads, config = load_heads(tmp_path / "out" / "medusa_heads_best", file)
    assert heads.config.k_heads == 2
    assert config["token_counts"].sum() > 1000
    assert bool((heads.weight != 0).any())
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert "main.py bench" in result.output
    assert (tmp_path / "cache").exists() == ("off" not in more)


def test_interrupt_says_how_to_go_on_and_that_leads_to_the_same_bits(
    foreign_gguf: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user does it: script, Ctrl-C, the printed line, from other directories."""
    monkeypatch.setenv("N_THREADS", "1")
    long = ["--epochs", "4", "--batch_size", "1"]
    whole = CliRunner().invoke(main, command(foreign_gguf, text, tmp_path / "whole", *long), catch_exceptions=False)
    assert whole.exit_code == 0, whole.output
    stopped = launch(command(foreign_gguf, text, tmp_path / "parts", *long), tmp_path)
    metrics = tmp_path / "parts" / "out" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert stopped.poll() is None
        time.sleep(0.01)
    stopped.send_signal(signal.SIGINT)
    output, errors = stopped.communicate(timeout=60)
    assert stopped.returncode == 130, errors
    line = re.search(r"--resume_from \S+", output)
    assert line, output
    again = launch(line[0].split(), tmp_path / "parts")
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    a, b = (load_file(tmp_path / name / "out" / "medusa_heads_latest" / "medusa_lm_head.safetensors")
            for name in ("whole", "parts"))  # fmt: skip
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--base_model_path", "absent.gguf"], "absent.gguf"),
        (["--max_length", "4096"], "--max_length 4096"),
        (["--dataset_name", "absent.jsonl"], "absent.jsonl"),
        (["--dataset_name", "EMPTY"], "empty"),
        (["--output_dir", "FILE/out"], "is a file"),
        (["--k_heads", "0"], "k_heads"),
        (["--lm_head", "none"], "lm_head"),
        (["--resume_from", "nowhere"], "no run to go on with"),
        (["--config", "bad.yaml"], "unknown option learning_rat"),
        (["--no_such_option"], "no_such_option"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    foreign_gguf: Path, text: Path, tmp_path: Path, more: list[str], says: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "bad.yaml").write_text("learning_rat: 1")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["train_medusa.py", *command(foreign_gguf, text, tmp_path, *more)])
    with pytest.raises(SystemExit) as stop:
        train_medusa.run()
    assert stop.value.code == 2
    errors = capsys.readouterr().err.strip()
    assert says in errors
    assert errors.startswith("error: ")
    assert "\n" not in errors
    assert sorted(tmp_path.rglob("*")) == before


def test_config_file_sets_options_and_the_command_line_wins(
    foreign_gguf: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[TrainOptions] = []

    def catch(options: TrainOptions) -> None:
        seen.append(options)
        raise UsageError("enough")

    monkeypatch.setattr(train_medusa, "train", catch)
    (tmp_path / "c.yaml").write_text("epochs: 7\nlearning_rate: 2e-3\nk_heads: 4\n")
    for arguments in (["--config", str(tmp_path / "c.yaml"), "--k_heads", "3"],
                      ["--k_heads", "3", "--config", str(tmp_path / "c.yaml")]):  # fmt: skip
        CliRunner().invoke(main, arguments)
        options = seen.pop()
        assert (options.epochs, options.learning_rate, options.k_heads, options.batch_size) == (7, 2e-3, 3, 8)
    for content, says in (("foo: 1", "unknown option foo"), ("- a\n- b", "option: value"), ("a: [", "not YAML")):
        (tmp_path / "c.yaml").write_text(content)
        with pytest.raises(UsageError, match=says):
            read_config(tmp_path / "c.yaml")


def test_a_resumed_run_brings_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Command line before YAML file before the run that is resumed, in whichever order they are named."""
    seen: list[TrainOptions] = []

    def catch(options: TrainOptions) -> None:
        seen.append(options)
        raise UsageError("enough")

    saved = {"options": {"epochs": 9, "k_heads": 9, "seed": 9, "output_dir": "/elsewhere"}}
    monkeypatch.setattr(train_medusa, "train", catch)
    monkeypatch.setattr(train_medusa, "read_run", lambda _: saved)
    config = tmp_path / "c.yaml"
    config.write_text("epochs: 7\nk_heads: 7\n")
    named = [["--config", str(config)], ["--resume_from", str(tmp_path / "run")], ["--k_heads", "3"]]
    for order in permutations(named):
        CliRunner().invoke(main, [word for words in order for word in words])
        options = seen.pop()
        assert (options.seed, options.epochs, options.k_heads) == (9, 7, 3)
        assert choose_output_dir(options, Path("x.gguf")) == tmp_path / "run"
    config.write_text(f"resume_from: {tmp_path / 'run' / 'medusa_heads_latest'}")
    CliRunner().invoke(main, named[0])
    options = seen.pop()
    assert options.seed == 9
    assert choose_output_dir(options, Path("x.gguf")) == tmp_path / "run"


def test_options_and_defaults_are_as_documented() -> None:
    documented = {
        "base_model_path": "", "k_heads": 5, "head_layers": 1, "hidden_dim": 0, "lm_head": "tied", "dataset_name": "",
        "dataset_split": "train", "max_length": 0, "batch_size": 8, "learning_rate": 1e-3, "epochs": 3,
        "weight_decay": 0.0, "max_grad_norm": 1.0, "gradient_accumulation_steps": 1, "output_dir": "",
        "resume_from": "", "val_fraction": 0.05, "seed": 0, "device": "auto", "cache": "on", "cache_dir": "",
        "cache_dtype": "fp16",
    }  # fmt: skip
    defaults = {item.name: item.default for item in fields(TrainOptions)}
    assert {name: defaults.get(name) for name in documented} == documented
    names = {option.name for option in main.params}
    assert names == set(defaults) | {"config"}


def test_bundled_heads_are_not_overwritten_by_default() -> None:
    assert default_output_dir(Path("models/tiny-python.Q4_0.gguf")) == HEADS_FOLDER / "tiny-python-retrained"
    assert default_output_dir(Path("/x/tiny-python.gguf")) != HEADS_FOLDER / "tiny-python"
    assert default_output_dir(Path("vicuna-7b.Q4_K_M.gguf")) == HEADS_FOLDER / "vicuna-7b.Q4_K_M"
