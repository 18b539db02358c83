"""Replay: whether a sequence is what the base model alone would have generated.

It is decoded once more, causally, one token at a time; the logits that decided each token must lie
within NOISE × the noise floor of the replayed ones, and each token be the replay's choice or within
twice that bound. The floor is what batch shapes and the order of cache cells alone do to logits. It
is measured on plain decoding's sequences for the same prompts: in batches of several sizes, alone
and beside decoys, rows of an unrelated sequence that are removed again. Decoys matter: chains may
be bit-equal to single tokens, and rounding shows in other shapes only.
"""

from __future__ import annotations

import collections.abc as abc
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.base.llama import LlamaBase
from model.decoding.sampling import Sampler
from model.decoding.sequence import Sequence
from model.loaded_model import LoadedModel

Float32Array = npt.NDArray[np.float32]
# Right sequences were seen at up to 1.1 floors, planted faults from 2.8 on
# (benchmarks/results/NOTES.md).
NOISE = 2.0
CHAINS = (2, 4, 8)  # tokens of a batch
DECOYS = 24  # at the most, beside one token
# Rounding of 8 bits flips rarely, then by much: on 96 tokens of a Q8_0 file ten seeds showed none,
# and on others the floor was 100,000 times as high. So there are enough tokens.
DECOY_SEEDS = 4  # at the least
ENOUGH = 2000  # tokens beside decoys, at the least
PROMPT_TOKENS = 128  # of each prompt that count too


def replay_base(loaded: LoadedModel) -> LlamaBase:
    """Return a context in which sequences are replayed."""
    return loaded.new_base(n_seq_max=2, n_ctx=loaded.context + DECOYS)


@dataclass(frozen=True)
class Replay:
    """How one sequence compares with its replay, in logits.

    worst_margin: of tokens that the replay would not choose.
    """

    floor: float
    worst_difference: float
    worst_margin: float

    @property
    def bound(self) -> float:
        """What the logits may differ by."""
        return NOISE * self.floor

    @property
    def holds(self) -> bool:
        """Whether the sequence is what the base model would have generated."""
        return self.worst_difference <= self.bound and self.worst_margin <= 2 * self.bound


def noise_floor(base: LlamaBase, sequences: abc.Sequence[Sequence]) -> float:
    """Return the largest difference of logits that batch shapes and cell order alone make.

    base: of two sequence ids. Rounding flips are rare and large: one short sequence may show none.
    """
    floor = 0.0
    n_tokens = sum(
        sequence.n_new + min(PROMPT_TOKENS, sequence.n_prompt - 1) for sequence in sequences
    )
    n_seeds = max(DECOY_SEEDS, -(-ENOUGH // n_tokens))
    for sequence in sequences:
        ones = causal_logits(base, sequence, 1, more=PROMPT_TOKENS)
        others = [causal_logits(base, sequence, n, more=PROMPT_TOKENS) for n in CHAINS]
        for seed in range(n_seeds):
            length = (1, *CHAINS)[seed % (1 + len(CHAINS))]
            others.append(
                causal_logits(base, sequence, length, decoys=DECOYS, seed=seed, more=PROMPT_TOKENS)
            )
        # F32's own rounding, should all agree to the bit
        smallest = 1e-6 * float(np.abs(ones).max())
        floor = max(floor, smallest, *(float(np.abs(other - ones).max()) for other in others))
    return floor


def replay(base: LlamaBase, sequence: Sequence, floor: float) -> Replay:
    """Decode a sequence once more as one sequence id and compare (see the module's docstring)."""
    assert sequence.logits is not None, "replay needs keep_logits"
    ones = causal_logits(base, sequence, 1)
    decided = np.stack(sequence.logits)
    sampler = Sampler(sequence.sampler.params, sequence.tokens[: sequence.n_prompt])
    margins = list[float]()
    for i, (row, token) in enumerate(zip(ones, sequence.new_tokens, strict=True)):
        margins.append(sampler.margin(row, token, i))
        sampler.take(token)
    return Replay(floor, float(np.abs(decided - ones).max()), max(margins))


def causal_logits(
    base: LlamaBase,
    sequence: Sequence,
    length: int,
    *,
    decoys: int = 0,
    seed: int = 0,
    more: int = 0,
) -> Float32Array:
    """Return the logits (n, V) before each new token, decoded in batches of `length` tokens.

    decoys: at the most so many rows of another sequence are beside each batch, drawn with seed.
    more: so many tokens of the prompt are decoded and returned likewise.
    """
    before_new = max(0, sequence.n_prompt - 1 - more)
    base.clear()
    if before_new:
        base.prefill(np.array(sequence.tokens[:before_new], np.int32), 0, 0)
    rows = list[Float32Array]()
    new = np.array(sequence.tokens[before_new:-1], np.int32)
    rng = np.random.default_rng(seed)
    for at in range(0, len(new), length):
        piece = new[at : at + length]
        start = before_new + at
        n = int(rng.integers(decoys + 1))
        tokens = np.concatenate([rng.integers(0, base.n_vocab, n), piece]).astype(np.int32)
        pos = np.concatenate([np.arange(n), np.arange(start, start + len(piece))]).astype(np.int32)
        seq_ids = np.repeat(np.array([1, 0], np.int32), [n, len(piece)])
        base.decode(tokens, pos, seq_ids, outputs=True)
        rows.append(base.logits(len(tokens))[n:].copy())
        if n:
            base.seq_rm(1, -1, -1)
    return np.concatenate(rows)
