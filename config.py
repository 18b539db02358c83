"""Every environment variable: its type, default and meaning, in this one place.

Read by entry points alone; below them, values are passed in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from model.base.cores import usable_cores
from model.base.known_models import model_file, smollm2_if_installed
from model.errors import UsageError

ROOT = Path(__file__).resolve().parent
_KINDS = {Path: "path", int: "number", bool: "`true` `false`", str: "text", SecretStr: "text"}


class Settings(BaseSettings):
    """All settings. `load` reads them, and turns a bad value into one line that names it."""

    model_config = SettingsConfigDict(
        env_ignore_empty=True, frozen=True, extra="ignore", protected_namespaces=()
    )

    model_path: Path = Field(
        default_factory=smollm2_if_installed,
        description="The base model: a GGUF file (of a split one, the first part), or a name: "
        "`smollm2` (in a package that `make setup` installs), `tiny-python` (bundled)",
    )
    medusa_weights_path: Path | None = Field(
        default=None,
        description="Folder or file of the draft heads; without it, the heads below "
        "`medusa_heads_weights/` that belong to the model, if there are any",
    )
    model_context_size: int = Field(
        default=0,
        ge=0,
        description="Tokens that the context holds; 0: as many as the model was trained for, "
        "at most 4,096",
    )
    n_gpu_layers: int = Field(
        default=-1,
        ge=-1,
        description="Layers on the GPU, where llama.cpp was built for one; -1: all",
    )
    n_threads: int = Field(
        default_factory=usable_cores, ge=1, le=512, description="Threads for every computation"
    )
    use_mmap: bool = Field(
        default=True, description="Map the file into memory instead of reading it"
    )
    use_mlock: bool = Field(default=False, description="Keep the model from being swapped out")
    flash_attention: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Flash attention; `auto`: on a GPU, for a quantized KV cache, and on a CPU "
        "where it makes plain steps faster: measured at first use, and remembered",
    )
    kv_type: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] = Field(
        default="f16",
        description="Number type of the KV cache; `q8_0` and `q4_0` need flash attention",
    )
    medusa_k_heads: int | None = Field(
        default=None, ge=1, le=64, description="Use only the first so many heads; without it, all"
    )
    medusa_max_tokens_per_step: int = Field(
        default=64,
        ge=1,
        le=256,
        description="Most nodes of a draft tree, its root included: per sequence and step",
    )
    host: str = Field(
        default="127.0.0.1",
        description="Address that the server listens on; `0.0.0.0`: every one of the machine",
    )
    port: int = Field(
        default=8000, ge=0, le=65535, description="Port of the server; 0: any free one"
    )
    api_key: SecretStr | None = Field(
        default=None,
        description="Key that clients must send (`Authorization: Bearer …`); without it, none is "
        "asked for",
    )
    cors_origins: str | None = Field(
        default=None,
        description="Web pages that may use the server, as `https://a.example,https://b.example`; "
        "`*`: every page",
    )
    allowed_hosts: str | None = Field(
        default=None,
        description="More names that the server may be called by, separated by commas; `*`: any "
        "(then a web page can reach it by DNS rebinding)",
    )
    n_parallel: int = Field(
        default=4, ge=1, le=64, description="Sequences that the server runs at the same time"
    )
    cache_tokens: int = Field(
        default=0,
        ge=0,
        description="Tokens that the server's KV cache holds for all sequences; 0: a context for "
        "each, as far as 1 GiB goes. A sequence waits until its prompt and longest possible output "
        "fit",
    )
    prompt_cache_mb: int = Field(
        default=1024,
        ge=0,
        description="MiB of memory for what finished sequences leave, so that a prompt that begins "
        "alike need not be read again; 0: nothing is kept",
    )
    draft_memory_mb: int = Field(
        default=64,
        ge=0,
        description="MiB of memory for recycled continuations: what the base model found likely "
        "behind the same tokens before; 0: none are drafted",
    )
    share_draft_memory: bool = Field(
        default=True,
        description="Whether sequences draft from what others showed; `false`: each from its own "
        "alone, so that no client's speed tells of another's text",
    )
    max_queue: int = Field(
        default=64, ge=0, le=10000, description="Sequences that may wait; more are refused (429)"
    )
    max_body_bytes: int = Field(default=4194304, ge=1024, description="Largest request body")
    request_timeout: int = Field(
        default=600, ge=1, description="Seconds that a request may last, waiting included"
    )
    shutdown_timeout: int = Field(
        default=10,
        ge=0,
        description="Seconds that running requests have to finish when the server is stopped",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="WARNING", description="How much is logged; `DEBUG` includes llama.cpp's own log"
    )

    @classmethod
    def load(cls) -> Settings:
        """Read the environment.

        Raises UsageError, in one line, with a bad variable's name and value.
        """
        try:
            return cls()
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]).upper()
            message = first["msg"][:1].lower() + first["msg"][1:]
            value = "…" if name == "API_KEY" else repr(first["input"])
            raise UsageError(f"{name}={value}: {message}") from None

    @field_validator("model_path", mode="before")
    @classmethod
    def _file_of(cls, name: Any) -> Any:
        if not isinstance(name, str):
            return name
        try:
            return model_file(name)
        except UsageError as error:
            raise PydanticCustomError("model_path", str(error)) from None

    @field_validator("kv_type")
    @classmethod
    def _needs_flash_attention(cls, value: str, others: ValidationInfo) -> str:
        if value in ("q8_0", "q4_0") and others.data.get("flash_attention") == "off":
            raise PydanticCustomError(
                "kv_type", "a quantized KV cache needs flash attention; FLASH_ATTENTION is off"
            )
        return value

    @field_validator("api_key")
    @classmethod
    def _is_a_key(cls, key: SecretStr | None) -> SecretStr | None:
        text = key.get_secret_value().strip() if key else None
        # no protection where some was asked for
        if text == "" or (text and any(ord(c) < 32 for c in text)):
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
        """Flash attention as LoadOptions take it: on, off, or to be chosen (None)."""
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
    span = ""
    if len(limits) == 2:
        span = f" {limits['ge']} to {limits['le']}"
    elif limits:
        span = f" ≥ {limits['ge']}"
    return _KINDS[kind] + span


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return field.default_factory.__name__.replace("_", " ")
    if field.default is None:
        return "none"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    return f"`{field.default}`"


if __name__ == "__main__":
    print(settings_table())
