"""Plain decoding and Medusa side by side: the same prompts, one process, in turn. Also picks the tree that pays.

Plain decoding has a context of its own (one sequence, no states), so that nothing flatters the comparison.
Times run from the end of the prompt to the end of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from statistics import median
from time import perf_counter
from typing import Any

from model.decoding.generation import Generation, Request
from model.decoding.planning import ROOT_ONLY
from model.decoding.step import Stats
from model.engine import Decoder, Engine
from model.trees.tree import Tree

WORTH = 1.02  # a tree must beat plain decoding by this much in the trial; less is noise
HOPELESS = 0.9  # of the best: longer chains are not tried


@dataclass(frozen=True)
class Divergence:
    """Where a text parts from the plain one: prompt and position count from 0, the margin is in logits."""

    prompt: int
    position: int
    margin: float


@dataclass(frozen=True)
class Trial:
    """What a tree reached in a trial, against plain decoding."""

    tree: Tree
    speedup: float
    acceptance_length: float


def choose_tree(
    engine: Engine, requests: Sequence[Request], *, draft_vocab: int = 0, tokens: int = 64, budget_s: float = 60.0
) -> list[Trial]:
    """Time chains of growing length against plain decoding; return the trials, best first, "no draft" among them.

    Chains that gain less than 2 % rank behind no draft at all, and lengths are tried until one is hopeless. Every
    chain writes at least one text of 16 tokens, however slow the model is; beyond that, `tokens` per text and all
    requests are used as far as budget_s (seconds) lets them.
    """
    if engine.n_heads == 0:
        return [Trial(ROOT_ONLY, 1.0, 1.0)]
    room = max(len(r.prompt) for r in requests) + tokens
    with engine.decoder(context=room) as plain:
        first, seconds = plain.time(replace(requests[0], max_tokens=8, stop=()))
        tokens = min(tokens, max(16, int(budget_s / engine.n_heads / 4 * len(first.tokens) / seconds)))
        short = [replace(r, max_tokens=min(tokens, r.max_tokens), stop=()) for r in requests]
        trials = [Trial(ROOT_ONLY, 1.0, 1.0)]
        for length in range(1, engine.n_heads + 1):
            with engine.decoder(Tree.chain(length), draft_vocab=draft_vocab, context=room) as medusa:
                trials.append(_try(plain, medusa, short, budget_s / engine.n_heads))
            if trials[-1].speedup < HOPELESS * max(t.speedup for t in trials):
                break
    return sorted(trials, key=lambda t: -t.speedup if len(t.tree) == 1 or t.speedup >= WORTH else 0.0)


def _try(plain: Decoder, medusa: Decoder, requests: Sequence[Request], budget_s: float) -> Trial:
    """Write texts both ways in turn, one at least, as long as there is time."""
    ratios, stats, start = list[float](), Stats(), perf_counter()
    medusa.time(requests[0])
    for request in [*requests, *requests]:
        (ours, plain_s), (theirs, medusa_s) = plain.time(request), medusa.time(request)
        ratios.append((len(theirs.tokens) / medusa_s) / (len(ours.tokens) / plain_s))
        _add(stats, theirs.slot.stats)
        if perf_counter() - start > budget_s:
            break
    return Trial(medusa.plan.tree, median(ratios), stats.acceptance_length)


def compare(
    engine: Engine,
    requests: Sequence[Request],
    tree: Tree,
    *,
    runs: int = 3,
    draft_vocab: int = 0,
) -> dict[str, Any]:
    """Write all texts `runs` times both ways, in turn; return the figures of `bench` (rates are medians over runs)."""
    with engine.decoder() as plain, engine.decoder(tree, draft_vocab=draft_vocab) as medusa:
        for decoder in (plain, medusa):
            decoder.time(replace(requests[0], max_tokens=min(16, requests[0].max_tokens)))
        return _compare(engine, plain, medusa, requests, runs)


def _compare(engine: Engine, plain: Decoder, medusa: Decoder, requests: Sequence[Request], runs: int) -> dict[str, Any]:
    times: list[tuple[float, float]] = []
    texts: list[tuple[Generation, Generation]] = []
    stats = Stats()
    for run in range(runs):
        seconds = [0.0, 0.0]
        texts.clear()
        for i, request in enumerate(requests):
            pair = {}
            for kind in (0, 1) if (i + run) % 2 else (1, 0):
                pair[kind], spent = (plain, medusa)[kind].time(request)
                seconds[kind] += spent
            texts.append((pair[0], pair[1]))
            _add(stats, pair[1].slot.stats)
        times.append((seconds[0], seconds[1]))
    counts = [sum(len(pair[kind].tokens) for pair in texts) for kind in (0, 1)]
    divergences = find_divergences(plain, [p for p, _ in texts], [m for _, m in texts], requests)
    micro = 1e6 / max(stats.steps, 1)
    tree = medusa.plan.tree
    return {
        "plain": {"tokens_per_s": counts[0] / median(t[0] for t in times)},
        "medusa": {"tokens_per_s": counts[1] / median(t[1] for t in times)},
        "speedup": median((counts[1] / t[1]) / (counts[0] / t[0]) for t in times),
        "acceptance_length": stats.acceptance_length,
        "acceptance_rate_per_depth": [a / d for a, d in zip(stats.accepted, stats.drafted, strict=True)],
        "tree": [list(path) for path in tree.paths[1:]],
        "tree_nodes": len(tree),
        "draft_us": stats.draft_s * micro,
        "decode_us": stats.decode_s * micro,
        "verify_us": stats.verify_s * micro,
        "other_us": stats.other_s * micro,
        "equal_sequences": len(texts) - len(divergences),
        "sequences": len(texts),
        "divergences": [asdict(d) for d in divergences],
        "repeated_8grams": repeated_ngrams([p.tokens for p, _ in texts]),
        "text_pairs": [(engine.model.detokenize(p.tokens), engine.model.detokenize(m.tokens)) for p, m in texts],
    }


def find_divergences(
    plain: Decoder, ours: list[Generation], theirs: list[Generation], requests: Sequence[Request]
) -> list[Divergence]:
    """List where texts part from plain decoding's, with plain decoding's distance between the two tokens there."""
    found: list[Divergence] = []
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a.tokens == b.tokens:
            continue
        at = next((k for k, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y), -1)
        if at < 0:  # one is the other's beginning
            found.append(Divergence(i, min(len(a.tokens), len(b.tokens)), float("nan")))
            continue
        again = plain.start(replace(requests[i], max_tokens=at + 1), keep_logits=True)
        again.run()
        assert again.slot.trace is not None
        found.append(Divergence(i, at, again.slot.sampler.margin(again.slot.trace[-1], b.tokens[at], at)))
    return found


def repeated_ngrams(texts: Sequence[Sequence[int]], n: int = 8) -> float:
    """Return the share of n-grams that stood in the same text before: how much it loops."""
    repeats = total = 0
    for text in texts:
        seen: set[tuple[int, ...]] = set()
        for i in range(len(text) - n + 1):
            gram = tuple(text[i : i + n])
            repeats += gram in seen
            total += 1
            seen.add(gram)
    return repeats / total if total else 0.0


def _add(total: Stats, one: Stats) -> None:
    for name in ("drafted", "accepted"):
        a, b = getattr(total, name), getattr(one, name)
        setattr(total, name, [x + y for x, y in zip_longest(a, b, fillvalue=0)])
    for name in ("steps", "emitted", "draft_s", "decode_s", "verify_s", "other_s"):
        setattr(total, name, getattr(total, name) + getattr(one, name))
