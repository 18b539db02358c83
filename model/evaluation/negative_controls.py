"""Negative controls: faults planted on purpose, which the proofs must detect.

A proof that cannot fail proves nothing. Knows neither options nor output.
"""

from __future__ import annotations

import collections.abc as abc
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model.base.llama import LlamaBase, RowSeqIds
from model.decoding.decoder import Decoder
from model.decoding.draft_policy import FixedPolicy
from model.decoding.drafters.drafter import HEADS, NGRAM, Guesses
from model.decoding.request import Request
from model.decoding.sampling import Sampler
from model.decoding.sequence import Sequence
from model.evaluation.proofs import CONTINUATION, KnowingDrafter, bit_equal, generate
from model.evaluation.replay import Replay, noise_floor, replay, replay_base
from model.loaded_model import LoadedModel
from model.trees.tree import Tree

Float32Array = npt.NDArray[np.float32]


class _SiblingsSee(LlamaBase):
    """Fault: nodes also see their siblings (every node but the root has all sequence ids)."""

    def place(self, offset: int, tokens: list[int], pos: list[int], seq_ids: RowSeqIds) -> int:
        if len(tokens) > 1:
            every = np.repeat(seq_ids.ids[:1, : seq_ids.counts[0]], len(tokens), 0)
            seq_ids = RowSeqIds(np.full(len(tokens), seq_ids.counts[0], np.int32), every)
        return super().place(offset, tokens, pos, seq_ids)


class _KeepsRejected(LlamaBase):
    """Fault: rejected siblings stay beside the accepted path.

    What hangs below the path is removed, or llama.cpp refuses the next batch.
    """

    def seq_rm(self, seq: int, start: int, end: int) -> None:
        if end == -1:
            super().seq_rm(seq, start, end)


class _SecondBest(Sampler):
    """Fault: the second-best token is accepted, here every fifth time."""

    def choose(self, logits: Float32Array, index: int) -> int:
        if index % 5 == 1:
            return int(np.argpartition(logits, -2)[-2])
        return super().choose(logits, index)


class _WrongContinuation:
    """Expects a token that the model never chooses."""

    name = NGRAM
    learns = False

    def start(self) -> int:
        return 0

    def advance(self, cursor: int, token: int) -> int:
        return cursor

    def guesses(self, cursor: int) -> Guesses:
        return [(0, 0)]

    def observe(self, *_: object) -> None:
        pass


class Fault(NamedTuple):
    """A faulty context; with an ordinary one the sampler is at fault.

    continuation: how many tokens n-grams draft, always wrong, beside a chain that is always right.
    """

    kind: type[LlamaBase]
    continuation: int = 0


FAULTS = {
    "siblings see each other": Fault(_SiblingsSee),
    "roll-back skipped": Fault(_KeepsRejected),
    "roll-back skipped, n-gram continuation": Fault(_KeepsRejected, CONTINUATION),
    "second-best token accepted": Fault(LlamaBase),
}


def negative_controls(
    loaded: LoadedModel, requests: abc.Sequence[Request], tree: Tree
) -> dict[str, list[str]]:
    """Plant each fault in the generation of each request; list how replay detected it.

    An empty text: it was not detected. tree: with siblings, or two of the faults change nothing.
    The last control is the bit-equality of chains, which has to detect the second-best token.
    """
    detected = dict[str, list[str]]()
    chain = Tree.chain(tree.max_depth)
    with replay_base(loaded) as replayer, loaded.fixed_decoder() as plain:
        plain_sequences = [generate(plain, request) for request in requests]
        known = [sequence.tokens for sequence in plain_sequences]
        floor = noise_floor(replayer, plain_sequences)
        for name, fault in FAULTS.items():
            shape = chain if fault.continuation else tree
            faulty = _generate_with_fault(loaded, requests, known, shape, fault)
            detected[name] = [_complaint(replay(replayer, sequence, floor)) for sequence in faulty]
        faulty = _generate_with_fault(loaded, requests, known, chain, Fault(LlamaBase))
        detected["second-best token accepted in a chain (bit-equality)"] = [
            "" if bit_equal(loaded, chain, [request], [sequence]) else "differs"
            for request, sequence in zip(requests, faulty, strict=True)
        ]
    return detected


def _generate_with_fault(
    loaded: LoadedModel,
    requests: abc.Sequence[Request],
    known: abc.Sequence[list[int]],
    tree: Tree,
    fault: Fault,
) -> list[Sequence]:
    sequences = list[Sequence]()
    policy = FixedPolicy(tree, fault.continuation)
    never_rolled_back = policy.max_nodes * max(request.max_tokens or 0 for request in requests)
    base = loaded.new_base(policy, fault.kind, n_ctx=loaded.context + never_rolled_back)
    with Decoder(base, loaded.base_model, policy, context=loaded.context) as decoder:
        for request, tokens in zip(requests, known, strict=True):
            sequence = decoder.start(request, keep_logits=True)
            sequence.tree_drafters[HEADS] = KnowingDrafter(
                tokens, sequence.tokens, loaded.file.n_vocab
            )
            if fault.continuation:
                sequence.continuation_drafters[NGRAM] = _WrongContinuation()
            if fault.kind is LlamaBase:
                sequence.sampler = _SecondBest(request.sampling)
            decoder.finish(sequence)
            sequence.sampler = Sampler(request.sampling)
            sequences.append(sequence)
    return sequences


def _complaint(result: Replay) -> str:
    if result.holds:
        return ""
    difference = result.worst_difference / result.floor
    return f"logits differ by {difference:.0f} noise floors, worst margin {result.worst_margin:.2f}"
