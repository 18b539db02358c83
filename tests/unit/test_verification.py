"""Which nodes stand, on hand-made logits."""

from __future__ import annotations

import numpy as np
import pytest

from model.decoding.sampling import Sampler, SamplingParams
from model.decoding.verification import verify, verify_typically
from model.trees.tree import Tree

#        nodes: root, (0,), (1,), (1, 0), (1, 1)
TREE = Tree([(0,), (1,), (1, 0), (1, 1)])
TOKENS = [9, 4, 5, 6, 7]


def walk(choices: list[int], *, end: int = -1, room: int = 99) -> tuple[int, list[int]]:
    """Verify with logits whose argmax at each node is given."""
    logits = np.zeros((len(TREE), 10), np.float32)
    logits[np.arange(len(TREE)), choices] = 1
    sampler = Sampler(SamplingParams())
    return verify(TREE, TOKENS, logits, sampler, index=0, ends_with=lambda t: t == end, room=room)


@pytest.mark.parametrize(
    ("choices", "node", "emitted"),
    [
        ([8, 0, 0, 0, 0], 0, [8]),  # nothing drafted was right
        ([4, 3, 0, 0, 0], 1, [4, 3]),  # the first sibling, a leaf
        ([5, 0, 2, 0, 0], 2, [5, 2]),  # the second sibling, whose children are wrong
        ([5, 0, 7, 0, 1], 4, [5, 7, 1]),  # down to the second leaf
        ([6, 0, 7, 0, 1], 0, [6]),  # a token of another depth is not a child
    ],
)
def test_the_base_models_choices_decide(choices: list[int], node: int, emitted: list[int]) -> None:
    assert walk(choices) == (node, emitted)


def test_an_end_token_or_a_full_text_stops_the_walk_before_its_node() -> None:
    assert walk([5, 0, 7, 0, 1], end=5) == (0, [5])
    assert walk([5, 0, 7, 0, 1], end=7) == (2, [5, 7])
    assert walk([5, 0, 7, 0, 1], room=1) == (0, [5])
    assert walk([5, 0, 7, 0, 1], room=3) == (4, [5, 7, 1])


def test_draws_are_numbered_by_the_text() -> None:
    logits, params = np.zeros((5, 10), np.float32), SamplingParams(temperature=1.0, seed=3)
    plain = [Sampler(params).choose(logits[0], i) for i in range(20)]
    for index in range(20):
        _, emitted = verify(
            TREE, TOKENS, logits, Sampler(params), index=index, ends_with=lambda t: False, room=1
        )
        assert emitted == [plain[index]]


def typically(
    logits: np.ndarray, params: SamplingParams, *, end: int = -1, room: int = 99
) -> tuple[int, list[int]]:
    sampler = Sampler(params)
    return verify_typically(
        TREE, TOKENS, logits, sampler, index=0, ends_with=lambda t: t == end, room=room
    )


def test_typical_acceptance_keeps_the_longest_path_that_is_likely_enough() -> None:
    logits = np.full((len(TREE), 10), -20.0, np.float32)
    logits[0, [4, 5]] = 2.0, 1.0  # both typical; (0,) is likelier, but below (1,) more stands
    logits[2, [6, 7]] = 1.0, -20.0
    logits[3, 3] = 1.0
    params = SamplingParams(temperature=1.0, seed=1)
    assert typically(logits, params) == (3, [5, 6, 3])
    assert typically(logits, params, end=6) == (2, [5, 6])
    assert typically(logits, params, room=1) == (0, [5])
    assert typically(logits, SamplingParams())[1][0] == 4, "greedy decoding stays exact"
    assert typically(logits, SamplingParams(temperature=1.0, seed=1, logit_bias={6: -100.0}))[1][
        :2
    ] != [5, 6], "a banned token"
    assert typically(logits, SamplingParams(temperature=1.0, seed=1, top_k=1))[1][0] == 4, (
        "what top-k leaves out is not typical"
    )
    # flat: e^-entropy lowers what is asked for, but 4 and 5 must still reach it
    logits[0] = 1.0, *[0.0] * 9
    logits[0, [4, 5]] = -20.0
    assert typically(logits, params)[0] == 0, "an unlikely token does not stand"
