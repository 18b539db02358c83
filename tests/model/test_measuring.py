"""Comparison and proofs on the bundled model: what they report is true, and the proofs can fail."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from config import HEADS_FOLDER
from model.decoding.generation import Request
from model.decoding.sampling import Sampler, SamplingParams
from model.engine import Engine, EngineOptions, find_heads
from model.errors import HeadsError, UsageError
from model.heads.drafter import HeadsDrafter
from model.measuring.faults import controls
from model.measuring.proofs import prove
from model.measuring.replay import noise_floor, replay
from model.measuring.speed import TimedText, compare, repeated_ngrams, take_turns, turn_tokens
from model.trees.tree import Tree

PROMPTS = ["import os\n\n\ndef main(argv):\n", "class Stack:\n    def __init__(self):\n"]


@pytest.fixture(scope="module")
def engine(bundled_gguf: Path) -> Iterator[Engine]:
    engine = Engine(bundled_gguf, EngineOptions(n_threads=2, context_size=512), None, HEADS_FOLDER)
    yield engine
    engine.model.close()


def requests(engine: Engine, temperature: float = 0.0, tokens: int = 40) -> list[Request]:
    return [engine.request(p, tokens, sampling=SamplingParams(temperature, seed=i)) for i, p in enumerate(PROMPTS)]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_proofs_hold(engine: Engine, temperature: float) -> None:
    cases = prove(engine, requests(engine, temperature), [Tree.chain(3), Tree.product([3, 2])])
    kinds = ["heads", "right drafts", "random drafts", "wrong drafts"]
    assert [c.name.split(",")[0] for c in cases] == [*kinds, "heads", "heads and text so far", *kinds[1:]]
    for case in cases:
        assert case.holds, case
        assert case.texts == 2 and (case.chains_equal is None) == ("tree" in case.name)
        assert case.plain_equal + len(case.divergences) == 2
    heads, right, wrong = cases[0], cases[1], cases[3]
    assert (
        heads.acceptance_length > (1.1 if temperature else 1.3)
        and right.acceptance_length > 3
        and wrong.acceptance_length == pytest.approx(1.0)
    )


def test_every_planted_fault_is_noticed(engine: Engine) -> None:
    noticed = controls(engine, requests(engine), Tree.product([3, 2]))
    assert len(noticed) == 5 and all(all(answers) for answers in noticed.values()), noticed


def test_a_text_with_one_foreign_token_does_not_pass_its_replay(engine: Engine) -> None:
    with engine.decoder(Tree.chain(2)) as decoder, engine.base(sequences=2) as replayer:
        generation = decoder.start(requests(engine)[0], keep_logits=True)
        generation.run()
        floor = noise_floor(replayer, [generation])
        assert replay(replayer, generation, floor).holds
        slot = generation.slot
        slot.tokens[slot.prompt_length + 10] = (slot.tokens[slot.prompt_length + 10] + 1) % engine.file.n_vocab
        assert not replay(replayer, generation, floor).holds


def test_a_sampled_text_replayed_with_another_seed_fails(engine: Engine) -> None:
    with engine.decoder(Tree.chain(2)) as decoder, engine.base(sequences=2) as replayer:
        generation = decoder.start(requests(engine, 0.8)[0], keep_logits=True)
        generation.run()
        floor = noise_floor(replayer, [generation])
        assert replay(replayer, generation, floor).holds
        generation.slot.sampler = Sampler(SamplingParams(0.8, seed=99))
        assert not replay(replayer, generation, floor).holds


def test_comparison_reports_what_happened(engine: Engine) -> None:
    with engine.decoder(Tree.chain(3)) as medusa:
        [result] = compare(engine, requests(engine), medusa, runs=2)
    assert result["sequences"] == 2 and result["equal_sequences"] + len(result["divergences"]) == 2
    assert result["plain"]["tokens_per_s"] > 0 and result["medusa"]["tokens_per_s"] > 0
    assert len(result["acceptance_rate_per_depth"]) == 3 and 3.5 < result["tree_nodes"] <= 4
    length = 1 + sum(result["acceptance_rate_per_depth"])
    assert result["acceptance_length"] == pytest.approx(length, rel=0.15)  # first and last steps draft or keep less


def test_tokens_that_no_draft_can_hold_are_counted(engine: Engine) -> None:
    few, most = engine.decoder(Tree.chain(1), draft_vocab=64), engine.decoder(Tree.chain(1))
    with few, most, engine.decoder() as plain:
        results = compare(engine, requests(engine), few, most, runs=1)
        tokens = list[int]()
        for request in requests(engine):
            text = TimedText(plain, request)
            assert text.write()
            tokens += text.generation.tokens
    assert isinstance(few.drafter, HeadsDrafter) and len(few.drafter.ids) == 64
    outside = sum(token not in few.drafter.ids for token in tokens) / len(tokens)
    assert 0 < outside == pytest.approx(results[0]["outside_draft_vocab"])
    assert results[1]["outside_draft_vocab"] < outside


class OnSlowMachine:
    """100 tokens of so many seconds each, on a machine that takes twice as long from second 40 to second 80."""

    now = 0.0

    def __init__(self, cost: float) -> None:
        self.cost, self.tokens, self.seconds = cost, 0, 0.0

    def write(self, tokens: int | None = None) -> bool:
        while self.tokens < min(tokens or 100, 100):
            took = self.cost * (2 if 40 <= OnSlowMachine.now < 80 else 1)
            OnSlowMachine.now += took
            self.seconds += took
            self.tokens += 1
        return self.tokens == 100


@pytest.mark.parametrize(("piece", "even"), [(5, True), (100, False)])
def test_a_machine_that_is_slow_for_a_while_is_slow_for_all(piece: int, even: bool) -> None:
    OnSlowMachine.now = 0.0
    one, other = OnSlowMachine(1.0), OnSlowMachine(0.5)
    take_turns([one, other], piece)
    assert (one.seconds / other.seconds == pytest.approx(2, rel=0.08)) == even


def test_texts_written_in_turn_are_those_written_at_once(engine: Engine) -> None:
    [request, _] = requests(engine)
    with engine.decoder(Tree.chain(3)) as medusa, engine.decoder() as plain:
        assert turn_tokens(plain, request) > 40
        texts = [TimedText(medusa, request), TimedText(plain, request)]
        take_turns(texts, 7)
        whole = TimedText(plain, request)
        assert whole.write() and all(len(text.generation.tokens) == 40 for text in texts)
        assert texts[1].generation.tokens == whole.generation.tokens
        assert 0.5 < texts[1].seconds / texts[1].generation.slot.stats.seconds < 2


def test_no_draft_is_plain_decoding(engine: Engine) -> None:
    with engine.decoder() as nobody:
        [result] = compare(engine, requests(engine), nobody, runs=1)
    assert result["equal_sequences"] == 2 and result["acceptance_length"] == 1.0


def test_repeated_ngrams() -> None:
    assert repeated_ngrams([list(range(20))]) == 0.0
    assert repeated_ngrams([[1, 2, 3, 4] * 5]) == pytest.approx((13 - 4) / 13)
    assert repeated_ngrams([[1, 2]]) == 0.0


def test_trees_beyond_heads_or_limit_are_refused(engine: Engine) -> None:
    with pytest.raises(UsageError, match="deep"):
        engine.check_tree(Tree.chain(engine.n_heads + 1))
    with pytest.raises(UsageError, match="MEDUSA_MAX_TOKENS_PER_STEP"):
        engine.check_tree(Tree.product([100]))


def test_heads_are_found_by_what_they_were_made_for(engine: Engine, foreign_gguf: Path, tmp_path: Path) -> None:
    assert find_heads(HEADS_FOLDER, engine.file) is not None
    other = Engine(foreign_gguf, engine.options, None, HEADS_FOLDER)
    assert other.weights is None
    with pytest.raises(HeadsError, match="no heads"):
        other.decoder(Tree.chain(1))
    named = Engine(foreign_gguf, engine.options, find_heads(HEADS_FOLDER, engine.file), HEADS_FOLDER)
    with pytest.raises(HeadsError, match="don't fit"):
        named.decoder(Tree.chain(1))
    assert engine.weights is not None
    shutil.copytree(engine.weights, tmp_path / "heads")  # into the folder itself, not below it
    assert find_heads(tmp_path / "heads", engine.file) == tmp_path / "heads"
    few = replace(engine.options, k_heads=1)
    assert Engine(engine.file.path, few, None, HEADS_FOLDER).n_heads == 1
