"""The check at load: a GGUF file is tried in a child process first, as llama.cpp aborts on some.

The child (`python -m model.base.load_check FILE`) loads the whole file, tokenizes, and decodes one
token and several, which other kernels do. A success is remembered per file, machine and
llama-cpp-python version, so the check costs a load only once. Knows nothing of heads and of how the
model is used later.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from model.base.gguf_file import GGUFFile
from model.errors import MedusaError, ModelFileError
from model.storage.child import ending, run_module
from model.storage.facts import recall, remember, this_machine

log = logging.getLogger(__name__)
_VERSION = 3  # of this check: an older one's successes are not trusted
UTF8_BYTES = (*range(0x80), *range(0x80, 0xC0), *range(0xC2, 0xF5))
_SURROGATES = range(0xD800, 0xE000)
# Characters that hold each of these bytes: all of one or two, every 1985th of the longer ones.
PROBE = "".join(
    chr(c) for c in (*range(0x800), *range(0x800, 0x110000, 1985)) if c not in _SURROGATES
)
BATCH = 16  # tokens that are decoded together
_REFUSED = 3  # the child's exit status when it says why, on its last line of output


def check_loads(path: Path | str, *, timeout: float = 1800.0) -> GGUFFile:
    """Return the opened file once llama.cpp is known to load it and decode with it.

    timeout: seconds for loading and a few tokens. Raises ModelFileError where it does not.
    """
    file = GGUFFile(path)
    versions = f"{version('llama-cpp-python')} {_VERSION}"
    key = f"{file.file_fingerprint()} {versions} {this_machine()}"
    if recall("loads").get(key):
        return file
    _require_byte_pieces(file)
    try:
        child = run_module("model.base.load_check", os.path.abspath(file.path), timeout=timeout)
    except subprocess.TimeoutExpired:
        raise ModelFileError(
            f"{path}: llama.cpp did not load this file within {timeout:.0f} s"
        ) from None
    log.debug("loading %s in a child process:\n%s", path, child.stderr)
    if child.returncode == _REFUSED:
        raise ModelFileError(child.stdout.strip().rsplit("\n", 1)[-1])
    if child.returncode != 0:
        raise ModelFileError(f"{path}: {_how_it_ended(child.returncode)}")
    remember("loads", key, True)
    return file


def _require_byte_pieces(file: GGUFFile) -> None:
    """Raise ModelFileError where a SentencePiece vocabulary cannot spell every text.

    llama.cpp aborts on what it cannot spell; with other vocabularies it leaves it out.
    """
    if file.metadata.get("tokenizer.ggml.model") != "llama":
        return
    pieces = set(file.metadata["tokenizer.ggml.tokens"])
    for byte in UTF8_BYTES:
        if byte == ord(" "):  # that is "▁"
            continue
        as_character = byte < 0x80 and chr(byte) in pieces
        if not as_character and f"<0x{byte:02X}>" not in pieces:
            raise ModelFileError(
                f"{file.path}: its vocabulary has no piece for byte 0x{byte:02X}, so llama.cpp "
                "cannot tokenize every text with it; convert the model anew with byte fallback"
            )


def _how_it_ended(status: int) -> str:
    """Say in words how the child ended, by its exit status."""
    if status == -signal.SIGKILL:
        return "loading it was stopped from outside (SIGKILL); is there enough memory?"
    if status == -signal.SIGILL:
        return (
            "llama.cpp was compiled for another processor than this one, or by a GCC that breaks "
            "AMX (SIGILL); compile it here anew: remove the virtual environment, then "
            "PIP_NO_CACHE_DIR=1 make setup"
        )
    return f"llama.cpp crashed on this file ({ending(status)}); it is damaged, fetch it again"


def _try(path: Path) -> None:
    """Load the file, tokenize every byte, decode one token and a batch.

    Raises ModelFileError, or takes the process down.
    """
    import numpy as np  # here, not above: only the child needs them

    from model.base.llama import LlamaBase
    from model.base.llama_model import LlamaModel

    model = LlamaModel(path)
    base = LlamaBase(model, n_ctx=64, n_threads=_usable_cores())
    model.tokenize(PROBE)  # aborts where a vocabulary has no piece for a byte
    for n in (1, min(BATCH, model.n_ctx_train)):
        base.clear()
        base.decode(np.full(n, max(model.bos, 0), np.int32), 0, 0)
        if not np.isfinite(base.logits(1)).all():
            raise ModelFileError(
                f"{path}: its logits are not numbers; the file is damaged, fetch it again"
            )
    base.close()
    model.close()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return 2


if __name__ == "__main__":
    logging.basicConfig(level=logging.DEBUG, format="%(message)s")  # llama.cpp's own log, to stderr
    try:
        _try(Path(sys.argv[1]))
    except MedusaError as reason:
        print(reason)
        sys.exit(_REFUSED)
