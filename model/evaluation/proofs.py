"""Proofs that drafting does not change the output.

Replay (`replay.py`) must hold for every sequence. Chains: bit-equal to a run with useless drafts of
the same shapes. Plain decoding: a share, reported. That the proofs can fail is shown by
`negative_controls.py`.
"""

from __future__ import annotations

import collections.abc as abc
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.base.llama import LlamaBase
from model.decoding.decoder import Decoder
from model.decoding.draft_policy import FixedPolicy
from model.decoding.drafters.drafter import (
    HEADS,
    NGRAM,
    ConstantDrafter,
    RandomDrafter,
    TreeDrafter,
)
from model.decoding.request import Request
from model.decoding.sequence import Sequence
from model.evaluation.replay import noise_floor, replay, replay_base
from model.evaluation.speed import Divergence, find_divergences
from model.loaded_model import LoadedModel, new_drafters
from model.planning.adaptive_policy import AdaptivePolicy
from model.planning.auto_tuning import PRIORS
from model.trees.costs import CostCurve
from model.trees.tree import Tree

Float32Array = npt.NDArray[np.float32]
CONTINUATION = 3  # tokens of n-grams
BOTH = "heads and n-grams"
WITHOUT_HEADS = "random drafts and n-grams"
EVERY_SOURCE = "every source"
# Steps that cost next to nothing: the adaptive policy then drafts all that it has guesses for.
FREE_STEPS = CostCurve((0,), (1, 2, 4, 8, 16), ((1.0, 1.01, 1.02, 1.03, 1.04),))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A tree with a drafter, put to the proof on every prompt.

    worst_difference: in noise floors; the proof allows NOISE. chains_equal: None where the tree is
    no chain.
    """

    name: str
    sequences: int
    replayed: int
    worst_difference: float
    acceptance_length: float
    chains_equal: int | None
    plain_equal: int
    divergences: list[Divergence]

    @property
    def holds(self) -> bool:
        """Whether replay and, for a chain, bit-equality held for every sequence."""
        return self.replayed == self.sequences and self.chains_equal in (None, self.sequences)


def prove(
    loaded: LoadedModel, requests: abc.Sequence[Request], trees: abc.Sequence[Tree]
) -> list[Case]:
    """Prove every tree on every request, with the drafters of `drafters`."""
    cases = list[Case]()
    with replay_base(loaded) as replayer, loaded.fixed_decoder() as plain:
        plain_sequences = [generate(plain, request) for request in requests]
        evidence = _Evidence(
            loaded=loaded,
            plain=plain,
            replayer=replayer,
            floor=noise_floor(replayer, plain_sequences),
            plain_sequences=plain_sequences,
            requests=requests,
        )
        for tree in trees:
            for name, drafter in drafters(loaded, tree).items():
                continuation = CONTINUATION if name in (BOTH, WITHOUT_HEADS) else 0
                policy = FixedPolicy(tree, continuation)
                drafters_of = new_drafters(drafter, {NGRAM} if continuation else ())
                with loaded.decoder(policy, drafters_of) as decoder:
                    drafted = [
                        generate(decoder, request, known.tokens)
                        for request, known in zip(requests, plain_sequences, strict=True)
                    ]
                cases.append(evidence.judge(f"{name}, {describe(tree)}", tree, drafted))

        # Trees that grow by probability, of another shape in each step.
        heads = None
        if loaded.heads_path is not None:
            heads = loaded.heads_drafter(Tree.chain(loaded.n_heads))
        eager = eager_policy(loaded.n_heads if heads else 0)
        with loaded.decoder(eager, new_drafters(heads, PRIORS)) as decoder:
            drafted = [generate(decoder, request) for request in requests]
        cases.append(evidence.judge(f"{EVERY_SOURCE}, trees by probability", None, drafted))
    return cases


def eager_policy(n_heads: int) -> AdaptivePolicy:
    """Make an adaptive policy that drafts as much as it may. n_heads: levels of the heads."""
    return AdaptivePolicy(FREE_STEPS, PRIORS, [1e-6] * n_heads, max_leaves=8)


@dataclass(frozen=True, kw_only=True)
class _Evidence:
    """What drafted sequences are compared with."""

    loaded: LoadedModel
    plain: Decoder
    replayer: LlamaBase
    floor: float
    plain_sequences: list[Sequence]
    requests: abc.Sequence[Request]

    def judge(self, name: str, tree: Tree | None, drafted: list[Sequence]) -> Case:
        """Put sequences to the proof. tree: of every step; None: of another shape in each."""
        n_steps = sum(sequence.statistics.steps for sequence in drafted)
        replays = [replay(self.replayer, sequence, self.floor) for sequence in drafted]
        chains_equal = None
        if tree is not None and len(tree.leaves) == 1:
            chains_equal = bit_equal(self.loaded, tree, self.requests, drafted)
        pairs = zip(self.plain_sequences, drafted, strict=True)
        return Case(
            name=name,
            sequences=len(drafted),
            replayed=sum(each.holds for each in replays),
            worst_difference=max(each.worst_difference / each.floor for each in replays),
            acceptance_length=sum(sequence.n_new for sequence in drafted) / n_steps,
            chains_equal=chains_equal,
            plain_equal=sum(plain.new_tokens == other.new_tokens for plain, other in pairs),
            divergences=find_divergences(self.plain, self.plain_sequences, drafted, self.requests),
        )


def drafters(loaded: LoadedModel, tree: Tree) -> dict[str, TreeDrafter | None]:
    """Return what drafts a tree in the proofs, by name.

    The heads if there are any, with n-grams too where the tree has siblings; always right (None:
    the output is known); at random; always wrong.
    """
    cases: dict[str, TreeDrafter | None] = {}
    beside_ngrams: TreeDrafter = RandomDrafter(loaded.file.n_vocab)
    if loaded.heads_path is not None:
        beside_ngrams = cases["heads"] = loaded.heads_drafter(tree)
    if len(tree.leaves) > 1:
        cases[BOTH if "heads" in cases else WITHOUT_HEADS] = beside_ngrams
    cases["right drafts"] = None
    cases["random drafts"] = RandomDrafter(loaded.file.n_vocab)
    cases["wrong drafts"] = ConstantDrafter(max(loaded.base_model.bos, 0))
    return cases


def describe(tree: Tree) -> str:
    """Say what a tree is in a few words."""
    if len(tree.leaves) == 1:
        return f"chain of {tree.max_depth}"
    return f"tree of {len(tree) - 1}"


def bit_equal(
    loaded: LoadedModel,
    tree: Tree,
    requests: abc.Sequence[Request],
    sequences: abc.Sequence[Sequence],
) -> int:
    """Count the sequences that are bit-equal to a run with useless drafts of the same shapes."""
    useless = RandomDrafter(loaded.file.n_vocab, seed=1)
    equal = 0
    with loaded.fixed_decoder(tree, useless) as decoder:
        for request, sequence in zip(requests, sequences, strict=True):
            other = generate(decoder, request)
            assert other.logits is not None and sequence.logits is not None
            same_tokens = other.new_tokens == sequence.new_tokens
            if same_tokens and np.array_equal(np.stack(other.logits), np.stack(sequence.logits)):
                equal += 1
    return equal


def generate(decoder: Decoder, request: Request, known: list[int] | None = None) -> Sequence:
    """Generate and keep the logits.

    known: tokens that the tree is drafted from, where the decoder has no drafter.
    """
    sequence = decoder.start(request, keep_logits=True)
    if not decoder.drafters.trees and known is not None:
        sequence.tree_drafters[HEADS] = KnowingDrafter(known, sequence.tokens, decoder.base.n_vocab)
    decoder.finish(sequence)
    return sequence


class KnowingDrafter:
    """Drafts known tokens, at rank 1 where there is one.

    Planted faults must meet accepted nodes that are not the first of their siblings.
    """

    name = HEADS

    def __init__(self, known: list[int], so_far: list[int], n_vocab: int) -> None:
        self._known = known
        self._so_far = so_far
        self._n_vocab = n_vocab

    def draft(
        self, hidden: Float32Array, roots: abc.Sequence[int], trees: abc.Sequence[Tree]
    ) -> list[list[int]]:
        """See TreeDrafter."""
        (tree,) = trees
        padded = self._known[len(self._so_far) :] + [0] * tree.max_depth
        known = padded[: tree.max_depth]
        guesses = (np.array(known)[:, None] + 1 + np.arange(tree.n_ranks)) % self._n_vocab
        guesses[:, min(1, tree.n_ranks - 1)] = known
        return [tree.fill(guesses.astype(np.int32))]
