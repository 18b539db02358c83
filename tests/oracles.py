"""Drafters that know what the fake base model will say, and plain outputs to compare with."""

from __future__ import annotations

import collections.abc as abc
from typing import Any

import numpy as np
import numpy.typing as npt
from fake_base import FakeBase
from fake_vocabulary import Numbers

from model.decoding.sampling import Sampler, SamplingParams
from model.decoding.sequence import Sequence
from model.trees.tree import Tree

EXTRAS = {
    "min_p": SamplingParams(temperature=1.3, min_p=0.2, seed=5),
    "presence": SamplingParams(presence_penalty=1.5),
    "frequency": SamplingParams(temperature=0.9, frequency_penalty=0.8, seed=6),
    "repeat": SamplingParams(repeat_penalty=1.8),
    "bias": SamplingParams(temperature=1.0, logit_bias={7: 3.0, 8: -1e6}, seed=7),
    "all": SamplingParams(
        temperature=0.8,
        top_k=20,
        top_p=0.9,
        seed=8,
        min_p=0.05,
        presence_penalty=0.7,
        frequency_penalty=0.4,
        repeat_penalty=1.3,
        logit_bias={3: 2.0},
    ),
}


def plain(base: FakeBase, prompt: list[int], n: int, params: SamplingParams) -> list[int]:
    """The prompt and n tokens behind it, one at a time, straight from the fake model."""
    sampler, tokens = Sampler(params, prompt), list(prompt)
    for i in range(n):
        tokens.append(sampler.choose(base.logits_of(tokens), i))
        sampler.take(tokens[-1])
    return tokens


def new_sequence(
    prompt: list[int],
    n: int,
    params: SamplingParams | None = None,
    *,
    n_vocab: int = 50,
    eog: frozenset[int] = frozenset(),
    **options: Any,
) -> Sequence:
    """A sequence of n new tokens at the most, in a context without end."""
    context = options.pop("context", 1 << 30)
    params = params or SamplingParams()
    return Sequence(prompt, Numbers(n_vocab, eog), params, context=context, max_tokens=n, **options)


def prefill(base: FakeBase, sequence: Sequence) -> None:
    """Put a sequence's prompt but its last token into the cache, for tests of `step` alone."""
    base.prefill(np.array(sequence.tokens[:-1], np.int32), 0, sequence.seq_ids.start)
    for seq_id in sequence.seq_ids[1:]:
        base.seq_cp(sequence.seq_ids.start, seq_id, 0, len(sequence.tokens) - 1)


class Oracle:
    """Drafts what the fake model will choose at one of the ranks, noise at the others."""

    name = "heads"

    def __init__(self, base: FakeBase, sequence: Sequence, tree: Tree, miss: float) -> None:
        self.base, self.sequence, self.tree, self.miss = base, sequence, tree, miss
        self.rng = np.random.default_rng(1)

    def draft(
        self, hidden: npt.NDArray[np.float32], roots: abc.Sequence[int], trees: abc.Sequence[Tree]
    ) -> list[list[int]]:
        shape = (self.tree.max_depth, self.tree.n_ranks)
        out = self.rng.integers(0, self.base.n_vocab, shape, dtype=np.int32)
        history = list(self.sequence.tokens)
        path = self.tree.paths[self.rng.choice(self.tree.leaves)]
        for k, rank in enumerate(path):
            index = len(history) - self.sequence.n_prompt
            token = self.sequence.sampler.choose(self.base.logits_of(history), index)
            history.append(token)
            if self.rng.random() >= self.miss:
                out[k, rank] = token
        return [tree.fill(out) for tree in trees]

    def look(
        self,
        hidden: npt.NDArray[np.float32],
        states: abc.Sequence[int],
        paths: abc.Sequence[abc.Sequence[int]],
    ) -> tuple[list[list[int]], list[list[float]]]:
        tokens = self.rng.integers(0, self.base.n_vocab, (len(paths), 3)).tolist()
        for path, guesses in zip(paths, tokens, strict=True):
            history = [*self.sequence.tokens, *path[1:]]
            index = len(history) - self.sequence.n_prompt
            if self.rng.random() >= self.miss:
                logits = self.base.logits_of(history)
                guesses[self.rng.integers(3)] = self.sequence.sampler.choose(logits, index)
        return tokens, [[0.3, 0.2, 0.1]] * len(paths)


class Knowing:
    """Drafts a text that is known, now and then wrongly, each guess at a rank by chance."""

    name = "heads"

    def __init__(
        self, text: list[int], so_far: list[int], tree: Tree, miss: float = 0.2, seed: int = 1
    ) -> None:
        self.text, self.so_far, self.miss = text, so_far, miss
        self.shape, self.rng = (tree.max_depth, tree.n_ranks), np.random.default_rng(seed)

    def look(
        self,
        hidden: npt.NDArray[np.float32],
        states: abc.Sequence[int],
        paths: abc.Sequence[abc.Sequence[int]],
    ) -> tuple[list[list[int]], list[list[float]]]:
        tokens = self.rng.integers(0, 50, (len(paths), 3)).tolist()
        at = len(self.so_far) + len(paths[0]) - 1
        for guesses in tokens:
            if at < len(self.text) and self.rng.random() >= self.miss:
                guesses[self.rng.integers(3)] = self.text[at]
        return tokens, [[0.3, 0.2, 0.1]] * len(paths)

    def draft(
        self, hidden: npt.NDArray[np.float32], roots: abc.Sequence[int], trees: abc.Sequence[Tree]
    ) -> list[list[int]]:
        out = self.rng.integers(0, 50, self.shape, dtype=np.int32)
        for depth, token in enumerate(
            self.text[len(self.so_far) : len(self.so_far) + self.shape[0]]
        ):
            if self.rng.random() >= self.miss:
                out[depth, self.rng.integers(self.shape[1])] = token
        return [tree.fill(out) for tree in trees]
