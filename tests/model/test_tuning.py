"""Tuning on the bundled model: what is measured is plausible and kept, and what is damaged is measured again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config import HEADS_FOLDER
from model.base import remember
from model.decoding.generation import Request
from model.decoding.live import LivePlan
from model.decoding.sampling import SamplingParams
from model.engine import Engine, EngineOptions
from model.heads.files import base_facts, new_heads, save_heads
from model.heads.hydra import HydraHeads
from model.measuring import tuning
from model.measuring.guess_rates import PRIOR, RANKS, guess_rates
from model.measuring.tuning import KIND, Tuning, live_decoder, live_plan, measure, tuned
from model.trees.costs import CostCurve
from model.trees.tree import Tree


@pytest.fixture(scope="module")
def engine(bundled_gguf: Path) -> Iterator[Engine]:
    engine = Engine(bundled_gguf, EngineOptions(n_threads=2, context_size=512, max_nodes=16), None, HEADS_FOLDER)
    yield engine
    engine.model.close()


@pytest.fixture(scope="module")
def medusa(bundled_gguf: Path, engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The bundled heads without what they learnt of drafted tokens: Medusa's kind, which sees the state alone."""
    heads = new_heads(replace(engine.heads.config, head_type="medusa"), engine.file)
    assert isinstance(engine.heads, HydraHeads) and not isinstance(heads, HydraHeads)
    heads.load_state_dict(engine.heads.state_dict(), strict=False)
    folder = tmp_path_factory.mktemp("medusa") / "heads"
    save_heads(folder, heads, {key: engine.heads_facts[key] for key in (*base_facts(engine.file), "rank_accuracies")})
    medusa = Engine(bundled_gguf, engine.options, folder, HEADS_FOLDER)
    yield medusa
    medusa.model.close()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remember, "folder", lambda: tmp_path)


def requests(engine: Engine) -> list[Request]:
    return [
        engine.request(p, 40) for p in ("import os\n\n\ndef main(argv):\n", "class Stack:\n    def __init__(self):\n")
    ]


def test_everything_is_measured(engine: Engine) -> None:
    found = measure(engine, requests(engine), heads=True, budget_s=0.3)
    assert found.curve.sizes == (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16) and found.curve.contexts == (64, 256)
    assert found.curve.ratio(16, 64) > 1.5, "16 rows cost more than one"
    assert len(found.draft_s) == engine.n_heads and 1e-6 < found.draft_s[0] < 0.1
    rates = np.array(found.accuracies)
    assert rates.shape == (engine.n_heads, RANKS) and (rates.sum(1) <= 1 + 1e-6).all() and rates[0, 0] > 0.2
    best = found.choices(64, 16)
    assert [len(c.tree) for c in best] == list(found.curve.sizes) and best[0].speedup == 1.0


@pytest.mark.parametrize("kind", ["engine", "medusa"])
def test_rates_are_those_of_a_text_written_step_by_step(kind: str, request: pytest.FixtureRequest) -> None:
    """A chain drafted along the way must be accepted as often as the counted rates say."""
    engine: Engine = request.getfixturevalue(kind)
    wanted = requests(engine)[0]
    drafter = engine.drafter(Tree.chain(engine.n_heads), ranks=RANKS)
    rates, n = guess_rates(engine, drafter, [wanted], 40)
    prior = np.array(engine.heads_facts["rank_accuracies"])[: engine.n_heads, :RANKS]
    hits = rates[0] * (n + PRIOR) - PRIOR * prior[0]
    assert hits == pytest.approx(hits.round(), abs=1e-3), "hits are whole numbers"
    with engine.decoder() as plain:
        text = plain.start(wanted)
        text.run()
    with engine.decoder(Tree.chain(1)) as medusa:
        drafted = medusa.start(wanted)
        drafted.run()
    stats = drafted.slot.stats
    assert drafted.tokens == text.tokens
    assert abs(stats.accepted[0] / stats.drafted[0] - hits[0] / n) < 0.25


