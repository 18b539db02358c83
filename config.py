"""Every environment variable: its type, default and meaning, in this one place.

Read by entry points alone; below them, values are passed in.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from model.errors import UsageError

ROOT = Path(__file__).resolve().parent
HEADS_FOLDER = ROOT / "medusa_heads_weights"


def usable_cores() -> int:
    """Return how many cores this process may keep busy: its affinity, cut to the container's quota (cgroup v2).

    Two hyperthreads of one core count once: llama.cpp gains nothing from the second.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_text(f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") or str(n) for n in allowed}
    quota, _, period = _text("/sys/fs/cgroup/cpu.max").partition(" ")
    most = int(quota) // int(period) if quota.isdigit() and period.isdigit() else len(cores)
    return max(1, min(len(cores), most))


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


class Settings(BaseSettings):
    """What the environment sets. `load` turns a bad value into one line that names it."""

    model_config = SettingsConfigDict(env_ignore_empty=True, frozen=True, extra="ignore", protected_namespaces=())

    model_path: Path = Field(
        default=ROOT / "models" / "tiny-python.Q4_0.gguf",
        description="The GGUF file of the base model; of a split one, the first part",
    )
    medusa_weights_path: Path | None = Field(
        default=None,
        description="Folder or file of the draft heads; without it, the heads below `medusa_heads_weights/` that "
        "belong to the model, if there are any",
    )
    model_context_size: int = Field(
        default=0,
        ge=0,
        description="Tokens that the context holds; 0: as many as the model was trained for, at most 4,096",
    )
    n_gpu_layers: int = Field(
        default=-1, ge=-1, description="Layers on the GPU, where llama.cpp was built for one; -1: all"
    )
    n_threads: int = Field(default_factory=usable_cores, ge=1, le=512, description="Threads for every computation")
    use_mmap: bool = Field(default=True, description="Map the file into memory instead of reading it")
    use_mlock: bool = Field(default=False, description="Keep the model from being swapped out")
    flash_attention: Literal["auto", "on", "off"] = Field(
        default="auto", description="Flash attention; `auto`: on a GPU, and for a quantized KV cache"
    )
    kv_type: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] = Field(
        default="f16", description="Number type of the KV cache; `q8_0` and `q4_0` need flash attention"
    )
    medusa_k_heads: int | None = Field(
        default=None, ge=1, le=64, description="Use the first so many heads; without it, all"
    )
    medusa_max_tokens_per_step: int = Field(
        default=64, ge=1, le=256, description="Most nodes of a draft tree, its root included: per request and pass"
    )
    host: str = Field(
        default="127.0.0.1", description="Address that the server listens on; `0.0.0.0`: every one of the machine"
    )
    port: int = Field(default=8000, ge=0, le=65535, description="Port of the server; 0: any free one")
    api_key: SecretStr | None = Field(
        default=None,
        description="Key that clients must send (`Authorization: Bearer …`); without it, none is asked for",
    )
    cors_origins: str | None = Field(
        default=None,
        description="Web pages that may use the server, as `https://a.example,https://b.example`; `*`: every page",
    )
    allowed_hosts: str | None = Field(
        default=None,
        description="More names that the server may be called by, separated by commas; `*`: any (then a web page can "
        "reach it by DNS rebinding)",
    )
    n_parallel: int = Field(default=4, ge=1, le=64, description="Texts that the server writes at the same time")
    cache_tokens: int = Field(
        default=0,
        ge=0,
        description="Tokens that the server's cache holds for all texts; 0: a whole context for each, as far as 1 GiB "
        "goes. A text waits until there is room for all that it may come to",
    )
    max_queue: int = Field(default=64, ge=0, le=10000, description="Texts that may wait; more are refused (429)")
    max_body_bytes: int = Field(default=4194304, ge=1024, description="Largest request body")
    request_timeout: int = Field(default=600, ge=1, description="Seconds that a request may take, waiting included")
    shutdown_timeout: int = Field(
        default=10, ge=0, description="Seconds that running requests may take to finish when the server is stopped"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="WARNING", description="How much is logged; `DEBUG` includes llama.cpp's own log"
    )

    @classmethod
    def load(cls) -> Settings:
        """Read the environment. Raises UsageError, in one line, with a bad variable's name and value."""
        try:
            return cls()
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]).upper()
            message = first["msg"][:1].lower() + first["msg"][1:]
            value = "…" if name == "API_KEY" else repr(first["input"])
            raise UsageError(f"{name}={value}: {message}") from None

    @field_validator("kv_type")
    @classmethod
    def _needs_flash_attention(cls, value: str, others: ValidationInfo) -> str:
        if value in ("q8_0", "q4_0") and others.data.get("flash_attention") == "off":
            raise PydanticCustomError("kv_type", "a quantized KV cache needs flash attention; FLASH_ATTENTION is off")
        return value

    @field_validator("api_key")
    @classmethod
    def _is_a_key(cls, key: SecretStr | None) -> SecretStr | None:
        text = key.get_secret_value().strip() if key else None
        if text == "" or (text and any(ord(c) < 32 for c in text)):  # no protection where some was asked for
            raise PydanticCustomError("api_key", "a key needs visible characters, in one line")
        return SecretStr(text) if text else None

    @property
    def origins(self) -> tuple[str, ...]:
        """CORS_ORIGINS, one by one."""
        return _words(self.cors_origins)

    @property
    def hosts(self) -> tuple[str, ...]:
        """ALLOWED_HOSTS, one by one."""
        return _words(self.allowed_hosts)

    @property
    def flash_attn(self) -> bool | None:
        """Flash attention as `LlamaBase` takes it: on, off, or llama.cpp's choice (None)."""
        return {"auto": None, "on": True, "off": False}[self.flash_attention]


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip().rstrip("/") for word in (text or "").split(",") if word.strip())


def settings_table() -> str:
    """Return the environment variables as a Markdown table, as the README shows it."""
    rows = ["| variable | type | default | meaning |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        meaning = field.description
        assert meaning is not None
        rows.append(f"| `{name.upper()}` | {_kind(field)} | {_default(field)} | {meaning} |")
    return "\n".join(rows)


def _kind(field: FieldInfo) -> str:
    kind: Any = field.annotation
    if get_origin(kind) is Literal:
        return " ".join(f"`{value}`" for value in get_args(kind))
    if get_args(kind):  # X | None
        kind = get_args(kind)[0]
    limits: dict[str, int] = {}
    for rule in field.metadata:
        limits |= {side: getattr(rule, side) for side in ("ge", "le") if hasattr(rule, side)}
    span = f" {limits['ge']} to {limits['le']}" if len(limits) == 2 else f" ≥ {limits['ge']}" if limits else ""
    return {Path: "path", int: "number", bool: "`true` `false`", str: "text", SecretStr: "text"}[kind] + span


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return field.default_factory.__name__.replace("_", " ")
    if field.default is None:
        return "none"
    if isinstance(field.default, Path):
        return f"`{field.default.relative_to(ROOT).as_posix()}`"
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


if __name__ == "__main__":
    print(settings_table())
