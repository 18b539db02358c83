"""check_loads: what llama.cpp refuses, or dies of, comes out as one line."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Foreign

from model.base import load_check
from model.base.gguf_file import GGUFFile
from model.base.load_check import check_loads
from model.errors import ModelFileError
from model.storage import facts


@pytest.fixture(autouse=True)
def _no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "folder", lambda: tmp_path / "cache")


def no_child(*_: object, **__: object) -> None:
    raise AssertionError("a child process was started")


def refusal(path: Path) -> str:
    with pytest.raises(ModelFileError) as error:
        check_loads(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_good_files_pass_and_are_remembered(
    foreign: Foreign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the child finds the package from anywhere
    assert check_loads(foreign.f32).n_vocab == 1024
    assert check_loads(foreign.q8_0).file_type == "Q8_0"
    monkeypatch.setattr(subprocess, "run", no_child)
    check_loads(foreign.f32)
    (tmp_path / "copy.gguf").write_bytes(foreign.f32.read_bytes())
    check_loads(tmp_path / "copy.gguf")  # the same file by content
    (tmp_path / "changed.gguf").write_bytes(
        foreign.f32.read_bytes().replace(b"foreign", b"renamed")
    )
    with pytest.raises(AssertionError, match="child process"):
        check_loads(tmp_path / "changed.gguf")


def test_files_that_are_none(
    foreign: Foreign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", no_child)  # the header tells
    assert "no such file" in refusal(tmp_path / "none.gguf")
    assert "this is a folder" in refusal(tmp_path)
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGML" + bytes(100))
    assert "not a GGUF" in refusal(path)
    path.write_bytes(foreign.q8_0.read_bytes()[:-1000])
    assert "damaged or cut off" in refusal(path)


def with_number(raw: bytes, key: str, value: int) -> bytes:
    """Put another number into an unsigned 32-bit metadata value."""
    at = raw.index(key.encode()) + len(key) + 4
    return raw[:at] + struct.pack("<I", value) + raw[at + 4 :]


@pytest.mark.parametrize(
    ("damage", "report"),
    [
        (
            lambda raw: raw.replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"),
            "llama.cpp cannot load this file",
        ),
        (
            lambda raw: with_number(raw, "llama.attention.head_count", 7),
            "llama.cpp cannot load this file",
        ),
        (
            lambda raw: with_number(raw, "llama.block_count", 9999),
            "llama.cpp crashed on this file (SIGABRT)",
        ),
        (
            lambda raw: raw.replace(b"<0x0A>", b"<0x0B>"),
            "its vocabulary has no piece for byte 0x0A",
        ),
        (
            lambda raw: raw.replace(b"<0x00>", b"<0x0_>"),
            "its vocabulary has no piece for byte 0x00",
        ),
        (
            lambda raw: raw.replace(b"<0xF0>", b"<0xF_>"),
            "its vocabulary has no piece for byte 0xF0",
        ),
        (lambda raw: raw.replace(b"<0x", b"[0x"), "its vocabulary has no piece for byte 0x00"),
    ],
    ids=[
        "tensor",
        "head_count",
        "block_count",
        "twice the same byte",
        "no NUL",
        "no lead byte",
        "no byte fallback",
    ],
)
def test_what_the_header_does_not_tell(
    damage: Callable[[bytes], bytes], report: str, foreign: Foreign, tmp_path: Path
) -> None:
    path = tmp_path / "x.gguf"
    raw = foreign.q8_0.read_bytes()
    path.write_bytes(damage(raw))
    assert path.read_bytes() != raw
    GGUFFile(path)  # opens: only loading shows it
    assert report in refusal(path)
    assert report in refusal(path)  # a failure is not remembered as a success


def test_the_child_tries_every_byte_that_utf8_can_hold(foreign: Foreign, tmp_path: Path) -> None:
    """Vocabularies of unknown kinds are tried: what aborts is found, whichever byte it is."""
    assert set(load_check.PROBE.encode()) == set(load_check.UTF8_BYTES)
    path = tmp_path / "x.gguf"
    path.write_bytes(foreign.q8_0.read_bytes().replace(b"<0xF3>", b"<0xF_>"))
    command = [sys.executable, "-m", "model.base.load_check", str(path)]
    assert (
        subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode
        == -signal.SIGABRT
    )


def test_llama_cpps_reasons_are_in_the_log(
    foreign: Foreign, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(
        foreign.q8_0.read_bytes().replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight")
    )
    with caplog.at_level("DEBUG"):
        assert "LOG_LEVEL=DEBUG" in refusal(path)
    assert "tensor 'blk.0.attn_q.weight' not found" in caplog.text


def test_weights_that_are_no_numbers(foreign: Foreign, tmp_path: Path) -> None:
    norm = foreign.torch_model.output_norm.weight
    old = norm.detach().numpy().tobytes()
    raw = foreign.f32.read_bytes()
    assert raw.count(old) == 1
    path = tmp_path / "nan.gguf"
    path.write_bytes(raw.replace(old, torch.full_like(norm, np.nan).numpy().tobytes()))
    assert "logits are not numbers" in refusal(path)


def test_a_slow_load_and_a_kill_are_named(
    foreign: Foreign, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelFileError, match="did not load this file within 0 s"):
        check_loads(foreign.f32, timeout=0.001)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], -9))
    assert "is there enough memory?" in refusal(foreign.f32)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    assert "(status 1)" in refusal(foreign.f32)


def test_the_parent_needs_no_llama_cpp(foreign: Foreign) -> None:
    code = "import sys, model.base.load_check; print('llama_cpp' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
    assert load_check.__doc__
