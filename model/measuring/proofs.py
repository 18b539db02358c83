"""The proofs that drafting leaves the text alone.

Replay (`replay.py`) must hold for every text. Chains: bit-equal to a run with useless drafts of the same shapes. Plain:
a share, reported. That the proofs can fail is shown by `faults.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.decoding.drafting import ConstantDrafter, Drafter, RandomDrafter
from model.decoding.generation import Generation, Request
from model.decoding.planning import ROOT_ONLY, FixedPlan
from model.engine import Decoder, Engine
from model.measuring.replay import Replay, noise_floor, replay, replayer_of
from model.measuring.speed import Divergence, find_divergences
from model.trees.tree import Tree

Float32Array = npt.NDArray[np.float32]
BRANCH = 3  # tokens from the text so far
BOTH = "heads and text so far"


@dataclass(frozen=True)
class Case:
    """One way to draft, put to the proof on every prompt."""

    name: str
    texts: int
    replayed: int
    worst_difference: float  # in floors; the proof allows NOISE
    acceptance_length: float
    chains_equal: int | None  # None: no chain
    plain_equal: int
    divergences: list[Divergence]

    @property
    def holds(self) -> bool:
        """Whether replay and, for a chain, bit-equality held for every text."""
        return self.replayed == self.texts and self.chains_equal in (None, self.texts)


def prove(engine: Engine, requests: Sequence[Request], trees: Sequence[Tree]) -> list[Case]:
    """Prove every tree on every request: drafted by the heads, always rightly, at random, and always wrongly."""
    cases = list[Case]()
    with replayer_of(engine) as replayer, engine.decoder() as plain:
        ours = [write(plain, request) for request in requests]
        floor = noise_floor(replayer, ours)
        for tree in trees:
            for name, drafter in drafters(engine, tree).items():
                branch = BRANCH if name == BOTH else 0
                with engine.decoder_for(FixedPlan(tree, branch), drafter, ngrams=branch > 0) as decoder:
                    texts = [write(decoder, r, tree, own.slot.tokens) for r, own in zip(requests, ours, strict=True)]
                replays = [replay(replayer, text, floor) for text in texts]
                cases.append(_judge(f"{name}, {describe(tree)}", engine, plain, tree, requests, ours, texts, replays))
    return cases


def _judge(
    name: str,
    engine: Engine,
    plain: Decoder,
    tree: Tree,
    requests: Sequence[Request],
    ours: list[Generation],
    texts: list[Generation],
    replays: list[Replay],
) -> Case:
    steps = sum(text.slot.stats.steps for text in texts)
    return Case(
        name,
        len(texts),
        sum(r.holds for r in replays),
        max(r.worst_difference / r.floor for r in replays),
        sum(len(text.tokens) for text in texts) / steps,
        bit_equal(engine, tree, requests, texts) if len(tree.leaves) == 1 else None,
        sum(a.tokens == b.tokens for a, b in zip(ours, texts, strict=True)),
        find_divergences(plain, ours, texts, requests),
    )


def drafters(engine: Engine, tree: Tree) -> dict[str, Drafter | None]:
    """Return the heads' drafter, none (then the text is known), a random one, and one of a token never written.

    Trees with siblings are drafted by the heads together with the text so far, too.
    """
    heads = engine.drafter(tree)
    return {
        "heads": heads,
        **({BOTH: heads} if len(tree.leaves) > 1 else {}),
        "right drafts": None,
        "random drafts": RandomDrafter(engine.file.n_vocab),
        "wrong drafts": ConstantDrafter(max(engine.model.bos, 0)),
    }


def describe(tree: Tree) -> str:
    """Say what a tree is in a few words."""
    return f"chain of {tree.max_depth}" if len(tree.leaves) == 1 else f"tree of {len(tree) - 1}"


def bit_equal(engine: Engine, tree: Tree, requests: Sequence[Request], texts: list[Generation]) -> int:
    """Count the texts whose logits are bit-equal to those of a run with useless drafts of the same shapes."""
    useless = RandomDrafter(engine.file.n_vocab, seed=1)
    equal = 0
    with engine.decoder(tree, useless) as decoder:
        for request, text in zip(requests, texts, strict=True):
            other = write(decoder, request)
            assert other.slot.trace is not None and text.slot.trace is not None
            a, b = np.stack(other.slot.trace), np.stack(text.slot.trace)
            equal += other.tokens == text.tokens and np.array_equal(a, b)
    return equal


def write(decoder: Decoder, request: Request, tree: Tree = ROOT_ONLY, text: list[int] | None = None) -> Generation:
    """Write a text and keep its logits; where nobody drafts, the tree is drafted from `text`, if there is one."""
    generation = decoder.start(request, keep_logits=True)
    if decoder.drafter is None and text is not None:
        generation.slot.drafter = Knowing(text, generation.slot.tokens, decoder.base.n_vocab)
    generation.run()
    return generation


class Knowing:
    """Drafts the text that plain decoding wrote, at rank 1 where there is one: faults must meet accepted nodes."""

    def __init__(self, text: list[int], so_far: list[int], n_vocab: int) -> None:
        self._text, self._so_far, self._n_vocab = text, so_far, n_vocab

    def draft(self, hidden: Float32Array, roots: Sequence[int], trees: Sequence[Tree]) -> list[list[int]]:
        """See Drafter."""
        (tree,) = trees
        known = (self._text[len(self._so_far) :] + [0] * tree.max_depth)[: tree.max_depth]
        guesses = (np.array(known)[:, None] + 1 + np.arange(tree.n_ranks)) % self._n_vocab
        guesses[:, min(1, tree.n_ranks - 1)] = known
        return [tree.fill(guesses.astype(np.int32))]
