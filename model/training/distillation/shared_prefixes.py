"""A context in which what prompts begin alike with is read once: template headers, system prompts.

The sequences have cells of their own, so what was read is copied, through host memory. Knows
neither templates nor dialogues.
"""

from __future__ import annotations

from collections import OrderedDict, deque

import numpy as np
import numpy.typing as npt

from model.base.llama import LlamaBase
from model.base.llama_model import Int32Array, LlamaModel
from model.decoding.prompt_cache import common_prefix
from model.errors import ModelFileError

SHORTEST = 8  # tokens: copying fewer is no gain over reading them
KEPT = 32  # prefixes, the last ones used
KEPT_BYTES = 2**28  # of them
COMPARED = 64  # earlier prompts that a new one is compared with


class PrefixSharingBase(LlamaBase):
    """Many plain sequences, each with n_ctx / n_seq_max cells of its own; options as LlamaBase's.

    n_shared: prompt tokens that were copied instead of read.
    """

    def __init__(
        self,
        model: LlamaModel,
        *,
        n_ctx: int,
        n_threads: int,
        n_seq_max: int,
        flash_attn: bool | None,
        kv_type: str,
    ) -> None:
        super().__init__(
            model, n_ctx=n_ctx, n_threads=n_threads, n_seq_max=n_seq_max, flash_attn=flash_attn,
            kv_type=kv_type, unified=False,
        )  # fmt: skip
        self.n_shared = 0
        self._states: OrderedDict[tuple[int, ...], npt.NDArray[np.uint8]] = OrderedDict()
        self._prompts: deque[list[int]] = deque(maxlen=COMPARED)

    @property
    def _n_bytes(self) -> int:
        return sum(state.nbytes for state in self._states.values())

    def prefill(self, tokens: Int32Array, pos: int, seq: int) -> None:
        """Decode prompt tokens into a sequence; of one that begins, copy what is known."""
        done = 0 if pos else self._begin(tokens, seq)
        super().prefill(tokens[done:], pos + done, seq)

    def _begin(self, tokens: Int32Array, seq: int) -> int:
        """Copy or read the prefix that earlier prompts share; return its length."""
        prompt: list[int] = tokens.tolist()
        known = [prefix for prefix in self._states if tuple(prompt[: len(prefix)]) == prefix]
        best = max(known, key=len, default=())
        done = 0
        if best and self.restore_state(seq, self._states[best]):
            self._states.move_to_end(best)
            done = len(best)
            self.n_shared += done

        # What it shares beyond that with an earlier prompt, the next ones will share as well.
        shared = 0
        for other in self._prompts:
            shared = max(shared, common_prefix(prompt, other, min(len(prompt), len(other))))
        self._prompts.append(prompt)
        if shared >= done + SHORTEST:
            super().prefill(tokens[done:shared], done, seq)
            self._states[tuple(prompt[:shared])] = self.save_state(seq)
            while len(self._states) > KEPT or self._n_bytes > KEPT_BYTES:
                self._states.popitem(last=False)
            done = shared
        return done


def sequences_of(
    model: LlamaModel,
    max_length: int,
    n_sequences: int,
    *,
    n_threads: int,
    flash_attn: bool | None,
    kv_type: str,
) -> PrefixSharingBase:
    """Return a context for so many sequences of max_length tokens.

    Raises ModelFileError where the KV cache finds no room.
    """
    try:
        return PrefixSharingBase(
            model, n_ctx=n_sequences * max_length, n_threads=n_threads, n_seq_max=n_sequences,
            flash_attn=flash_attn, kv_type=kv_type,
        )  # fmt: skip
    except ModelFileError:
        raise ModelFileError(
            f"{model.path}: llama.cpp made no KV cache for {n_sequences} sequences of {max_length} "
            "tokens; lower --parallel or --max_length, or run with LOG_LEVEL=DEBUG to see "
            "its reasons"
        ) from None
