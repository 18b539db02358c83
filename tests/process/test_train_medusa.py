"""The recipe as a command: from a foreign GGUF to heads that load; bad input in one line."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from model import train_medusa
from model.base.gguf_file import GGUFFile
from model.base.llama import LlamaBase
from model.errors import DataError, UsageError
from model.heads.files import load_heads
from model.storage.folder_lock import WriterLock
from model.train_medusa import main
from model.training import train_command
from model.training.checkpoints import read_run
from model.training.options import TrainOptions, read_config
from model.training.output_folder import choose_output_dir, default_output_dir
from model.training.states.extraction import open_base

ROOT = Path(__file__).resolve().parents[2]
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
        (folder / f"{i}.txt").write_text(
            "".join(f"def f{i}_{n}(x):\n    return x + {n}\n" for n in range(40))
        )
    return folder


def command(gguf: Path, text: Path, folder: Path, *more: str) -> list[str]:
    places = ["--output_dir", str(folder / "out"), "--cache_dir", str(folder / "cache")]
    return [
        "--base_model_path",
        str(gguf),
        "--dataset_name",
        str(text),
        *places,
        *SMALL,
        "--max_tokens",
        "3000",
        *more,
    ]


def launch(arguments: list[str], cwd: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "N_THREADS": "1", "XDG_CACHE_HOME": str(cwd / "user-cache")}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "model" / "train_medusa.py"), *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--cache", "off", "--loss", "ce", "--head_type", "medusa"),
        ("--cache_dtype", "fp8", "--lm_head", "own", "--head_type", "medusa"),
        (
            "--loss",
            "kd",
            "--kd_temperature",
            "2",
            "--kd_weight",
            "0.5",
            "--lm_head",
            "own",
            "--report_to",
            "none",
        ),
    ],
)
def test_from_gguf_to_heads(
    foreign_gguf: Path, text: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    result = CliRunner().invoke(
        main, command(foreign_gguf, text, tmp_path, *more), catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    file = GGUFFile(foreign_gguf)
    heads, config = load_heads(tmp_path / "out" / "medusa_heads_best", file)
    assert heads.config.k_heads == 2
    assert heads.config.head_type == ("medusa" if "medusa" in more else "hydra")
    assert config["token_counts"].sum() > 1000
    assert all(bool((parameter != 0).any()) for parameter in heads.parameters())
    lines = [
        json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [
        line["loss"] for line in lines if line["kind"] == "train"
    ]  # validation's is always the cross-entropy
    assert losses[-1] < losses[0]
    assert "main.py bench" in result.output
    assert (tmp_path / "cache").exists() == ("off" not in more)
    assert (tmp_path / "out" / "runs").exists() == ("none" not in more)
    assert f"with {config['training']['validation']['tree_nodes']} nodes" in result.output


@pytest.mark.parametrize(("cache", "loss"), [("on", "ce"), ("off", "kd")])
def test_interrupt_says_how_to_go_on_and_that_leads_to_the_same_bits(
    foreign_gguf: Path,
    text: Path,
    tmp_path: Path,
    cache: str,
    loss: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a user does it: script, Ctrl-C, the printed line, from other directories."""
    monkeypatch.setenv("N_THREADS", "1")
    long = ["--epochs", "4", "--batch_size", "1", "--cache", cache, "--loss", loss]
    whole = CliRunner().invoke(
        main, command(foreign_gguf, text, tmp_path / "whole", *long), catch_exceptions=False
    )
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
    weights = Path("out", "medusa_heads_latest", "medusa_lm_head.safetensors")
    a = load_file(tmp_path / "whole" / weights)
    b = load_file(tmp_path / "parts" / weights)
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
        (["--loss", "mse"], "loss"),
        (["--kd_temperature", "0"], "kd_temperature"),
        (["--kd_weight", "1.5"], "kd_weight"),
        (["--report_to", "wandb"], "wandb is not installed"),
        (["--val_fraction", "1"], "val_fraction"),
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
    monkeypatch.setitem(sys.modules, "wandb", None)
    (tmp_path / "FILE").write_text("")
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "bad.yaml").write_text("learning_rat: 1")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(
        sys, "argv", ["train_medusa.py", *command(foreign_gguf, text, tmp_path, *more)]
    )
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
        assert (options.epochs, options.learning_rate, options.k_heads, options.batch_size) == (
            7,
            2e-3,
            3,
            0,
        )
    (tmp_path / "c.yaml").write_text("loss: kd\nkd_weight: 0.5\n")
    CliRunner().invoke(main, ["--config", str(tmp_path / "c.yaml")])
    assert (seen[-1].loss, seen.pop().kd_weight) == ("kd", 0.5)
    (tmp_path / "c.yaml").write_text("cache: off")  # YAML 1.1: a boolean
    CliRunner().invoke(main, ["--config", str(tmp_path / "c.yaml")])
    assert seen.pop().cache == "off"
    for content, says in (
        ("foo: 1", "unknown option foo"),
        ("- a\n- b", "option: value"),
        ("a: [", "not YAML"),
    ):
        (tmp_path / "c.yaml").write_text(content)
        with pytest.raises(UsageError, match=says):
            read_config(tmp_path / "c.yaml")


