"""Comparison and proofs on the bundled model: what they report is true, and the proofs can fail."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from model.decoding.drafters.drafter import HEADS
from model.decoding.request import Request
from model.decoding.sampling import Sampler, SamplingParams
from model.errors import HeadsError, UsageError
from model.evaluation.figures import repeated_ngrams
from model.evaluation.negative_controls import negative_controls
from model.evaluation.proofs import BOTH, EVERY_SOURCE, WITHOUT_HEADS, prove
from model.evaluation.replay import noise_floor, replay, replay_base
from model.evaluation.speed import (
    TimedSequence,
    compare,
    take_turns,
    turn_tokens,
)
from model.heads.drafter import HeadsDrafter
from model.heads.known_heads import HEADS_FOLDER, find_heads
from model.loaded_model import LoadedModel, LoadOptions
from model.trees.tree import Tree

PROMPTS = ["import os\n\n\ndef main(argv):\n", "class Stack:\n    def __init__(self):\n"]


@pytest.fixture(scope="module")
def loaded(bundled_gguf: Path) -> Iterator[LoadedModel]:
    loaded = LoadedModel(bundled_gguf, LoadOptions(n_threads=1, context_size=512))
    yield loaded
    loaded.close()


def requests(loaded: LoadedModel, temperature: float = 0.0, max_tokens: int = 40) -> list[Request]:
    return [
        loaded.request(prompt, max_tokens, SamplingParams(temperature=temperature, seed=i))
        for i, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_proofs_hold(loaded: LoadedModel, temperature: float) -> None:
    trees = [Tree.chain(3), Tree.product([3, 2])]
    cases = prove(loaded, requests(loaded, temperature), trees)
    kinds = ["heads", "right drafts", "random drafts", "wrong drafts"]
    names = [case.name.split(",")[0] for case in cases]
    assert names == [*kinds, "heads", BOTH, *kinds[1:], EVERY_SOURCE]
    for case in cases:
        assert case.holds, case
        assert case.sequences == 2 and (case.chains_equal is None) == ("tree" in case.name)
        assert case.plain_equal + len(case.divergences) == 2
    heads, right, _, wrong = cases[:4]
    assert heads.acceptance_length > (1.1 if temperature else 1.3)
    assert right.acceptance_length > 3
    assert wrong.acceptance_length == pytest.approx(1.0)
    assert cases[-1].acceptance_length > (1.1 if temperature else 1.5)


def test_without_heads_other_drafters_are_put_to_the_proof(foreign_gguf: Path) -> None:
    other = LoadedModel(foreign_gguf, LoadOptions(n_threads=1, context_size=256))
    trees = [Tree.chain(3), Tree.product([2, 2])]
    cases = prove(other, requests(other, max_tokens=16), trees)
    kinds = ["right drafts", "random drafts", "wrong drafts"]
    assert [case.name.split(",")[0] for case in cases] == [
        *kinds,
        WITHOUT_HEADS,
        *kinds,
        EVERY_SOURCE,
    ]
    assert all(case.holds for case in cases), cases
    assert cases[0].acceptance_length > 2.2 > 1.5 > cases[2].acceptance_length
    noticed = negative_controls(other, requests(other, max_tokens=16), Tree.product([3, 2]))
    assert all(any(answers) for answers in noticed.values()), noticed
    other.close()


def test_figures_by_kind_add_up(loaded: LoadedModel) -> None:
    kinds = ["imports", "classes"]
    with loaded.fixed_decoder(Tree.chain(2)) as drafting:
        # One run: the whole's rate lies between the kinds'; medians over several need not.
        [result] = compare(loaded, requests(loaded), drafting, runs=1, kinds=kinds)
    by_kind = result["by_kind"]
    assert list(by_kind) == kinds and all(row["sequences"] == 1 for row in by_kind.values())
    for depth, drafted in enumerate(result["drafted_per_depth"]):
        assert drafted == sum(row["drafted_per_depth"][depth] for row in by_kind.values()) > 0
    rates = [row["plain"]["tokens_per_s"] for row in by_kind.values()]
    assert min(rates) <= result["plain"]["tokens_per_s"] <= max(rates)
    assert sum(row["equal_sequences"] for row in by_kind.values()) == result["equal_sequences"]


def test_every_planted_fault_is_noticed(loaded: LoadedModel) -> None:
    noticed = negative_controls(loaded, requests(loaded), Tree.product([3, 2]))
    assert len(noticed) == 5 and all(all(answers) for answers in noticed.values()), noticed


def test_a_sequence_with_one_foreign_token_does_not_pass_its_replay(loaded: LoadedModel) -> None:
    with loaded.fixed_decoder(Tree.chain(2)) as decoder, replay_base(loaded) as replayer:
        sequence = decoder.run(requests(loaded)[0], keep_logits=True)
        floor = noise_floor(replayer, [sequence])
        assert replay(replayer, sequence, floor).holds
        at = sequence.n_prompt + 10
        sequence.tokens[at] = (sequence.tokens[at] + 1) % loaded.file.n_vocab
        assert not replay(replayer, sequence, floor).holds


def test_a_sampled_sequence_replayed_with_another_seed_fails(loaded: LoadedModel) -> None:
    with loaded.fixed_decoder(Tree.chain(2)) as decoder, replay_base(loaded) as replayer:
        sequence = decoder.run(requests(loaded, 0.8)[0], keep_logits=True)
        floor = noise_floor(replayer, [sequence])
        assert replay(replayer, sequence, floor).holds
        sequence.sampler = Sampler(SamplingParams(temperature=0.8, seed=99))
        assert not replay(replayer, sequence, floor).holds


def test_comparison_reports_what_happened(loaded: LoadedModel) -> None:
    with loaded.fixed_decoder(Tree.chain(3)) as drafting:
        [result] = compare(loaded, requests(loaded), drafting, runs=2)
    assert result["sequences"] == 2
    assert result["equal_sequences"] + len(result["divergences"]) == 2
    assert result["plain"]["tokens_per_s"] > 0 and result["drafted"]["tokens_per_s"] > 0
    assert len(result["acceptance_rate_per_depth"]) == 3 and 3.5 < result["tree_nodes"] <= 4
    # First and last steps draft or keep less.
    length = 1 + sum(result["acceptance_rate_per_depth"])
    assert result["acceptance_length"] == pytest.approx(length, rel=0.15)


def test_names_of_before_say_the_same(loaded: LoadedModel) -> None:
    """Scripts may read them."""
    with loaded.fixed_decoder(Tree.chain(2), continuation=2) as drafting:
        [result] = compare(loaded, requests(loaded), drafting, runs=1)
    assert result["medusa"] == result["drafted"]
    assert result["head_steps"] == result["steps_by_depth"] and result["steps_by_depth"][2] > 0
    drafted = {source: counts["drafted"] for source, counts in result["by_source"].items()}
    assert set(drafted) == {"heads", "ngram"}
    assert result["branch_share"] == pytest.approx(drafted["ngram"] / sum(drafted.values()))
    accepted = result["by_source"]["ngram"]["accepted"]
    assert result["branch_accepted"] == pytest.approx(accepted / drafted["ngram"])


def test_tokens_that_no_draft_can_hold_are_counted(loaded: LoadedModel) -> None:
    few = loaded.fixed_decoder(Tree.chain(1), draft_vocab=64)
    most = loaded.fixed_decoder(Tree.chain(1))
    with few, most, loaded.fixed_decoder() as plain:
        results = compare(loaded, requests(loaded), few, most, runs=1)
        tokens = list[int]()
        for request in requests(loaded):
            timed = TimedSequence(plain, request)
            assert timed.advance(40)
            tokens += timed.sequence.new_tokens
    drafter = few.drafters.trees[HEADS]
    assert isinstance(drafter, HeadsDrafter)
    ids = drafter.ids
    assert ids is not None and len(ids) == 64
    outside = sum(token not in ids for token in tokens) / len(tokens)
    assert 0 < outside == pytest.approx(results[0]["outside_draft_vocab"])
    assert results[1]["outside_draft_vocab"] < outside


class OnSlowMachine:
    """100 tokens of so many seconds each, where all takes twice as long from second 40 to 80."""

    now = 0.0

    def __init__(self, cost: float) -> None:
        self.cost = cost
        self.n_tokens = 0
        self.seconds = 0.0

    def advance(self, n_tokens: int) -> bool:
        while self.n_tokens < min(n_tokens, 100):
            seconds = self.cost * (2 if 40 <= OnSlowMachine.now < 80 else 1)
            OnSlowMachine.now += seconds
            self.seconds += seconds
            self.n_tokens += 1
        return self.n_tokens == 100


@pytest.mark.parametrize(("piece", "even"), [(5, True), (100, False)])
def test_a_machine_that_is_slow_for_a_while_is_slow_for_all(piece: int, even: bool) -> None:
    OnSlowMachine.now = 0.0
    one = OnSlowMachine(1.0)
    other = OnSlowMachine(0.5)
    take_turns([one, other], piece)
    assert (one.seconds / other.seconds == pytest.approx(2, rel=0.08)) == even


def test_sequences_generated_in_turn_are_those_generated_at_once(loaded: LoadedModel) -> None:
    [request, _] = requests(loaded)
    with loaded.fixed_decoder(Tree.chain(3)) as drafting, loaded.fixed_decoder() as plain:
        assert turn_tokens(plain, request) > 40
        timed = [TimedSequence(drafting, request), TimedSequence(plain, request)]
        take_turns(timed, 7)
        whole = TimedSequence(plain, request)
        assert whole.advance(40) and all(each.sequence.n_new == 40 for each in timed)
        assert timed[1].sequence.new_tokens == whole.sequence.new_tokens
        assert 0.5 < timed[1].seconds / timed[1].sequence.statistics.seconds < 2


def test_no_draft_is_plain_decoding(loaded: LoadedModel) -> None:
    with loaded.fixed_decoder() as nothing:
        [result] = compare(loaded, requests(loaded), nothing, runs=1)
    assert result["equal_sequences"] == 2 and result["acceptance_length"] == 1.0


def test_repeated_ngrams() -> None:
    assert repeated_ngrams([list(range(20))]) == 0.0
    assert repeated_ngrams([[1, 2, 3, 4] * 5]) == pytest.approx((13 - 4) / 13)
    assert repeated_ngrams([[1, 2]]) == 0.0


def test_trees_beyond_heads_or_limit_are_refused(loaded: LoadedModel) -> None:
    with pytest.raises(UsageError, match="deep"):
        loaded.check_tree(Tree.chain(loaded.n_heads + 1))
    with pytest.raises(UsageError, match="MEDUSA_MAX_TOKENS_PER_STEP"):
        loaded.check_tree(Tree.product([100]))


def test_heads_are_found_by_what_they_were_made_for(
    loaded: LoadedModel, foreign_gguf: Path, tmp_path: Path
) -> None:
    assert find_heads(HEADS_FOLDER, loaded.file) is not None
    other = LoadedModel(foreign_gguf, loaded.options)
    assert other.heads_path is None
    with pytest.raises(HeadsError, match="no heads"):
        other.fixed_decoder(Tree.chain(1))
    other.close()
    named = LoadedModel(
        foreign_gguf, loaded.options, heads_path=find_heads(HEADS_FOLDER, loaded.file)
    )
    with pytest.raises(HeadsError, match="don't fit"):
        named.fixed_decoder(Tree.chain(1))
    named.close()
    assert loaded.heads_path is not None
    # Into the folder itself, not below it.
    shutil.copytree(loaded.heads_path, tmp_path / "heads")
    assert find_heads(tmp_path / "heads", loaded.file) == tmp_path / "heads"
    few = LoadedModel(loaded.file.path, replace(loaded.options, k_heads=1))
    assert few.n_heads == 1
    few.close()


@pytest.mark.parametrize(
    ("size", "message"),
    [(1, "at least 8 tokens"), (99_999_999_999, "the KV cache needs .* this machine has")],
)
def test_a_context_that_cannot_be_used_is_refused_before_it_is_made(
    bundled_gguf: Path, size: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        LoadedModel(bundled_gguf, LoadOptions(n_threads=1, context_size=size))
