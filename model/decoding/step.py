"""Draft → verify → accept: one step for one running sequence or for many.

Knows no queue, no text and no heads.
"""

from __future__ import annotations

import collections.abc as abc
from typing import Protocol

import numpy as np
import numpy.typing as npt

from model.base.llama import RowSeqIds
from model.decoding.draft import Draft
from model.decoding.draft_policy import DraftPolicy, StepOutcome
from model.decoding.sequence import Sequence
from model.decoding.statistics import StageRecorder
from model.decoding.tree_cache import Cache, roll_back, tree_rows
from model.decoding.verification import verify, verify_typically

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]


class Base(Cache, Protocol):
    """What decoding needs of `model.base.llama.LlamaBase`."""

    embeddings: bool

    def place(self, offset: int, tokens: list[int], pos: list[int], seq_ids: RowSeqIds) -> int: ...  # noqa: D102
    def want_states(self, wanted: bool) -> None: ...  # noqa: D102
    def decode(  # noqa: D102
        self, tokens: Int32Array, pos: int, seq: int, *, outputs: bool | None = None
    ) -> None: ...
    def decode_placed(self, n: int) -> None: ...  # noqa: D102
    def prefill(self, tokens: Int32Array, pos: int, seq: int) -> None: ...  # noqa: D102
    def logits(self, n: int) -> Float32Array: ...  # noqa: D102
    def hidden(self, n: int) -> Float32Array: ...  # noqa: D102


def step(base: Base, sequences: abc.Sequence[Sequence], policy: DraftPolicy) -> None:
    """Take every sequence one verify pass further: each gets one new token or more.

    Sequences must not be finished, and all their tokens but the last must be in the cache.
    """
    recorder = StageRecorder()

    # Draft: the policy asks the drafters, and says what is to be verified.
    drafts = policy.draft(sequences)
    base.want_states(any(policy.wants_hidden(sequence) for sequence in sequences))
    recorder.ended("draft")

    # All trees go into one batch, a row per node.
    offsets = _place(base, sequences, drafts)
    n_rows = offsets[-1]
    recorder.ended("tree")

    base.decode_placed(n_rows)
    logits = base.logits(n_rows)
    states = base.hidden(n_rows) if base.embeddings else None
    recorder.ended("decode")

    # Verify: what the base model chooses at each node is accepted; the rest is rolled back.
    accepted = list[tuple[int, list[int]]]()  # of each sequence: the last node, the tokens
    for sequence, draft, offset in zip(sequences, drafts, offsets, strict=False):
        node, emitted = _verify(sequence, draft, logits[offset : offset + len(draft.tree)])
        recorder.ended("verify")
        if states is None:
            sequence.hidden = None
        else:
            sequence.hidden = states[offset + node : offset + node + 1].copy()
        roll_back(base, sequence.seq_ids, len(sequence.tokens) - 1, draft.tree, node)
        sequence.statistics.count(draft, node, len(emitted))
        accepted.append((node, emitted))
        recorder.ended("cache")

    # Learn from what came of it, and from what it took; log probabilities, which cost by tokens and
    # not by rows, are left out of that.
    spent = recorder.seconds
    seconds = spent["tree"] + spent["decode"] + spent["verify"] + spent["cache"]
    for i, sequence in enumerate(sequences):
        node, emitted = accepted[i]
        rows = logits[offsets[i] : offsets[i + 1]]
        sequence.accept(emitted, rows, drafts[i].tree, node)
        policy.record(sequence, StepOutcome(drafts[i], node, emitted, rows, n_rows, seconds))
    recorder.ended("policy")
    for sequence in sequences:
        sequence.statistics.add_seconds(recorder, 1 / len(sequences))


def _place(base: Base, sequences: abc.Sequence[Sequence], drafts: list[Draft]) -> list[int]:
    """Put the trees into the next batch; return where each one's rows begin, and where they end.

    A node's position is its depth behind the committed tokens, of which the root is the last.
    """
    offsets = [0]
    for sequence, draft in zip(sequences, drafts, strict=True):
        root = len(sequence.tokens) - 1
        positions = [root + depth for depth in draft.tree.depth_list]
        rows = tree_rows(draft.tree, sequence.seq_ids)
        offsets.append(base.place(offsets[-1], draft.tokens, positions, rows))
    return offsets


def _verify(sequence: Sequence, draft: Draft, logits: Float32Array) -> tuple[int, list[int]]:
    """Return the last accepted node, and the tokens that the step gives the sequence."""
    rule = verify_typically if sequence.typical_acceptance else verify
    return rule(
        draft.tree,
        draft.tokens,
        logits,
        sequence.sampler,
        index=sequence.n_new,
        ends_with=sequence.ends_with,
        room=sequence.max_length - len(sequence.tokens),
    )
