"""Draft → verify → accept: one step for one running text or for many. Knows no text, no heads and no requests."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from time import perf_counter
from typing import Protocol

import numpy as np
import numpy.typing as npt

from model.base.llama import LaneRows
from model.decoding.planning import Plan, Proposal
from model.decoding.slot import Slot
from model.decoding.verification import verify, verify_typically
from model.trees.tree import Tree

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]


class Base(Protocol):
    """What a step needs of `model.base.llama.LlamaBase`."""

    embeddings: bool
    n_seq_max: int

    def place(self, offset: int, tokens: list[int], pos: list[int], lanes: LaneRows) -> int: ...  # noqa: D102
    def want_states(self, wanted: bool) -> None: ...  # noqa: D102
    def decode(self, tokens: Int32Array, pos: int, seq: int, *, outputs: bool | None = None) -> None: ...  # noqa: D102
    def decode_placed(self, n: int) -> None: ...  # noqa: D102
    def prefill(self, tokens: Int32Array, pos: int, seq: int) -> None: ...  # noqa: D102
    def logits(self, n: int) -> Float32Array: ...  # noqa: D102
    def hidden(self, n: int) -> Float32Array: ...  # noqa: D102
    def seq_rm(self, seq: int, start: int, end: int) -> None: ...  # noqa: D102
    def seq_cp(self, source: int, target: int, start: int, end: int) -> None: ...  # noqa: D102


@lru_cache(maxsize=1024)
def lane_rows(tree: Tree, lanes: range) -> LaneRows:
    """Give each node the lanes of all leaves under it, and the root every lane of the slot."""
    assert len(tree.leaves) <= len(lanes), f"{len(tree.leaves)} leaves, {len(lanes)} lanes"
    counts = tree.under.sum(1).astype(np.int32)
    counts[0] = len(lanes)
    ids = np.zeros((len(tree), len(lanes)), np.int32)
    for node in range(1, len(tree)):
        ids[node, : counts[node]] = lanes.start + np.flatnonzero(tree.under[node])
    ids[0] = np.arange(lanes.start, lanes.stop)
    return LaneRows(counts, ids[:, : int(counts.max())])


def prefill(base: Base, slot: Slot) -> None:
    """Decode the prompt but its last token, which roots the first step."""
    base.prefill(np.array(slot.tokens[:-1], np.int32), 0, slot.lanes.start)
    for lane in slot.lanes[1:]:
        base.seq_cp(slot.lanes.start, lane, 0, len(slot.tokens) - 1)


def step(base: Base, slots: Sequence[Slot], plan: Plan) -> list[list[int]]:
    """Take every slot one verify pass further; return the tokens that each has won (one or more).

    Drafts with the slots' states and from their own texts, decodes all trees in one batch, keeps what the base model
    would have chosen, rolls the rest back. Slots must not be finished; their prompts must be in the cache.
    """
    start = perf_counter()
    proposals = plan.propose_all(slots)
    drafts = _draft(slots, proposals)
    trees = [_with_branch(proposal, tokens) for proposal, tokens in zip(proposals, drafts, strict=True)]
    base.want_states(any(plan.wants_state(slot) for slot in slots))
    drafted = perf_counter()
    n, offsets = 0, list[int]()
    for slot, tree, tokens in zip(slots, trees, drafts, strict=True):
        offsets.append(n)
        root = len(slot.tokens) - 1
        n = base.place(n, tokens, [root + depth for depth in tree.depth_list], lane_rows(tree, slot.lanes))
    placed = perf_counter()
    base.decode_placed(n)
    logits = base.logits(n)
    states = base.hidden(n) if base.embeddings else None
    decoded = perf_counter()
    won, verify_s = list[list[int]](), 0.0
    for slot, proposal, tree, tokens, at in zip(slots, proposals, trees, drafts, offsets, strict=True):
        since = perf_counter()
        rows, index = logits[at : at + len(tree)], len(slot.tokens) - slot.prompt_length
        room = slot.limit - len(slot.tokens)
        judge = verify_typically if slot.typical else verify
        node, emitted, slot.finished = judge(tree, tokens, rows, slot.sampler, index, slot.ends, room)
        verify_s += perf_counter() - since
        if slot.trace is not None:
            slot.trace += [rows[n].copy() for n in tree.path_to(node)]
        slot.hidden = None if states is None else states[at + node : at + node + 1].copy()
        _roll_back(base, slot, tree, node)
        slot.tokens += emitted
        slot.stats.count(tree, node, len(emitted), len(proposal.tree))
        won.append(emitted)
    kept = perf_counter()
    for slot, proposal, tokens, emitted in zip(slots, proposals, drafts, won, strict=True):
        plan.learn(slot, proposal, tokens, emitted, n, kept - drafted)
    cache_s, plan_s = kept - decoded - verify_s, perf_counter() - kept
    stages = (drafted - start, placed - drafted, decoded - placed, verify_s, cache_s, plan_s)
    for slot in slots:
        slot.stats.add_times(start, stages, 1 / len(slots))
    return won


def _draft(slots: Sequence[Slot], proposals: list[Proposal]) -> list[list[int]]:
    """Return the tokens (N,) of each slot's heads' tree, the root's first; slots with the same drafter share a call."""
    out = [[slot.tokens[-1]] for slot in slots]
    groups: dict[int, list[int]] = {}
    for i, proposal in enumerate(proposals):
        if len(proposal.tree) > 1:
            groups.setdefault(id(slots[i].drafter), []).append(i)
    for members in groups.values():
        drafter = slots[members[0]].drafter
        assert drafter is not None
        states = [state for i in members if (state := slots[i].hidden) is not None]
        hidden = states[0] if len(states) == 1 else np.concatenate(states)
        drafted = drafter.draft(hidden, [out[i][0] for i in members], [proposals[i].tree for i in members])
        for i, tokens in zip(members, drafted, strict=True):
            out[i] += tokens
    return out


def _with_branch(proposal: Proposal, tokens: list[int]) -> Tree:
    """Hang what may follow into the heads' tree, from where the two part; its tokens go behind the tree's."""
    tree, following, branch = proposal
    node = at = 0
    while at < len(following):
        child = tree.child_with(node, following[at], tokens)
        if not child:
            break
        node, at = child, at + 1
    more = following[at : at + branch]
    tokens += more
    return tree.with_branch(node, len(more))


def _roll_back(base: Base, slot: Slot, tree: Tree, node: int) -> None:
    """Make all lanes equal again: the old prefix, the root and the path to `node`, nothing else.

    Cells of the path are shared with the other lanes (`seq_cp` copies no data), only from where they part.
    """
    if len(tree) == 1:
        return
    root, depth = len(slot.tokens) - 1, tree.depth_list[node]
    shared = tree.shared_depths[node]
    source = slot.lanes.start + shared.index(depth)
    alone = len(slot.lanes) == base.n_seq_max  # nobody else's cells: one call for all lanes
    if alone and tree.max_depth > depth:
        base.seq_rm(-1, root + 1 + depth, -1)
    for i, lane in enumerate(slot.lanes):
        common, reached = (shared[i], tree.leaf_depths[i]) if i < len(shared) else (0, 0)
        if common < (min(reached, depth) if alone else reached):  # each call scans all cells
            base.seq_rm(lane, root + 1 + common, root + 1 + reached)
        if common < depth:
            base.seq_cp(source, lane, root + 1 + common, root + 1 + depth)
