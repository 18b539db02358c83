"""Replay: whether a text is what the base model alone would have written.

A text is decoded once more, causally, one token at a time; the logits that decided each token must lie within NOISE ×
the floor of the replayed ones, and each token be the replay's choice or within twice that bound. The floor is what
batch shapes and the order of cache cells alone do to logits. It is measured on plain decoding's texts for the same
prompts: in batches of CHAIN tokens, and a token at a time beside decoys, rows of an unrelated sequence that are taken
out again. Decoys matter: chains may be bit-equal to single tokens, and rounding shows in other shapes only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.base.llama import LlamaBase
from model.decoding.generation import Generation
from model.decoding.sampling import Sampler
from model.engine import Engine

Float32Array = npt.NDArray[np.float32]
NOISE = 2.0  # right texts were seen at up to 1.1 floors, planted faults from 2.8 on (benchmarks/results/NOTES.md)
CHAIN = 4
DECOYS = 24  # at the most, beside one token


def replayer_of(engine: Engine) -> LlamaBase:
    """Return a context in which texts are replayed."""
    return engine.base(sequences=2, context=engine.context + DECOYS)


@dataclass(frozen=True)
class Replay:
    """How one text stood up to its replay, in logits. worst_margin: of tokens that the replay would not choose."""

    floor: float
    worst_difference: float
    worst_margin: float

    @property
    def bound(self) -> float:
        """What the logits may differ by."""
        return NOISE * self.floor

    @property
    def holds(self) -> bool:
        """Whether the text is what the base model would have written."""
        return self.worst_difference <= self.bound and self.worst_margin <= 2 * self.bound


def noise_floor(base: LlamaBase, texts: Sequence[Generation]) -> float:
    """Return the largest difference of logits that batch shapes and cell order alone make on these texts.

    base: of two sequences. Rounding flips are rare and large, so that one short text may show none: take several.
    """
    floor = 0.0
    for text in texts:
        tokens, prompt = text.slot.tokens, text.slot.prompt_length
        ones = causal(base, tokens, prompt, 1)
        others = [causal(base, tokens, prompt, CHAIN)]
        others += [causal(base, tokens, prompt, 1, DECOYS, seed) for seed in range(3)]
        smallest = 1e-6 * float(np.abs(ones).max())  # F32's own rounding, should all agree to the bit
        floor = max(floor, smallest, *(float(np.abs(other - ones).max()) for other in others))
    return floor


def replay(base: LlamaBase, generation: Generation, floor: float) -> Replay:
    """Decode a text once more as one sequence and compare (see the module's text)."""
    slot = generation.slot
    assert slot.trace is not None
    ones = causal(base, slot.tokens, slot.prompt_length, 1)
    decided = np.stack(slot.trace)
    sampler, margins = Sampler(slot.sampler.params, slot.tokens[: slot.prompt_length]), list[float]()
    for i, (row, token) in enumerate(zip(ones, generation.tokens, strict=True)):
        margins.append(sampler.margin(row, token, i))
        sampler.take(token)
    return Replay(floor, float(np.abs(decided - ones).max()), max(margins))


def causal(
    base: LlamaBase, tokens: list[int], prompt: int, length: int, decoys: int = 0, seed: int = 0
) -> Float32Array:
    """Return the logits (n, V) before each new token, decoded in batches of `length` beside up to so many decoys."""
    base.clear()
    base.prefill(np.array(tokens[: prompt - 1], np.int32), 0, 0)
    rows, new = list[Float32Array](), np.array(tokens[prompt - 1 : -1], np.int32)
    rng = np.random.default_rng(seed)
    for at in range(0, len(new), length):
        piece, start = new[at : at + length], prompt - 1 + at
        n = int(rng.integers(decoys + 1))
        batch = np.concatenate([rng.integers(0, base.n_vocab, n), piece]).astype(np.int32)
        pos = np.concatenate([np.arange(n), np.arange(start, start + len(piece))]).astype(np.int32)
        base.decode(batch, pos, np.repeat(np.array([1, 0], np.int32), [n, len(piece)]), outputs=True)
        rows.append(base.logits(len(batch))[n:].copy())
        if n:
            base.seq_rm(1, -1, -1)
    return np.concatenate(rows)