def test_a_resumed_run_brings_its_options(
    foreign_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Command line before YAML file before the run that is resumed, in whichever order named."""
    seen: list[TrainOptions] = []

    def catch(options: TrainOptions) -> None:
        seen.append(options)
        raise UsageError("enough")

    saved = {"options": {"epochs": 9, "k_heads": 9, "seed": 9, "output_dir": "/elsewhere"}}
    monkeypatch.setattr(train_medusa, "train", catch)
    monkeypatch.setattr(train_command, "read_run", lambda _: saved)
    config = tmp_path / "c.yaml"
    config.write_text("epochs: 7\nk_heads: 7\n")
    named = [
        ["--config", str(config)],
        ["--resume_from", str(tmp_path / "run")],
        ["--k_heads", "3"],
    ]
    for order in permutations(named):
        CliRunner().invoke(main, [word for words in order for word in words])
        options = seen.pop()
        assert (options.seed, options.epochs, options.k_heads) == (9, 7, 3)
        assert choose_output_dir(options, GGUFFile(foreign_gguf), tmp_path) == tmp_path / "run"
    config.write_text(f"resume_from: {tmp_path / 'run' / 'medusa_heads_latest'}")
    CliRunner().invoke(main, named[0])
    options = seen.pop()
    assert options.seed == 9
    assert choose_output_dir(options, GGUFFile(foreign_gguf), tmp_path) == tmp_path / "run"


def test_options_and_defaults_are_as_documented() -> None:
    documented = {
        "base_model_path": "",
        "head_type": "hydra",
        "k_heads": 5,
        "head_layers": 1,
        "hidden_dim": 0,
        "lm_head": "tied",
        "dataset_name": "",
        "dataset_split": "train",
        "max_length": 0,
        "batch_size": 0,
        "learning_rate": 0.0,
        "epochs": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "gradient_accumulation_steps": 1,
        "output_dir": "",
        "resume_from": "",
        "val_fraction": 0.05,
        "seed": 0,
        "device": "auto",
        "cache": "on",
        "cache_dir": "",
        "cache_dtype": "fp16",
        "loss": "kd",
        "kd_temperature": 1.0,
        "kd_weight": 1.0,
        "draft_vocab": None,
        "patience": 0,
        "report_to": "tensorboard",
    }
    defaults = {item.name: item.default for item in fields(TrainOptions)}
    assert {name: defaults.get(name) for name in documented} == documented
    names = {option.name for option in main.params}
    assert names == set(defaults) | {"config"}


def test_each_model_has_a_folder_of_its_own(tmp_path: Path) -> None:
    def name(path: str, fingerprint: str = "abcdef0123") -> str:
        return (
            default_output_dir(Path(path), fingerprint, tmp_path).relative_to(tmp_path).as_posix()
        )

    assert (
        name("models/tiny-python.Q4_0.gguf") == "tiny-python-retrained"
    )  # the bundled heads stay as they are
    assert name("/x/tiny-python.gguf") == "tiny-python-retrained"
    assert name("/x/demo.gguf") == "demo-abcdef01"
    assert name("vicuna-7b.Q4_K_M.gguf") == "vicuna-7b.Q4_K_M"
    heads = tmp_path / "vicuna-7b.Q4_K_M" / "medusa_heads_epoch_1"
    heads.mkdir(parents=True)
    (heads / "config.json").write_text('{"base_fingerprint": "abcdef0123"}')
    assert name("vicuna-7b.Q4_K_M.gguf") == "vicuna-7b.Q4_K_M"
    assert name("/other/vicuna-7b.Q4_K_M.gguf", "9876543210") == "vicuna-7b.Q4_K_M-98765432"
    (heads / "config.json").write_text("not ours")
    assert name("vicuna-7b.Q4_K_M.gguf") == "vicuna-7b.Q4_K_M-abcdef01"


def test_an_earlier_run_is_not_overwritten(
    foreign_gguf: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = command(foreign_gguf, text, tmp_path, "--epochs", "1")
    assert CliRunner().invoke(main, arguments, catch_exceptions=False).exit_code == 0
    best = tmp_path / "out" / "medusa_heads_best" / "medusa_lm_head.safetensors"
    before = best.stat().st_mtime_ns
    refused = CliRunner().invoke(main, [*arguments, "--seed", "1"])
    assert isinstance(refused.exception, UsageError)
    assert "--resume_from" in str(refused.exception) and "another --output_dir" in str(
        refused.exception
    )
    elsewhere = [
        "--resume_from",
        str(tmp_path / "elsewhere"),
    ]  # another run's end is no right to this folder
    monkeypatch.setattr(train_command, "read_run", lambda _: {"options": {}})
    assert "holds the heads" in str(CliRunner().invoke(main, [*arguments, *elsewhere]).exception)
    monkeypatch.undo()
    assert best.stat().st_mtime_ns == before
    seen: list[TrainOptions] = []
    monkeypatch.setattr(train_medusa, "train", seen.append)
    CliRunner().invoke(main, arguments)
    monkeypatch.undo()
    with (
        WriterLock(tmp_path / "out"),
        pytest.raises(DataError, match=f"process {os.getpid()} is writing there"),
    ):
        train_medusa.train(seen[0], overwrite=True)
    assert best.stat().st_mtime_ns == before
    train_medusa.train(seen[0], overwrite=True)
    assert best.stat().st_mtime_ns != before
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(steps)


def test_the_environment_reaches_the_states(
    foreign_gguf: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KV type and flash attention decide about states; a relative MODEL_PATH is saved whole."""
    opened: list[dict[str, object]] = []

    def spy(*arguments: Any, **kind: Any) -> LlamaBase:
        opened.append(kind)
        return open_base(*arguments, **kind)

    monkeypatch.setattr(train_medusa, "open_base", spy)
    monkeypatch.setenv("KV_TYPE", "f32")
    monkeypatch.setenv("FLASH_ATTENTION", "off")
    monkeypatch.chdir(foreign_gguf.parent)
    monkeypatch.setenv("MODEL_PATH", foreign_gguf.name)
    arguments = command(foreign_gguf, text, tmp_path, "--epochs", "1")[2:]
    assert CliRunner().invoke(main, arguments, catch_exceptions=False).exit_code == 0
    assert opened == [{"flash_attn": False, "kv_type": "f32"}]
    assert json.loads((tmp_path / "cache" / "manifest.json").read_text())["key"]["kv_type"] == "f32"
    assert read_run(tmp_path / "out")["options"]["base_model_path"] == str(foreign_gguf.resolve())


def test_log_level_is_heard(
    foreign_gguf: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOG_LEVEL", "DEBUG")
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(logging, "basicConfig", lambda **given: asked.append(given))
    CliRunner().invoke(main, command(foreign_gguf, text, tmp_path, "--max_length", "4096"))
    assert asked[0]["level"] == "DEBUG"