def test_what_was_measured_is_kept_and_damage_is_measured_again(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    known = Tuning(CostCurve((64,), (1, 2), ((1.0, 1.5),)), [], [], 0)

    def fake(*args: Any, **more: Any) -> Tuning:
        calls.append(more)
        return known

    monkeypatch.setattr(tuning, "measure", fake)
    assert tuned(engine, requests(engine), heads=False) == tuned(engine, requests(engine), heads=False) == known
    assert len(calls) == 1
    sampled = [replace(r, sampling=SamplingParams(0.8)) for r in requests(engine)]
    tuned(engine, sampled, heads=False)
    assert [call["curve"] for call in calls] == [None, known.curve], "steps cost the same, whoever is sampled"
    assert tuned(engine, sampled, heads=False, afresh=True) == known and calls.pop()["curve"] is None
    calls.pop()
    tuned(engine, requests(engine), heads=True)
    assert len(calls) == 2, "another question"
    assert engine.weights is not None
    copied = Engine(engine.file.path, engine.options, shutil.copytree(engine.weights, tmp_path / "heads"), HEADS_FOLDER)
    tuned(copied, requests(engine), heads=True)
    assert len(calls) == 2, "the same heads, written once more"
    config = tmp_path / "heads" / "config.json"
    config.write_text(config.read_text().replace('"steps": ', '"steps": 1'))
    copied.model.close()
    changed = Engine(engine.file.path, engine.options, tmp_path / "heads", HEADS_FOLDER)
    tuned(changed, requests(engine), heads=True)
    changed.model.close()
    assert len(calls) == 3, "others"
    file = tmp_path / f"{KIND}.json"
    content = json.loads(file.read_text())
    damages: list[Any] = [None, {}, {"curve": 3}, {"draft_s": [1.0]}, {"accuracies": [[2.0]], "draft_s": [0.1]}]
    for damage in damages:
        for key in content:
            content[key] = damage if not damage else {**known.to_json(), **damage}
        file.write_text(json.dumps(content))
        before = len(calls)
        assert tuned(engine, requests(engine), heads=False) == known and len(calls) == before + 1, damage


def test_a_prediction_charges_each_step_its_nodes_and_the_depth_that_the_heads_drafted() -> None:
    known = Tuning(CostCurve((64,), (1, 2, 4), ((1.0, 1.5, 2.0),)), [0.25, 0.5], [[0.5], [0.5]], 9)
    seconds = 10 * 1.0 + 4 * (1.5 + 0.25) + 6 * (2.0 + 0.5)
    assert known.expected_speedup({1: 10, 2: 4, 4: 6}, 40, {1: 4, 2: 6}, 64) == pytest.approx(40 / seconds)


@pytest.mark.parametrize("kind", ["engine", "medusa"])
def test_both_kinds_of_heads_are_measured_and_draft_trees(kind: str, request: pytest.FixtureRequest) -> None:
    heads: Engine = request.getfixturevalue(kind)
    found = measure(heads, requests(heads), heads=True, budget_s=0.3)
    assert len(found.draft_s) == heads.n_heads and np.array(found.accuracies).shape == (heads.n_heads, RANKS)
    cheap = replace(found, curve=CostCurve((64,), (1, 2, 4), ((1.0, 1.01, 1.02),)), accuracies=[[0.6], [0.5]] * 2)
    plan, _ = live_plan(heads, replace(cheap, draft_s=[0.01, 0.02, 0.03, 0.04]), ngrams=False)
    with heads.decoder() as plain, heads.decoder(Tree.product([2, 2, 2])) as drafted:
        for asked in requests(heads):
            ours, theirs = drafted.start(asked), plain.start(asked)
            assert ours.run() == theirs.run()
            assert ours.slot.stats.acceptance_length > 1.0
    assert isinstance(plan, LivePlan)
    charged = plan.draft_s[1:].tolist()  # by the size of the tree; Medusa's heads all draft at once
    assert len(charged) > 2 and (len(set(charged)) == 1) == (kind == "medusa"), charged


@pytest.mark.parametrize("ngrams", [True, False])
def test_a_live_decoder_drafts_where_the_curve_says_that_it_pays(engine: Engine, ngrams: bool) -> None:
    rates = [[0.6, 0.1], [0.5, 0.1]]
    cheap = Tuning(CostCurve((64,), (1, 2, 4), ((1.0, 1.01, 1.02),)), [1e-6, 1e-6], rates, 99)
    dear = Tuning(CostCurve((64,), (1, 2, 4), ((1.0, 9.0, 18.0),)), [1e-6, 1e-6], rates, 99)
    texts = []
    for known in (cheap, dear):
        with live_decoder(engine, known, ngrams=ngrams) as decoder:
            generation = decoder.start(requests(engine)[0])
            generation.run()
            texts.append(generation)
    assert texts[0].slot.stats.acceptance_length > 1.2
    assert texts[1].slot.stats.acceptance_length == 1.0 and not sum(texts[1].slot.stats.drafted)
