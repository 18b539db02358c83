"""A deterministic stand-in for llama.cpp.

What a row sees decides its logits, so a wrong mask shows at once. Cells hold (position, token,
sequences). A row sees the cells that share a sequence with it at lower positions; its logits are a
hash of that history. As in llama.cpp, one cell may serve many sequences.
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

from model.base.llama import RowSeqIds
from model.errors import ContextError


class FakeBase:
    """Same methods as LlamaBase; `history` records what every row saw."""

    def __init__(
        self, n_vocab: int = 50, n_embd: int = 8, n_seq_max: int = 64, n_ctx: int = 4096
    ) -> None:
        self.embeddings = True
        self.n_vocab, self.n_embd, self.n_seq_max, self.n_ctx = n_vocab, n_embd, n_seq_max, n_ctx
        self.cells: list[tuple[int, int, set[int]]] = []
        self._batch: list[tuple[int, int, set[int]]] = []
        self._logits = np.zeros((0, n_vocab), np.float32)
        self._hidden = np.zeros((0, n_embd), np.float32)

    def place(self, offset: int, tokens: list[int], pos: list[int], seq_ids: RowSeqIds) -> int:
        del self._batch[offset:]
        for i in range(len(tokens)):
            self._batch.append(
                (int(pos[i]), int(tokens[i]), set(seq_ids.ids[i, : seq_ids.counts[i]].tolist()))
            )
        return len(self._batch)

    def want_states(self, wanted: bool) -> None:
        self.embeddings = wanted

    def decode_placed(self, n: int) -> None:
        rows = self._batch[:n]
        if len(self.cells) + n > self.n_ctx:
            raise ContextError("full")
        self.cells += rows
        self._logits = np.stack([self.logits_of(self.seen(row)) for row in rows])
        self._hidden = np.stack([self.state_of(self.seen(row)) for row in rows])

    def seen(self, row: tuple[int, int, set[int]]) -> list[int]:
        """The tokens that a row attends to, by position, itself last."""
        pos, token, seqs = row
        below = sorted((p, t) for p, t, s in self.cells if s & seqs and p < pos)
        return [t for _, t in below] + [token]

    def logits_of(self, history: list[int]) -> npt.NDArray[np.float32]:
        """The model: logits (V,) from a hash of the last tokens and of the whole history."""
        rng = np.random.default_rng(zlib.crc32(repr(history).encode()))
        return rng.standard_normal(self.n_vocab).astype(np.float32)

    def state_of(self, history: list[int]) -> npt.NDArray[np.float32]:
        return np.array([len(history), history[-1]] + [0] * (self.n_embd - 2), np.float32)

    def prefill(self, tokens: npt.NDArray[np.int32], pos: int, seq: int) -> None:
        self.cells += [(pos + i, int(t), {seq}) for i, t in enumerate(tokens)]

    def decode(
        self, tokens: npt.NDArray[np.int32], pos: int, seq: int, *, outputs: bool | None = None
    ) -> None:
        assert outputs, "only asked for with all logits"
        self._batch = [(pos + i, int(t), {seq}) for i, t in enumerate(tokens)]
        self.decode_placed(len(tokens))

    def logits(self, n: int) -> npt.NDArray[np.float32]:
        return self._logits[:n]

    def hidden(self, n: int) -> npt.NDArray[np.float32]:
        return self._hidden[:n]

    def seq_rm(self, seq: int, start: int, end: int) -> None:
        for pos, _, seqs in self.cells:
            if pos >= start and (end < 0 or pos < end):
                seqs.clear() if seq < 0 else seqs.discard(seq)
        self.cells = [c for c in self.cells if c[2]]

    def seq_cp(self, source: int, target: int, start: int, end: int) -> None:
        for pos, _, seqs in self.cells:
            if source in seqs and start <= pos < end:
                seqs.add(target)

    def state_bytes(self, seq: int) -> int:
        return self.save_state(seq).nbytes

    def save_state(self, seq: int) -> npt.NDArray[np.uint8]:
        cells = sorted((pos, token) for pos, token, seqs in self.cells if seq in seqs)
        return np.array(cells, np.int32).reshape(-1).view(np.uint8)

    def restore_state(self, seq: int, state: npt.NDArray[np.uint8]) -> bool:
        saved = state.view(np.int32).reshape(-1, 2).tolist()
        if len(self.cells) + len(saved) > self.n_ctx:
            return False
        self.cells += [(pos, token, {seq}) for pos, token in saved]
        return True

    def clear(self) -> None:
        self.cells = []

    def close(self) -> None:
        self.clear()

    def text_of(self, seq: int) -> list[int]:
        """The tokens that a sequence holds, in order of position."""
        return [t for _, t in sorted((p, t) for p, t, s in self.cells if seq in s)]
