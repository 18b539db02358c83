"""The weights and the vocabulary of one GGUF file, through llama-cpp-python's low-level API.

Loads the file, turns text into token ids and back. Knows nothing of contexts: `llama.py` decodes
over what is loaded here.
"""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from model.errors import ModelFileError

Int32Array = npt.NDArray[np.int32]

log = logging.getLogger(__name__)
_TOO_MANY = -(2**31)  # llama_tokenize's answer where no int32 could hold the count
_PIECE_BYTES = 64  # of a first try: longer tokens are rare

# By llama.cpp's own; its errors reach us as codes.
_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.INFO, 4: logging.INFO}


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _forward_log(level: int, text: bytes, _: Any) -> None:
    line = text.decode("utf-8", "replace").rstrip()
    log.log(_LEVELS.get(level, logging.DEBUG), "%s", line)


llama_cpp.llama_log_set(_forward_log, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()


class LlamaModel:
    """Weights and vocabulary of one GGUF file.

    gpu: the one that it goes to; None: all there are. Raises ModelFileError where llama.cpp cannot
    load the file.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        n_gpu_layers: int = 0,
        use_mmap: bool = True,
        use_mlock: bool = False,
        gpu: int | None = None,
    ) -> None:
        self.path = Path(path)
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        if gpu is not None:
            params.split_mode = llama_cpp.LLAMA_SPLIT_MODE_NONE
            params.main_gpu = gpu
        # llama_load_mode: none, mmap, mlock, both.
        params.load_mode = int(use_mmap) + 2 * int(use_mlock)
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise ModelFileError(
                f"{path}: llama.cpp cannot load this file; run with LOG_LEVEL=DEBUG to see its "
                "reasons"
            )
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self.n_embd = int(llama_cpp.llama_model_n_embd(self._model))
        self.n_ctx_train = int(llama_cpp.llama_model_n_ctx_train(self._model))
        self.architecture = self._meta("general.architecture")
        recurrent = bool(llama_cpp.llama_model_is_recurrent(self._model))
        hybrid = bool(llama_cpp.llama_model_is_hybrid(self._model))
        self.can_roll_back = not recurrent and not hybrid
        self.bos = int(llama_cpp.llama_vocab_bos(self._vocab))
        self.eog = frozenset(
            token
            for token in range(self.n_vocab)
            if llama_cpp.llama_vocab_is_eog(self._vocab, token)
        )
        self._pieces: dict[int, bytes] = {}

    def _meta(self, key: str) -> str:
        buffer = ctypes.create_string_buffer(256)
        n = llama_cpp.llama_model_meta_val_str(self._model, key.encode(), buffer, 256)
        return buffer.value.decode("utf-8", "replace") if n >= 0 else ""

    def tokenize(
        self, text: str, *, add_bos: bool = True, parse_special: bool = False
    ) -> Int32Array:
        """Return the ids (n,) of a text.

        add_bos: put BOS first where the GGUF says so. parse_special: read `<s>` and the like as
        control tokens. Raises ModelFileError where llama.cpp fails.
        """
        data = text.encode(errors="replace")  # half a surrogate pair becomes "?"
        n = -(len(data) + 8)  # a negative result is the size that would do
        for _ in range(2):
            out = np.empty(-n, np.int32)
            pointer = out.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            result = llama_cpp.llama_tokenize(
                self._vocab, data, len(data), pointer, len(out), add_bos, parse_special
            )
            n = int(result)
            if n >= 0:
                return out[:n].copy()
            if n == _TOO_MANY:
                break
        raise ModelFileError(
            f"{self.path}: llama.cpp could not tokenize a text of {len(data)} bytes"
        )

    def piece(self, token: int) -> bytes:
        """Return the bytes of one token; control tokens are empty."""
        if token not in self._pieces:
            self._pieces[token] = self._read_piece(token)
        return self._pieces[token]

    def _read_piece(self, token: int) -> bytes:
        size = _PIECE_BYTES
        buffer = ctypes.create_string_buffer(size)
        n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
        if n < 0:  # the size that would do
            size = -n
            buffer = ctypes.create_string_buffer(size)
            n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
        return buffer.raw[: max(n, 0)]

    def detokenize(self, tokens: Int32Array | list[int]) -> str:
        """Return the text of the ids; bytes that are no UTF-8 become replacement characters."""
        return b"".join(self.piece(int(t)) for t in tokens).decode("utf-8", "replace")

    def close(self) -> None:
        """Free the weights; contexts over them must be closed before."""
        if self._model:
            llama_cpp.llama_model_free(self._model)
            self._model = None
