"""llama.cpp's quantizer: the types that it makes, and the child process that it runs in.

It works for minutes without hearing Ctrl-C and aborts the process on some damaged files, so it gets
a process of its own (`python -m model.base.quantizer …`). Knows types and file names, not what is
in the files.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from pathlib import Path

import gguf

from model.errors import OutputError, UsageError
from model.storage.child import ending, run_module

log = logging.getLogger(__name__)
WHOLE = ("F32", "F16", "BF16")  # nothing is lost twice in these
# The types of a file, with the smallest tensor type that they put into it. Left out are those that
# need an importance matrix (IQ1, IQ2, IQ3_XXS), and what only special models have.
_OF_ONE_TYPE = (
    *WHOLE,
    *("Q8_0", "Q6_K", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS", "IQ3_S"),
)
_MIXED = ("Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M", "Q3_K_S")
TYPES = {
    **{kind: kind for kind in _OF_ONE_TYPE},
    **{kind: kind[: len("Q5_K")] for kind in _MIXED},
    "Q2_K": "Q2_K",
}
SHORT = {"Q5_K": "Q5_K_M", "Q4_K": "Q4_K_M", "Q3_K": "Q3_K_M"}  # as llama.cpp understands them
TENSOR_TYPES = tuple(dict.fromkeys(TYPES.values()))


def file_type(name: str) -> str:
    """Return a file's type as it is written here, such as Q4_K_M. Raises UsageError if unknown."""
    kind = SHORT.get(name.upper(), name.upper())
    if kind not in TYPES:
        known = ", ".join(TYPES).lower()
        raise UsageError(f"quantization {name!r} is unknown; use one of {known}")
    return kind


def tensor_type(name: str) -> str:
    """Return a tensor's type as it is written here, such as Q6_K. Raises UsageError if unknown."""
    if name.upper() not in TENSOR_TYPES:
        known = ", ".join(TENSOR_TYPES).lower()
        raise UsageError(f"tensor type {name!r} is unknown; use one of {known}")
    return name.upper()


def quality_warning(have: str, wanted: str) -> str:
    """Return what a user should know before a file of one type becomes one of another.

    have: such as `GGUFFile.file_type`. Empty where nothing is lost twice.
    """
    wanted = file_type(wanted)
    if have in WHOLE or wanted in WHOLE or have == wanted:
        return ""
    return (
        f"the source is {have} already: made from its F16 or BF16 original, {wanted} would be of "
        "better quality"
    )


def n_bytes(tensor_kind: str, elements: int) -> int:
    """Return what so many weights take in a type of TENSOR_TYPES."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor_kind]]
    return elements // block * size


def block_size(tensor_kind: str) -> int:
    """Return how many weights share a block in a type of TENSOR_TYPES.

    Rows must be multiples of it.
    """
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor_kind]]
    return block


def quantize(source: Path, target: Path, kind: str, output_type: str | None, threads: int) -> None:
    """Write `source` as `target` in a child process.

    Types are as `file_type` and `tensor_type` return them. Raises OutputError with llama.cpp's
    reason.
    """
    prefix = "ALL_" if kind == "F32" else "MOSTLY_"
    file_number = int(gguf.LlamaFileType[prefix + kind])
    output_number = int(gguf.GGMLQuantizationType[output_type]) if output_type else -1
    child = run_module(
        __name__,
        os.path.abspath(source),
        os.path.abspath(target),
        *map(str, (file_number, output_number, threads)),
    )
    log.debug("llama.cpp's quantizer on %s:\n%s", source, child.stderr)
    if child.returncode == 0:
        return
    reasons = re.findall(r"failed to quantize: (.+)", child.stderr)
    if reasons:
        reason = reasons[-1]
    else:
        reason = f"it ended with {ending(child.returncode)}, LOG_LEVEL=DEBUG shows its log"
    raise OutputError(f"{source}: llama.cpp could not write it as {kind.lower()} ({reason})")


def _quantize(source: str, target: str, kind: int, output_type: int, threads: int) -> int:
    """Return llama.cpp's status, 0 if all went well."""
    import llama_cpp  # only the child needs it

    from model.base import llama_model  # noqa: F401  (sends llama.cpp's log to `logging`)

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = kind
    params.allow_requantize = True
    params.nthread = threads
    if output_type >= 0:
        params.output_tensor_type = output_type
    return int(llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), params))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would wait for llama.cpp
    logging.basicConfig(level=logging.DEBUG, format="%(message)s")  # to stderr
    sys.exit(_quantize(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])))
