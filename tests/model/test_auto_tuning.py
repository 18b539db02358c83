"""Auto-tuning on the bundled model: figures are plausible and kept, damaged ones measured anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.base.chat import ChatTemplate
from model.decoding.draft_policy import FixedPolicy
from model.decoding.drafters.drafter import HEADS, NGRAM, RECYCLED
from model.decoding.drafters.sources import FREE
from model.decoding.request import Request
from model.decoding.sampling import SamplingParams
from model.heads.files import base_facts, new_heads, save_heads
from model.heads.hydra import HydraHeads
from model.loaded_model import LoadedModel, LoadOptions
from model.planning import auto_tuning
from model.planning.adaptive_policy import AdaptivePolicy
from model.planning.auto_tuning import (
    KIND,
    Tuning,
    adaptive_decoder,
    adaptive_policy,
    measure,
    tuned,
)
from model.planning.choice import trial_requests
from model.planning.measured_acceptance import RANKS, TRAINING_WEIGHT, measured_acceptance
from model.planning.prompt_files import PYTHON_TRIALS, TASK_TRIALS, in_turn, read_tasks
from model.storage import facts
from model.trees.costs import CostCurve
from model.trees.slices import Slices, finish
from model.trees.tree import Tree

PROMPTS = ("import os\n\n\ndef main(argv):\n", "class Stack:\n    def __init__(self):\n")
GREEDY = SamplingParams()


@pytest.fixture(scope="module")
def hydra(bundled_gguf: Path) -> Iterator[LoadedModel]:
    """The bundled model with its own heads."""
    loaded = LoadedModel(bundled_gguf, LoadOptions(n_threads=1, context_size=512, max_nodes=16))
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def medusa(
    bundled_gguf: Path, hydra: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LoadedModel]:
    """Its heads without what they learnt of drafted tokens: Medusa's type sees the state alone."""
    heads = new_heads(replace(hydra.heads.config, head_type="medusa"), hydra.file)
    assert isinstance(hydra.heads, HydraHeads) and not isinstance(heads, HydraHeads)
    heads.load_state_dict(hydra.heads.state_dict(), strict=False)
    folder = tmp_path_factory.mktemp("medusa") / "heads"
    kept = (*base_facts(hydra.file), "rank_accuracies")
    save_heads(folder, heads, {key: hydra.heads_facts[key] for key in kept})
    loaded = LoadedModel(bundled_gguf, hydra.options, heads_path=folder)
    yield loaded
    loaded.close()


@pytest.fixture(params=["hydra", "medusa"])
def either(request: pytest.FixtureRequest) -> LoadedModel:
    loaded: LoadedModel = request.getfixturevalue(request.param)
    return loaded


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "folder", lambda: tmp_path)


def requests(loaded: LoadedModel) -> list[Request]:
    return [loaded.request(prompt, 40, GREEDY) for prompt in PROMPTS]


