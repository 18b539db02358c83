"""Final hidden states without the LM head: the graph is stopped where they are ready.

A context that returns states computes the logits of every row too: on SmolLM2-135M (49,152 tokens)
a tenth of a prompt's time, on Gemma-3-270M (262,144) more than half. Here llama.cpp asks before
each node of its graph whether somebody wants to see it; the final norm's output is copied, and the
rest of the graph is never computed. States and KV cache are bit-equal. Knows no heads.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from model.base.llama import Float32Array, LlamaBase
from model.base.llama_model import LlamaModel

FINAL_NORM = b"result_norm"  # llama.cpp's name of the node, the same in all architectures
NAME_OFFSET = 256  # of a ggml_tensor's name, in bytes, with 64-bit pointers
_TRIAL_TOKENS = 8


class StateReader(LlamaBase):
    """A context that decodes prompts for their final states alone; its logits are garbage.

    options: as LlamaBase takes them, without embeddings and watch.
    """

    def __init__(self, model: LlamaModel, **options: Any) -> None:
        self._watch = llama_cpp.ggml_backend_sched_eval_callback(self._see)
        self._copy = _tensor_get()
        super().__init__(model, watch=self._watch, **options)
        self._states = np.zeros((self.n_batch, self.n_embd), np.float32)
        self._n_read = 0  # rows of the batch that is being decoded
        self._seen = False

    def _run(self, n: int) -> None:
        """Decode a batch; every row is an output, or it would have no state.

        Raises RuntimeError where the graph has no node of the final norm's name.
        """
        self._n_read = n
        self._seen = False
        self._outputs[:n] = 1
        super()._run(n)
        if not self._seen:
            raise RuntimeError(f"{self.model.architecture} models name no {FINAL_NORM.decode()}")

    def hidden(self, n: int) -> Float32Array:
        """Return the states (n, D) of the last batch's first n rows, valid until the next one."""
        return self._states[:n]

    def _see(self, tensor: int, ask: bool, _: int | None) -> bool:
        """Say yes to the final norm; once it is computed, copy it and stop the graph."""
        if ask:
            return ctypes.string_at(tensor + NAME_OFFSET, len(FINAL_NORM) + 1) == FINAL_NORM + b"\0"
        n_bytes = self._n_read * self.n_embd * self._states.itemsize
        self._copy(tensor, self._states.ctypes.data, 0, n_bytes)
        self._seen = True
        return False


def _tensor_get() -> Any:
    """Return ggml_backend_tensor_get. Raises AttributeError where the library hides it."""
    function = llama_cpp.llama_cpp._lib["ggml_backend_tensor_get"]
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    function.restype = None
    return function


def reads_states(model: LlamaModel, n_threads: int) -> bool:
    """Try on a few tokens whether a StateReader gives the states that embeddings are, bit for bit.

    False for architectures that name their final norm otherwise or go on behind it, and where the
    library doesn't hand out what is needed.
    """
    tokens = np.arange(_TRIAL_TOKENS, dtype=np.int32) % model.n_vocab
    options: dict[str, Any] = {"n_ctx": 4 * _TRIAL_TOKENS, "n_threads": n_threads}
    with LlamaBase(model, embeddings=True, **options) as base:
        base.decode(tokens, 0, 0, outputs=True)
        expected = base.hidden(_TRIAL_TOKENS).copy()
    try:
        with StateReader(model, **options) as reader:
            reader.decode(tokens, 0, 0)
            found: npt.NDArray[np.float32] = reader.hidden(_TRIAL_TOKENS)
            return bool(np.array_equal(found, expected))
    except (AttributeError, RuntimeError):
        return False
