"""One llama.cpp context over a `LlamaModel`, through llama-cpp-python's low-level API.

Decodes plain batches and token trees, hands out logits and final hidden states as numpy views,
rolls sequences back. Knows nothing of heads, of drafting and of what a tree means; rows come with
their sequence ids.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from model.base.llama_model import Int32Array, LlamaModel
from model.errors import ContextError, ModelFileError, UsageError

Float32Array = npt.NDArray[np.float32]

KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}  # ggml_type
QUANTIZED_KV = ("q4_0", "q8_0")
MAX_SEQUENCES = 256  # llama.cpp's LLAMA_MAX_SEQ
_USUAL = 4096 + 512  # tokens of the largest context that nobody asked for
_FLASH_ATTENTION = {None: -1, False: 0, True: 1}  # llama_flash_attn_type; None: as it finds best
_CACHE_IS_FULL = 1  # llama_decode's status
# The same C functions with plain addresses as results: no Python object per call on the hot path.
_lib: Any = llama_cpp.llama_cpp._lib
_get_logits = _lib["llama_get_logits"]
_get_embeddings = _lib["llama_get_embeddings"]
for _function in (_get_logits, _get_embeddings):
    _function.argtypes = [ctypes.c_void_p]
    _function.restype = ctypes.c_void_p


@dataclass(frozen=True)
class RowSeqIds:
    """Which sequences each row of a tree batch belongs to.

    counts: (N,) int32, how many ids each row has; ids: (N, most) int32, the ids, left-aligned.
    """

    counts: Int32Array
    ids: Int32Array


class LlamaBase:
    """One llama.cpp context: a KV cache and the batches that are decoded into it.

    n_ctx: tokens in the cache. n_batch: rows of a batch at the most. embeddings: give hidden states
    too. flash_attn: None: off on CPUs, as llama.cpp finds best on GPUs; see planning.
    unified: all sequences share the cells, as trees need it. Otherwise each has its own,
    n_ctx / n_seq_max of them, and a token looks at no other sequence's: for many plain sequences at
    once. The bundled model in Q4_0, 32 sequences, one thread: 0.48 of the CPU time per token at 100
    to 160 tokens of context, 0.34 at 100 to 350.
    watch: a ggml_backend_sched_eval_callback; it must live as long as the context.
    Raises UsageError for options that llama.cpp does not take, ModelFileError where it makes no
    context.
    """

    def __init__(
        self,
        model: LlamaModel,
        *,
        n_ctx: int,
        n_threads: int,
        n_seq_max: int = 1,
        n_batch: int = 512,
        embeddings: bool = False,
        flash_attn: bool | None = None,
        kv_type: str = "f16",
        unified: bool = True,
        watch: Any = None,
    ) -> None:
        _check_options(n_seq_max, flash_attn, kv_type)
        if flash_attn is None and kv_type not in QUANTIZED_KV and not has_gpu():
            # It doubles the time of a step at 300 tokens (benchmarks/results/NOTES.md).
            flash_attn = False
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = min(n_batch, n_ctx)
        params.n_seq_max = n_seq_max
        params.kv_unified = unified
        params.swa_full = True
        params.n_threads = params.n_threads_batch = n_threads
        params.embeddings = embeddings
        params.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_NONE
        params.flash_attn_type = _FLASH_ATTENTION[flash_attn]
        params.type_k = params.type_v = KV_TYPES[kv_type]
        params.no_perf = True
        if watch is not None:
            params.cb_eval = watch
        self._ctx = llama_cpp.llama_init_from_model(model._model, params)
        if not self._ctx:
            hint = "; lower MODEL_CONTEXT_SIZE" if n_ctx > _USUAL else ""
            raise ModelFileError(
                f"{model.path}: llama.cpp made no context of {n_ctx} tokens with a {kv_type} KV "
                f"cache{hint}; run with LOG_LEVEL=DEBUG to see its reasons"
            )
        self.model = model
        self.n_vocab = model.n_vocab
        self.n_embd = model.n_embd
        self.n_ctx = int(llama_cpp.llama_n_ctx(self._ctx))
        self.n_batch = int(llama_cpp.llama_n_batch(self._ctx))
        self.n_seq_max = n_seq_max
        self.flash_attn = flash_attn
        self.embeddings = embeddings
        self._memory = llama_cpp.llama_get_memory(self._ctx)
        self._make_batch()
        self._views: dict[str, tuple[int, Float32Array]] = {}

    def _make_batch(self) -> None:
        """Make the batch that is used again and again, over numpy's memory."""
        n = self.n_batch
        self._token = np.zeros(n, np.int32)
        self._pos = np.zeros(n, np.int32)
        self._counts = np.ones(n, np.int32)
        self._ids = np.zeros((n, self.n_seq_max), np.int32)
        self._outputs = np.ones(n, np.int8)
        # The address of each row's sequence ids.
        row_offsets = np.arange(n, dtype=np.uint64) * self._ids.strides[0]
        self._rows = (self._ids.ctypes.data + row_offsets).astype(np.uint64)
        # The same memory for lists: numpy takes 5 µs to convert one when the caches are cold.
        self._token_list: Any = (ctypes.c_int32 * n).from_buffer(self._token.data)
        self._pos_list: Any = (ctypes.c_int32 * n).from_buffer(self._pos.data)
        # Offset → the sequence ids that are written there from an earlier batch.
        self._written: dict[int, RowSeqIds] = {}
        batch = self._batch = llama_cpp.llama_batch()
        arrays: dict[str, npt.NDArray[Any]] = {
            "token": self._token,
            "pos": self._pos,
            "n_seq_id": self._counts,
            "seq_id": self._rows,
            "logits": self._outputs,
        }
        kinds: dict[str, Any] = {field[0]: field[1] for field in llama_cpp.llama_batch._fields_}
        for name, array in arrays.items():
            setattr(batch, name, ctypes.cast(array.ctypes.data, kinds[name]))

    def decode(
        self,
        tokens: Int32Array,
        pos: Int32Array | int,
        seq: Int32Array | int,
        *,
        outputs: bool | None = None,
    ) -> None:
        """Decode a plain batch: every row belongs to one sequence.

        tokens: (n,), n ≤ n_batch; pos, seq: (n,) or one number (pos: of the first row, seq: of
        all). outputs: True for logits of every row, False for none, None for the last row only;
        on a context with embeddings every row is an output whatever is asked.
        Raises ContextError when the cache has no free cells left.
        """
        n = len(tokens)
        self._token[:n] = tokens
        self._pos[:n] = np.arange(pos, pos + n) if isinstance(pos, int) else pos
        self._counts[:n] = 1
        self._ids[:n, 0] = seq
        self._written.clear()
        self._outputs[:n] = outputs is True
        if outputs is None:
            self._outputs[n - 1] = 1
        try:
            self._run(n)
        finally:
            self._outputs[:n] = 1

    def prefill(self, tokens: Int32Array, pos: int, seq: int) -> None:
        """Decode prompt tokens into a sequence in batches, with neither logits nor states."""
        self.want_states(False)
        for i in range(0, len(tokens), self.n_batch):
            self.decode(tokens[i : i + self.n_batch], pos + i, seq, outputs=False)

    def place(self, offset: int, tokens: list[int], pos: list[int], seq_ids: RowSeqIds) -> int:
        """Put a tree's rows into the next batch at `offset`; return the offset behind them.

        tokens, pos: (N,); seq_ids: each row's sequence ids. Rows become outputs. `decode_placed`
        runs the batch.
        """
        end = offset + len(tokens)
        self._token_list[offset:end] = tokens
        self._pos_list[offset:end] = pos
        if self._written.get(offset) is not seq_ids:
            self._counts[offset:end] = seq_ids.counts
            self._ids[offset:end, : seq_ids.ids.shape[1]] = seq_ids.ids
            # What was behind them may be overwritten.
            self._written = {at: rows for at, rows in self._written.items() if at < offset}
            self._written[offset] = seq_ids
        return end

    def want_states(self, wanted: bool) -> None:
        """Let the next batches give final states, or save the copy.

        Without, the context is as fast as a plain one.
        """
        if wanted != self.embeddings:
            llama_cpp.llama_set_embeddings(self._ctx, wanted)
            self.embeddings = wanted

    def decode_placed(self, n: int) -> None:
        """Decode the n rows that `place` has put into the batch; raises as `decode`."""
        self._run(n)

    def _run(self, n: int) -> None:
        self._batch.n_tokens = n
        status = llama_cpp.llama_decode(self._ctx, self._batch)
        if status == _CACHE_IS_FULL:
            can_grow = self.n_ctx < self.model.n_ctx_train
            hint = "; raise MODEL_CONTEXT_SIZE" if can_grow else ""
            raise ContextError(f"no room for {n} more tokens in a context of {self.n_ctx}{hint}")
        if status != 0:
            raise ContextError(
                f"llama.cpp could not decode a batch of {n} tokens (status {status})"
            )

    def _view(self, name: str, address: int | None, width: int) -> Float32Array:
        """Return (n_batch, width) over llama.cpp's memory, the same array while it is there."""
        assert address, f"llama.cpp returned no {name}"
        known = self._views.get(name)
        if known is None or known[0] != address:
            buffer = (ctypes.c_float * (self.n_batch * width)).from_address(address)
            known = (address, np.ctypeslib.as_array(buffer).reshape(self.n_batch, width))
            self._views[name] = known
        return known[1]

    def logits(self, n: int) -> Float32Array:
        """Return the logits (n, V) of the last batch's first n outputs.

        A view, valid until the next decode.
        """
        return self._view("logits", _get_logits(self._ctx), self.n_vocab)[:n]

    def hidden(self, n: int) -> Float32Array:
        """Return the states (n, D) after the final norm of the last batch's first n rows.

        A view, as `logits`.
        """
        return self._view("states", _get_embeddings(self._ctx), self.n_embd)[:n]

    def seq_rm(self, seq: int, start: int, end: int) -> None:
        """Take positions start ≤ p < end from a sequence (-1: from all; end -1: to the end).

        Raises ContextError for models that cannot.
        """
        if not llama_cpp.llama_memory_seq_rm(self._memory, seq, start, end):
            raise ContextError(
                f"{self.model.architecture} models cannot roll back a part of a sequence"
            )

    def seq_cp(self, source: int, target: int, start: int, end: int) -> None:
        """Let the cells of `source` at start ≤ p < end belong to `target` too.

        Nothing is copied.
        """
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, start, end)

    def state_bytes(self, seq: int) -> int:
        """Return how many bytes `save_state` would return."""
        return int(llama_cpp.llama_state_seq_get_size(self._ctx, seq))

    def save_state(self, seq: int) -> npt.NDArray[np.uint8]:
        """Return a copy of all that a sequence has in the cache, for `restore_state`."""
        state = np.empty(self.state_bytes(seq), np.uint8)
        kind = ctypes.POINTER(ctypes.c_uint8)
        written = llama_cpp.llama_state_seq_get_data(
            self._ctx, state.ctypes.data_as(kind), state.nbytes, seq
        )
        assert written == state.nbytes, f"{written} bytes of a sequence's {state.nbytes}"
        return state

    def restore_state(self, seq: int, state: npt.NDArray[np.uint8]) -> bool:
        """Give a sequence that has nothing in the cache what was saved; False: no room for it.

        Its next logits are those that the saved sequence would have had, bit for bit.
        """
        kind = ctypes.POINTER(ctypes.c_uint8)
        read = llama_cpp.llama_state_seq_set_data(
            self._ctx, state.ctypes.data_as(kind), state.nbytes, seq
        )
        return bool(read)

    def clear(self) -> None:
        """Empty the cache."""
        llama_cpp.llama_memory_clear(self._memory, False)

    def close(self) -> None:
        """Free the context."""
        if self._ctx:
            llama_cpp.llama_free(self._ctx)
            self._ctx = None

    def __enter__(self) -> LlamaBase:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _check_options(n_seq_max: int, flash_attn: bool | None, kv_type: str) -> None:
    """Raise UsageError for what llama.cpp does not take."""
    if kv_type not in KV_TYPES:
        raise UsageError(f"KV type {kv_type!r} is unknown; use one of {', '.join(KV_TYPES)}")
    if kv_type in QUANTIZED_KV and flash_attn is False:
        raise UsageError(f"KV type {kv_type!r} needs flash attention, which is off")
    if not 1 <= n_seq_max <= MAX_SEQUENCES:
        raise UsageError(f"{n_seq_max} sequences asked for; llama.cpp takes 1 to {MAX_SEQUENCES}")


def has_gpu() -> bool:
    """Say whether llama.cpp was built for a GPU."""
    return bool(llama_cpp.llama_supports_gpu_offload())
