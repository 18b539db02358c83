"""Hydra's fast drafter against the heads' own logits, node by node; and how little it computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from model.decoding.drafters.drafter import RankingDrafter
from model.heads import hydra_drafter
from model.heads.fast import DType
from model.heads.hydra import HydraHeads
from model.heads.hydra_drafter import HydraDrafter
from model.heads.medusa import HeadsConfig
from model.trees.tree import Tree

K, D, V = 4, 64, 500
BUSHY = Tree([(0,), (1,), (2,), (1, 0), (1, 2), (0, 1), (1, 2, 0), (1, 2, 1), (1, 2, 1, 0)])
TREES = [Tree.chain(4), Tree.chain(1), Tree.product([3]), Tree.product([3, 2, 2]), BUSHY]


def make(lm_head: str = "tied", layers: int = 1, hidden: int = 0) -> HydraHeads:
    torch.manual_seed(0)
    config = HeadsConfig(
        k_heads=K,
        dim=D,
        vocab=V,
        head_layers=layers,
        hidden_dim=hidden,
        lm_head=lm_head,  # type: ignore[arg-type]
        head_type="hydra",
    )
    heads = HydraHeads(config, torch.randn(V, D) * 2 * D**-0.5, 0.1 * torch.randn(V, D), 0.5, 3.0)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5 * D**-0.5)
    return heads


def states(rows: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((rows, D), np.float32)


def one_by_one(
    heads: HydraHeads,
    state: Any,
    root: int,
    tree: Tree,
    among: Any = slice(None),
    *,
    straight: bool = False,
) -> list[int]:
    """Draft a tree node by node.

    straight: as though the tokens above were those of the best path.
    """
    tokens = [root]
    for node in range(1, len(tree)):
        above = [root] if straight else [tokens[n] for n in tree.path_to(node)[:-1]]
        read = torch.tensor([(above + [0] * K)[:K]])
        with torch.no_grad():
            logits = heads.logits(torch.from_numpy(state[None]), read)[
                tree.depths[node] - 1, 0
            ].numpy()
        best = np.arange(V)[among][np.argsort(-logits[among], kind="stable")]
        tokens.append(int(best[tree.ranks[node]]))
    return tokens[1:]


@pytest.mark.parametrize("lm_head", ["tied", "own"])
@pytest.mark.parametrize(("layers", "hidden"), [(1, 0), (2, 0), (2, 16)])
def test_f32_drafts_are_those_of_the_heads_for_each_node(
    lm_head: str, layers: int, hidden: int
) -> None:
    heads = make(lm_head, layers, hidden)
    drafter = HydraDrafter(heads, n_heads=K, ranks=3, dtype="f32")
    for tree in TREES:
        assert drafter.draft(states(1), [7], [tree]) == [one_by_one(heads, states(1)[0], 7, tree)]
    assert drafter.draft(states(1), [7], [BUSHY]) != [
        one_by_one(heads, states(1)[0], 7, BUSHY, straight=True)
    ]


def test_sequences_with_different_trees_are_drafted_as_though_alone() -> None:
    heads = make()
    roots = [3, 99, 7, 3, 250]
    drafter = HydraDrafter(heads, n_heads=K, ranks=3, dtype="f32")
    for order in (range(5), [4, 0, 2, 1, 3]):
        trees = [TREES[i] for i in order]
        chosen = states(5)[list(order)]
        expected = [one_by_one(heads, *each) for each in zip(chosen, roots, trees, strict=True)]
        assert drafter.draft(chosen, roots, trees) == expected


def test_ranks_behind_given_tokens_are_the_heads_with_their_probabilities() -> None:
    heads = make()
    tokens = np.random.default_rng(1).integers(0, V, (6, K)).astype(np.int32)
    drafter = HydraDrafter(heads, n_heads=3, ranks=4, dtype="f32", with_probs=True)
    with torch.no_grad():
        logits = heads.logits(torch.from_numpy(states(6)), torch.from_numpy(tokens).long())[
            :3
        ].transpose(0, 1)
    expected = logits.softmax(-1).topk(4)
    best, probabilities = drafter.rank(states(6), tokens)
    assert best.dtype == np.int32 and best.tolist() == expected.indices.tolist()
    assert probabilities is not None
    np.testing.assert_allclose(probabilities, expected.values.numpy(), rtol=1e-4)


def test_what_is_ranked_on_a_drafted_chain_is_that_chain() -> None:
    """So counting right guesses on finished text counts what steps would have accepted."""
    drafter = HydraDrafter(make(), n_heads=K, ranks=2, dtype="f32")
    (chain,) = drafter.draft(states(1), [7], [Tree.chain(K)])
    tokens = np.array([[7, *chain]], np.int32)
    assert drafter.rank(states(1), tokens[:, :K])[0][0, :, 0].tolist() == chain
    tokens[0, 0] += 1
    assert drafter.rank(states(1), tokens[:, :K])[0][0, :, 0].tolist() != chain


@pytest.mark.parametrize("dtype", ["auto", "bf16", "int8"])
@pytest.mark.parametrize("draft_vocab", [0, 100])
def test_low_precision_and_draft_vocabulary(dtype: DType, draft_vocab: int) -> None:
    heads = make()
    counts = np.arange(V, dtype=np.int32)
    drafter = HydraDrafter(
        heads, n_heads=K, ranks=3, dtype=dtype, draft_vocab=draft_vocab, token_counts=counts
    )
    among = slice(V - draft_vocab if draft_vocab else 0, V)
    equal = []
    for row, state in enumerate(states(40)):
        (drafted,) = drafter.draft(state[None], [row], [Tree.chain(3)])
        assert min(drafted) >= among.start
        equal.append(drafted[0] == one_by_one(heads, state, row, Tree.chain(3), among)[0])
    assert np.mean(equal) > 0.8, "noise for states: near-ties are common"


def test_a_pass_per_level_holds_only_nodes_with_children(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = HydraDrafter(make(), n_heads=K, ranks=3, dtype="f32")
    passes = []
    heads = drafter._heads

    def watched(k: int) -> Any:
        def head(*inputs: Any) -> Any:
            passes.append((k, inputs[1].shape))
            return heads[k](*inputs)

        return head

    monkeypatch.setattr(drafter, "_heads", [watched(k) for k in range(K)])
    drafter.draft(states(1), [7], [BUSHY])
    assert passes == [(0, (1, 1)), (1, (2, 2)), (2, (1, 3)), (3, (1, 4))]
    passes.clear()
    drafter.draft(states(2), [7, 8], [BUSHY, Tree.chain(2)])
    assert passes == [(0, (2, 1)), (1, (3, 2)), (2, (1, 3)), (3, (1, 4))]


def test_drafts_are_the_same_without_torchscript(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter: RankingDrafter = HydraDrafter(make(), n_heads=K, ranks=3, dtype="f32")
    expected = drafter.draft(states(2), [7, 8], [BUSHY, Tree.chain(2)])
    monkeypatch.delattr(torch.jit, "trace")
    plain = HydraDrafter(make(), n_heads=K, ranks=3, dtype="f32")
    assert plain.draft(states(2), [7, 8], [BUSHY, Tree.chain(2)]) == expected


def test_the_levels_of_trees_are_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = HydraDrafter(make(), n_heads=K, ranks=3, dtype="f32")
    drafter.draft(states(2), [7, 8], [BUSHY, TREES[3]])
    before = hydra_drafter._walk.cache_info().misses
    drafter.draft(states(2), [9, 8], [BUSHY, TREES[3]])
    assert hydra_drafter._walk.cache_info().misses == before
