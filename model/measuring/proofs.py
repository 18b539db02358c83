"""The proofs that drafting leaves the text alone, and the faults that they must notice.

Replay: a text is decoded once more, causally, one token at a time; the logits that decided each token must
lie within NOISE × the floor of the replayed ones, and each token be the replay's choice or within twice that
bound. The floor is what batch shapes and the order of cache cells alone do to logits. It is measured on plain
decoding's texts for the same prompts: in batches of CHAIN tokens, and a token at a time beside decoys, rows of an
unrelated sequence that are taken out again. Decoys matter: chains may be bit-equal to single tokens, and rounding
shows in other shapes only.
Chains: bit-equal to a run with useless drafts of the same shapes. Plain: a share, reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.base.llama import LaneRows, LlamaBase
from model.decoding.drafting import ConstantDrafter, Drafter, RandomDrafter
from model.decoding.generation import Generation, Request
from model.decoding.planning import ROOT_ONLY, FixedPlan
from model.decoding.sampling import Sampler
from model.engine import Decoder, Engine
from model.measuring.speed import Divergence, find_divergences
from model.trees.tree import Tree

Float32Array = npt.NDArray[np.float32]
NOISE = 2.0  # right texts were seen at up to 1.1 floors, the faults below from 2.8 on (benchmarks/results/NOTES.md)
CHAIN = 4
BRANCH = 3  # tokens from the text so far
BOTH = "heads and text so far"
DECOYS = 24  # at the most, beside one token


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
        ones = _causal(base, tokens, prompt, 1)
        others = [_causal(base, tokens, prompt, CHAIN)]
        others += [_causal(base, tokens, prompt, 1, DECOYS, seed) for seed in range(3)]
        smallest = 1e-6 * float(np.abs(ones).max())  # F32's own rounding, should all agree to the bit
        floor = max(floor, smallest, *(float(np.abs(other - ones).max()) for other in others))
    return floor


def replay(base: LlamaBase, generation: Generation, floor: float) -> Replay:
    """Decode a text once more as one sequence and compare (see the module's text)."""
    slot = generation.slot
    assert slot.trace is not None
    ones = _causal(base, slot.tokens, slot.prompt_length, 1)
    decided = np.stack(slot.trace)
    sampler, margins = Sampler(slot.sampler.params, slot.tokens[: slot.prompt_length]), list[float]()
    for i, (row, token) in enumerate(zip(ones, generation.tokens, strict=True)):
        margins.append(sampler.margin(row, token, i))
        sampler.take(token)
    return Replay(floor, float(np.abs(decided - ones).max()), max(margins))


def _causal(
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
    with _replayer(engine) as replayer, engine.decoder() as plain:
        ours = [_write(plain, request) for request in requests]
        floor = noise_floor(replayer, ours)
        for tree in trees:
            for name, drafter in drafters(engine, tree).items():
                branch = BRANCH if name == BOTH else 0
                with engine.decoder_for(FixedPlan(tree, branch), drafter, ngrams=branch > 0) as decoder:
                    texts = [_write(decoder, r, tree, own.slot.tokens) for r, own in zip(requests, ours, strict=True)]
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


def _replayer(engine: Engine) -> LlamaBase:
    return engine.base(sequences=2, context=engine.context + DECOYS)


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


def _write(decoder: Decoder, request: Request, tree: Tree = ROOT_ONLY, text: list[int] | None = None) -> Generation:
    """Write a text and keep its logits; where nobody drafts, the tree is drafted from `text`, if there is one."""
    generation = decoder.start(request, keep_logits=True)
    if decoder.drafter is None and text is not None:
        generation.slot.drafter = _Knowing(text, generation.slot.tokens, decoder.base.n_vocab)
    generation.run()
    return generation


def bit_equal(engine: Engine, tree: Tree, requests: Sequence[Request], texts: list[Generation]) -> int:
    """Count the texts whose logits are bit-equal to those of a run with useless drafts of the same shapes."""
    useless = RandomDrafter(engine.file.n_vocab, seed=1)
    equal = 0
    with engine.decoder(tree, useless) as decoder:
        for request, text in zip(requests, texts, strict=True):
            other = _write(decoder, request)
            assert other.slot.trace is not None and text.slot.trace is not None
            a, b = np.stack(other.slot.trace), np.stack(text.slot.trace)
            equal += other.tokens == text.tokens and np.array_equal(a, b)
    return equal


class _Knowing:
    """Drafts the text that plain decoding wrote, at rank 1 where there is one: faults must meet accepted nodes."""

    def __init__(self, text: list[int], so_far: list[int], n_vocab: int) -> None:
        self._text, self._so_far, self._n_vocab = text, so_far, n_vocab

    def draft(self, hidden: Float32Array, roots: Sequence[int], trees: Sequence[Tree]) -> list[list[int]]:
        (tree,) = trees
        known = (self._text[len(self._so_far) :] + [0] * tree.max_depth)[: tree.max_depth]
        guesses = (np.array(known)[:, None] + 1 + np.arange(tree.n_ranks)) % self._n_vocab
        guesses[:, min(1, tree.n_ranks - 1)] = known
        return [tree.fill(guesses.astype(np.int32))]


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


FAULTS: dict[str, type[LlamaBase]] = {
    "siblings see each other": _SiblingsSee,
    "roll-back skipped": _KeepsRejected,
    "second-best token accepted": LlamaBase,
}


def controls(engine: Engine, requests: Sequence[Request], tree: Tree) -> dict[str, list[str]]:
    """Plant each fault in the writing of each text; list, for every text, how replay noticed it ("": it did not).

    tree: with siblings, or two of the faults change nothing. The last control is the bit-equality of chains, which
    has to notice the second-best token.
    """
    found = dict[str, list[str]]()
    chain = Tree.chain(tree.max_depth)
    with _replayer(engine) as replayer, engine.decoder() as plain:
        ours = [_write(plain, request) for request in requests]
        plain_texts, floor = [text.slot.tokens for text in ours], noise_floor(replayer, ours)
        for name, kind in FAULTS.items():
            written = _write_with_fault(engine, requests, plain_texts, tree, kind)
            found[name] = [_complaint(replay(replayer, text, floor)) for text in written]
        faulty = _write_with_fault(engine, requests, plain_texts, chain, LlamaBase)
        name = "second-best token accepted in a chain (bit-equality)"
        found[name] = [
            "" if bit_equal(engine, chain, [r], [t]) else "differs" for r, t in zip(requests, faulty, strict=True)
        ]
    return found


def _write_with_fault(
    engine: Engine, requests: Sequence[Request], plain_texts: list[list[int]], tree: Tree, kind: type[LlamaBase]
) -> list[Generation]:
    """Write all texts with a faulty context, or (an ordinary one) with the faulty sampler."""
    written = list[Generation]()
    room = engine.context + len(tree) * max(r.max_tokens for r in requests)  # for what is never rolled back
    plan = FixedPlan(tree)
    with Decoder(engine.base(plan, kind, context=room), plan, None, engine.context) as decoder:
        for request, text in zip(requests, plain_texts, strict=True):
            generation = decoder.start(request, keep_logits=True)
            generation.slot.drafter = _Knowing(text, generation.slot.tokens, engine.file.n_vocab)
            if kind is LlamaBase:
                generation.slot.sampler = _SecondBest(request.sampling)
            generation.run()
            generation.slot.sampler = Sampler(request.sampling)
            written.append(generation)
    return written


def _complaint(result: Replay) -> str:
    apart, margin = result.worst_difference / result.floor, result.worst_margin
    return "" if result.holds else f"logits {apart:.0f} floors apart, worst margin {margin:.2f}"
