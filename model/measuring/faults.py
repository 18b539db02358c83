"""Faults planted on purpose, which the proofs must notice: a proof that cannot fail proves nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model.base.llama import LaneRows, LlamaBase
from model.decoding.generation import Generation, Request
from model.decoding.ngram import NgramIndex
from model.decoding.planning import FixedPlan
from model.decoding.sampling import Sampler
from model.engine import Decoder, Engine
from model.measuring.proofs import BRANCH, Knowing, bit_equal, write
from model.measuring.replay import Replay, noise_floor, replay, replayer_of
from model.trees.tree import Tree

Float32Array = npt.NDArray[np.float32]


class _SiblingsSee(LlamaBase):
    """Fault: nodes also see their siblings (every node but the root belongs to all lanes)."""

    def place(self, offset: int, tokens: list[int], pos: list[int], lanes: LaneRows) -> int:
        if len(tokens) > 1:
            every = np.repeat(lanes.ids[:1, : lanes.counts[0]], len(tokens), 0)
            lanes = LaneRows(np.full(len(tokens), lanes.counts[0], np.int32), every)
        return super().place(offset, tokens, pos, lanes)


class _KeepsRejected(LlamaBase):
    """Fault: rejected siblings stay beside the accepted path (what hangs below the path goes, or llama.cpp refuses)."""

    def seq_rm(self, seq: int, start: int, end: int) -> None:
        if end == -1:
            super().seq_rm(seq, start, end)


class _SecondBest(Sampler):
    """Fault: the second-best token is accepted, here every fifth time."""

    def choose(self, logits: Float32Array, index: int) -> int:
        if index % 5 == 1:
            return int(np.argpartition(logits, -2)[-2])
        return super().choose(logits, index)


class _Astray(NgramIndex):
    """Says that the text goes on with a token that it never holds."""

    def propose(self, most: int) -> tuple[list[int], int]:
        return [0] * most, 1


class Fault(NamedTuple):
    """A faulty context (an ordinary one: the sampler is at fault).

    branch: how many tokens the text so far drafts, always wrongly, beside a chain that is always right.
    """

    kind: type[LlamaBase]
    branch: int = 0


FAULTS = {
    "siblings see each other": Fault(_SiblingsSee),
    "roll-back skipped": Fault(_KeepsRejected),
    "roll-back skipped, branch of the text so far": Fault(_KeepsRejected, BRANCH),
    "second-best token accepted": Fault(LlamaBase),
}


def controls(engine: Engine, requests: Sequence[Request], tree: Tree) -> dict[str, list[str]]:
    """Plant each fault in the writing of each text; list, for every text, how replay noticed it ("": it did not).

    tree: with siblings, or two of the faults change nothing. The last control is the bit-equality of chains, which
    has to notice the second-best token.
    """
    found = dict[str, list[str]]()
    chain = Tree.chain(tree.max_depth)
    with replayer_of(engine) as replayer, engine.decoder() as plain:
        ours = [write(plain, request) for request in requests]
        plain_texts, floor = [text.slot.tokens for text in ours], noise_floor(replayer, ours)
        for name, fault in FAULTS.items():
            written = _write_with_fault(engine, requests, plain_texts, chain if fault.branch else tree, fault)
            found[name] = [_complaint(replay(replayer, text, floor)) for text in written]
        faulty = _write_with_fault(engine, requests, plain_texts, chain, Fault(LlamaBase))
        name = "second-best token accepted in a chain (bit-equality)"
        found[name] = [
            "" if bit_equal(engine, chain, [r], [t]) else "differs" for r, t in zip(requests, faulty, strict=True)
        ]
    return found


def _write_with_fault(
    engine: Engine, requests: Sequence[Request], plain_texts: list[list[int]], tree: Tree, fault: Fault
) -> list[Generation]:
    """Write all texts with a fault."""
    written, plan = list[Generation](), FixedPlan(tree, fault.branch)
    room = engine.context + plan.max_nodes * max(r.max_tokens for r in requests)  # for what is never rolled back
    base = engine.base(plan, fault.kind, context=room)
    with Decoder(base, plan, None, engine.context) as decoder:
        for request, text in zip(requests, plain_texts, strict=True):
            generation = decoder.start(request, keep_logits=True)
            generation.slot.drafter = Knowing(text, generation.slot.tokens, engine.file.n_vocab)
            if fault.branch:
                generation.slot.ngrams = _Astray(generation.slot.tokens)
            if fault.kind is LlamaBase:
                generation.slot.sampler = _SecondBest(request.sampling)
            generation.run()
            generation.slot.sampler = Sampler(request.sampling)
            written.append(generation)
    return written


def _complaint(result: Replay) -> str:
    apart, margin = result.worst_difference / result.floor, result.worst_margin
    return "" if result.holds else f"logits {apart:.0f} floors apart, worst margin {margin:.2f}"
