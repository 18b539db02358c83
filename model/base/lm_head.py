"""The check that heads may trust the LM head: W_out·h must give llama.cpp's logits.

Knows nothing of heads.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from model.base.gguf_file import GGUFFile
from model.base.llama import LlamaBase
from model.base.llama_model import LlamaModel
from model.errors import ModelFileError
from model.storage.facts import recall, remember

POSITIONS = 256
# Of the logits' spread. llama.cpp rounds h to 8 bits before a quantized W: 0.004 to 0.01 seen.
TOLERANCE = 0.05
_VERSION = 1  # of this check: an older one's successes are not trusted
_ROWS = 16_384  # of W_out that are multiplied at a time


def check_lm_head(model: LlamaModel, file: GGUFFile, n_threads: int) -> None:
    """Compare W_out·h, scaled and capped as the file says, with llama.cpp's logits.

    On 256 random tokens. Logits are compared, not argmaxes: an unknown scale or cap passes the
    second and fails the first. Remembered per file. Raises ModelFileError, naming the architecture,
    where they differ.
    """
    key = f"{file.file_fingerprint()} {file.logit_scale} {file.soft_cap} {_VERSION}"
    if key in recall("lm_heads"):
        return
    tokens = np.random.default_rng(0).integers(0, model.n_vocab, POSITIONS).astype(np.int32)
    length = min(POSITIONS, model.n_ctx_train)
    with LlamaBase(model, n_ctx=length, n_threads=n_threads, embeddings=True) as base:
        base.decode(tokens[:length], 0, 0)
        error = lm_head_error(file, base.hidden(length), base.logits(length))
    if not error <= TOLERANCE:  # NaN is neither
        raise ModelFileError(
            f"{file.path}: W·h differs from llama.cpp's logits by {error:.2f} of their spread; "
            f"the output of {file.architecture!r} models is not understood, so they cannot be "
            "drafted for (plain decoding works)"
        )
    remember("lm_heads", key, round(error, 5))


def lm_head_error(
    file: GGUFFile, hidden: npt.NDArray[np.float32], logits: npt.NDArray[np.float32]
) -> float:
    """Return the RMS difference between W_out·h and the logits, over their standard deviation.

    hidden: (n, D); logits: (n, V).
    """
    total = 0.0
    for row in range(0, file.n_vocab, _ROWS):  # all of it would be gigabytes of a large vocabulary
        rows = slice(row, row + _ROWS)
        ours = hidden @ file.output_weight(rows).T * np.float32(file.logit_scale)
        if file.soft_cap:
            ours = file.soft_cap * np.tanh(ours / file.soft_cap)
        squares = (ours - logits[:, rows]) ** 2
        total += float(squares.sum(dtype=np.float64))
    rms = (total / logits.size) ** 0.5
    return float(rms / float(logits.std()))
