"""Settings: defaults, bad values, and the README's table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from config import ROOT, Settings, settings_table
from model.base.known_models import BUNDLED, smollm2_if_installed
from model.base.llama import KV_TYPES, QUANTIZED_KV
from model.errors import UsageError


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def test_defaults() -> None:
    s = Settings.load()
    assert s.model_path == smollm2_if_installed()
    assert s.medusa_weights_path is None
    assert (s.n_gpu_layers, s.use_mmap, s.use_mlock, s.kv_type, s.flash_attn) == (
        -1,
        True,
        False,
        "f16",
        None,
    )
    assert (s.medusa_k_heads, s.medusa_max_tokens_per_step, s.log_level) == (None, 64, "WARNING")
    assert (s.host, s.port, s.api_key, s.origins, s.hosts) == ("127.0.0.1", 8000, None, (), ())
    assert 1 <= s.n_threads <= len(os.sched_getaffinity(0))


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "MODEL_PATH": "a/b.gguf",
        "MEDUSA_WEIGHTS_PATH": "heads",
        "MODEL_CONTEXT_SIZE": "512",
        "N_GPU_LAYERS": "7",
        "N_THREADS": "3",
        "USE_MMAP": "false",
        "USE_MLOCK": "1",
        "FLASH_ATTENTION": "off",
        "KV_TYPE": "bf16",
        "MEDUSA_K_HEADS": "2",
        "MEDUSA_MAX_TOKENS_PER_STEP": "16",
        "LOG_LEVEL": "DEBUG",
        "HOST": "0.0.0.0",
        "PORT": "9000",
        "API_KEY": " sk-1 ",
        "CORS_ORIGINS": "https://a.example/, http://b:1",
        "ALLOWED_HOSTS": "llm.home,,box",
        "N_PARALLEL": "8",
        "MAX_QUEUE": "0",
        "MAX_BODY_BYTES": "5000",
        "REQUEST_TIMEOUT": "60",
        "SHUTDOWN_TIMEOUT": "0",
        "CACHE_TOKENS": "9999",
        "PROMPT_CACHE_MB": "12",
        "DRAFT_MEMORY_MB": "5",
        "SHARE_DRAFT_MEMORY": "false",
    }
    # every variable is tried
    assert {name.lower() for name in values} == set(Settings.model_fields)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    s = Settings.load()
    assert (s.model_path, s.medusa_weights_path) == (Path("a/b.gguf"), Path("heads"))
    assert (s.model_context_size, s.n_gpu_layers, s.n_threads) == (512, 7, 3)
    assert (s.use_mmap, s.use_mlock, s.flash_attn, s.kv_type) == (False, True, False, "bf16")
    assert (s.medusa_k_heads, s.medusa_max_tokens_per_step, s.log_level) == (2, 16, "DEBUG")
    assert (s.host, s.port, s.n_parallel, s.max_queue, s.max_body_bytes) == (
        "0.0.0.0",
        9000,
        8,
        0,
        5000,
    )
    assert (s.origins, s.hosts) == (("https://a.example", "http://b:1"), ("llm.home", "box"))
    assert (s.request_timeout, s.shutdown_timeout, s.cache_tokens) == (60, 0, 9999)
    assert (s.prompt_cache_mb, s.draft_memory_mb, s.share_draft_memory) == (12, 5, False)
    assert (
        s.api_key is not None and s.api_key.get_secret_value() == "sk-1" and "sk-1" not in repr(s)
    )


@pytest.mark.parametrize("key", [" ", "sk-1\nsk-2"])
def test_a_key_that_cannot_protect_is_refused_and_not_shown(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEY", key)
    with pytest.raises(UsageError, match=r"^API_KEY=…: a key needs"):
        Settings.load()


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("N_THREADS", "")
    monkeypatch.setenv("MODEL_PATH", "")
    assert Settings.load().model_path == smollm2_if_installed()


def test_a_name_stands_for_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_PATH", "tiny-python")
    assert Settings.load().model_path == BUNDLED


def test_a_name_that_stands_for_nothing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_PATH", "smolm2")
    with pytest.raises(UsageError) as error:
        Settings.load()
    message = "smolm2 is neither a file nor one of the names smollm2, tiny-python"
    assert str(error.value) == f"MODEL_PATH='smolm2': {message}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MODEL_CONTEXT_SIZE", "-1"),
        ("MODEL_CONTEXT_SIZE", "4k"),
        ("N_GPU_LAYERS", "-2"),
        ("N_THREADS", "0"),
        ("N_THREADS", "many\nof them"),
        ("USE_MMAP", "maybe"),
        ("USE_MLOCK", "2"),
        ("FLASH_ATTENTION", "yes"),
        ("KV_TYPE", "q3_0"),
        ("MEDUSA_K_HEADS", "0"),
        ("MEDUSA_MAX_TOKENS_PER_STEP", "257"),
        ("LOG_LEVEL", "LOUD"),
        ("PORT", "65536"),
        ("PORT", "http"),
        ("N_PARALLEL", "0"),
        ("MAX_QUEUE", "-1"),
        ("MAX_BODY_BYTES", "0"),
        ("REQUEST_TIMEOUT", "0"),
        ("SHUTDOWN_TIMEOUT", "-1"),
    ],
)
def test_a_bad_value_is_named_with_its_variable(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as error:
        Settings.load()
    assert str(error.value).startswith(f"{name}={value!r}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", QUANTIZED_KV)
def test_a_quantized_cache_without_flash_attention_is_refused(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KV_TYPE", kind)
    assert Settings.load().kv_type == kind
    monkeypatch.setenv("FLASH_ATTENTION", "off")
    with pytest.raises(
        UsageError, match=f"KV_TYPE='{kind}': .*needs flash attention; FLASH_ATTENTION is off"
    ):
        Settings.load()


def test_kv_types_are_those_that_the_base_takes() -> None:
    assert set(get_args(Settings.model_fields["kv_type"].annotation)) == set(KV_TYPES)


def test_the_readme_holds_the_table() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("<!-- settings -->") == text.count("<!-- /settings -->") == 1, (
        "README.md's markers are gone"
    )
    table = text.split("<!-- settings -->")[1].split("<!-- /settings -->")[0].strip()
    assert table == settings_table(), (
        "run `python config.py` and put its output between README.md's markers"
    )


def test_the_table_names_every_variable_once() -> None:
    table = settings_table().split("\n")
    assert [row.split("`")[1].lower() for row in table[2:]] == list(Settings.model_fields)
    assert all(row.count("|") == 5 for row in table)
    assert str(ROOT) not in settings_table()
    printed = subprocess.run(
        [sys.executable, ROOT / "config.py"], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == settings_table()