def test_trials_are_tasks_in_the_template_or_python_and_fit_the_context(
    hydra: LoadedModel,
) -> None:
    def shown(template: ChatTemplate | None) -> list[str]:
        found = trial_requests(hydra, GREEDY, template, n=7)
        assert all(len(request.prompt) <= hydra.context // 2 for request in found)
        return [hydra.base_model.detokenize(request.prompt) for request in found]

    python = [task.text for task in in_turn(read_tasks(PYTHON_TRIALS))[:7]]
    tasks = [task.text for task in in_turn(read_tasks(TASK_TRIALS))[:7]]
    for expected, text in zip(python, shown(None), strict=True):
        assert text and expected.startswith(text.rstrip("\ufffd"))
    for expected, text in zip(tasks, shown(ChatTemplate(None)), strict=True):
        assert len(text) > 20 and f"USER: {expected} ASSISTANT:".startswith(text.rstrip("\ufffd"))


def test_everything_is_measured(hydra: LoadedModel) -> None:
    found = finish(measure(hydra, requests(hydra), heads=True, budget_s=0.3))
    assert found.curve.sizes == (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
    assert found.curve.contexts == (64, 256)
    assert found.curve.ratio(16, 64) > 1.5, "16 rows cost more than one"
    assert len(found.draft_s) == hydra.n_heads and 1e-6 < found.draft_s[0] < 0.1
    rates = np.array(found.accuracies)
    assert rates.shape == (hydra.n_heads, RANKS)
    assert (rates.sum(1) <= 1 + 1e-6).all() and rates[0, 0] > 0.2
    best = found.choices(64, 16)
    assert [len(choice.tree) for choice in best] == list(found.curve.sizes)
    assert best[0].speedup == 1.0


def test_rates_are_those_of_a_sequence_generated_step_by_step(either: LoadedModel) -> None:
    """A chain drafted along the way must be accepted as often as the measured rates say."""
    request = requests(either)[0]
    drafter = either.heads_drafter(Tree.chain(either.n_heads), ranks=RANKS)
    rates, n = finish(measured_acceptance(either, drafter, [request], 40))
    prior = np.array(either.heads_facts["rank_accuracies"])[: either.n_heads, :RANKS]
    hits = rates[0] * (n + TRAINING_WEIGHT) - TRAINING_WEIGHT * prior[0]
    assert hits == pytest.approx(hits.round(), abs=1e-3), "hits are whole numbers"
    with either.fixed_decoder() as plain, either.fixed_decoder(Tree.chain(1)) as drafting:
        expected = plain.run(request)
        drafted = drafting.run(request)
    statistics = drafted.statistics
    assert drafted.new_tokens == expected.new_tokens
    assert abs(statistics.accepted[0] / statistics.drafted[0] - hits[0] / n) < 0.25


def test_what_was_measured_is_kept_and_damage_is_measured_again(
    hydra: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    known = Tuning(CostCurve((64,), (1, 2), ((1.0, 1.5),)), [], [], 0)

    def fake(*args: Any, **more: Any) -> Slices[Tuning]:
        calls.append(more)
        yield
        return known

    def recalled(*args: Any, **more: Any) -> Tuning:
        return finish(tuned(*args, **more))

    monkeypatch.setattr(auto_tuning, "measure", fake)
    greedy = requests(hydra)
    assert recalled(hydra, greedy, heads=False) == recalled(hydra, greedy, heads=False) == known
    assert len(calls) == 1
    sampled = [replace(r, sampling=SamplingParams(temperature=0.8)) for r in greedy]
    recalled(hydra, sampled, heads=False)
    curves = [call["curve"] for call in calls]
    assert curves == [None, known.curve], "steps cost the same, sampled or not"
    assert recalled(hydra, sampled, heads=False, afresh=True) == known
    assert calls.pop()["curve"] is None
    calls.pop()
    recalled(hydra, greedy, heads=True)
    assert len(calls) == 2, "another question"
    recalled(hydra, greedy[::-1], heads=True)
    assert len(calls) == 3, "other prompts, as of another chat template"
    calls.pop()

    # The heads are known by what they learnt, not by where they lie.
    assert hydra.heads_path is not None
    copy = shutil.copytree(hydra.heads_path, tmp_path / "heads")
    copied = LoadedModel(hydra.file.path, hydra.options, heads_path=copy)
    recalled(copied, greedy, heads=True)
    assert len(calls) == 2, "the same heads, written once more"
    copied.close()
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"steps": ', '"steps": 1'))
    changed = LoadedModel(hydra.file.path, hydra.options, heads_path=copy)
    recalled(changed, greedy, heads=True)
    changed.close()
    assert len(calls) == 3, "others"

    file = tmp_path / f"{KIND}.json"
    content = json.loads(file.read_text())
    damages: list[Any] = [
        None,
        {},
        {"curve": 3},
        {"draft_s": [1.0]},
        {"accuracies": [[2.0]], "draft_s": [0.1]},
    ]
    for damage in damages:
        for key in content:
            content[key] = damage if not damage else {**known.to_json(), **damage}
        file.write_text(json.dumps(content))
        before = len(calls)
        assert recalled(hydra, greedy, heads=False) == known and len(calls) == before + 1, damage


def test_a_prediction_charges_each_step_its_nodes_and_the_depth_that_the_heads_drafted() -> None:
    curve = CostCurve((64,), (1, 2, 4), ((1.0, 1.5, 2.0),))
    known = Tuning(curve, [0.25, 0.5], [[0.5], [0.5]], 9)
    seconds = 10 * 1.0 + 4 * (1.5 + 0.25) + 6 * (2.0 + 0.5)
    speedup = known.expected_speedup({1: 10, 2: 4, 4: 6}, 40, {1: 4, 2: 6}, 64)
    assert speedup == pytest.approx(40 / seconds)


CHEAP = CostCurve((64,), (1, 2, 4), ((1.0, 1.01, 1.02),))
DEAR = CostCurve((64,), (1, 2, 4), ((1.0, 9.0, 18.0),))


def test_both_types_of_heads_are_measured_and_draft_trees(either: LoadedModel) -> None:
    found = finish(measure(either, requests(either), heads=True, budget_s=0.3))
    assert len(found.draft_s) == either.n_heads
    assert np.array(found.accuracies).shape == (either.n_heads, RANKS)
    tree = Tree.product([2, 2, 2])
    with either.fixed_decoder() as plain, either.fixed_decoder(tree) as drafting:
        for request in requests(either):
            ours = drafting.run(request)
            assert ours.take_output().text == plain.run(request).take_output().text
            assert ours.statistics.acceptance_length > 1.0


def test_the_policy_drafts_from_the_sources_that_it_is_given(either: LoadedModel) -> None:
    known = Tuning(CHEAP, [0.01, 0.02, 0.03, 0.04], [[0.6], [0.5]] * 2, 99)
    policy, drafters = adaptive_policy(either, known, ())
    assert set(drafters.trees) == {HEADS} and not drafters.continuations
    assert isinstance(policy, AdaptivePolicy) and policy.max_nodes == 4
    policy, drafters = adaptive_policy(either, known, FREE)
    assert set(drafters.continuations) == {NGRAM, RECYCLED}
    without = replace(known, draft_s=[], accuracies=[])
    policy, drafters = adaptive_policy(either, without, {NGRAM})
    assert not drafters.trees and set(drafters.continuations) == {NGRAM}
    policy, drafters = adaptive_policy(either, without, ())
    assert isinstance(policy, FixedPolicy) and not drafters.continuations
    hopeless = replace(known, curve=DEAR)
    _, drafters = adaptive_policy(either, hopeless, {NGRAM})
    assert not drafters.trees, "heads that can never pay are not loaded"


def test_heads_are_asked_level_by_level_for_what_they_draft(either: LoadedModel) -> None:
    """The first guesses of each level are those of the heads' chain; of many sequences too."""
    chain = Tree.chain(3)
    drafter = either.heads_drafter(chain)
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((3, either.file.n_embd)).astype(np.float32)
    roots = [5, 6, 7]
    expected = drafter.draft(hidden, roots, [chain] * 3)
    paths = [[root] for root in roots]
    for _ in range(3):
        tokens, probabilities = drafter.look(hidden, [0, 1, 2], paths)
        for path, guesses, shares in zip(paths, tokens, probabilities, strict=True):
            path.append(guesses[0])
            assert (
                shares == sorted(shares, reverse=True) and shares[-1] > 0 and sum(shares) < 1 + 1e-6
            )
    assert [path[1:] for path in paths] == expected
    alone, _ = drafter.look(hidden[1:2], [0, 0], [[6], [9]])
    assert alone[0][0] == expected[1][0], "one state serves any number of paths"


@pytest.mark.parametrize("ngram", [True, False])
def test_an_adaptive_decoder_drafts_where_the_curve_says_that_it_pays(
    hydra: LoadedModel, ngram: bool
) -> None:
    rates = [[0.6, 0.1], [0.5, 0.1]]
    sequences = []
    for curve in (CHEAP, DEAR):
        known = Tuning(curve, [1e-6, 1e-6], rates, 99)
        with adaptive_decoder(hydra, known, {NGRAM} if ngram else ()) as decoder:
            sequences.append(decoder.run(requests(hydra)[0]))
    assert sequences[0].statistics.acceptance_length > 1.2
    assert sequences[1].statistics.acceptance_length == 1.0
    assert not sum(sequences[1].statistics.drafted)
