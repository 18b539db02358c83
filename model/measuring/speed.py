"""Plain decoding and Medusa side by side: the same prompts, one process, in turn.

Plain decoding has a context of its own (one sequence, no states), so that nothing flatters the comparison.
Times run from the end of the prompt to the end of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from statistics import median
from typing import Any

from model.decoding.generation import Generation, Request
from model.decoding.loops import count_repeats
from model.decoding.step import STAGES, Stats
from model.engine import Decoder, Engine


@dataclass(frozen=True)
class Divergence:
    """Where a text parts from the plain one: prompt and position count from 0, the margin is in logits."""

    prompt: int
    position: int
    margin: float


def compare(engine: Engine, requests: Sequence[Request], medusa: Decoder, *, runs: int = 3) -> dict[str, Any]:
    """Write all texts `runs` times both ways, in turn; return the figures of `bench` (rates are medians over runs)."""
    with engine.decoder() as plain:
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
    return {
        "plain": {"tokens_per_s": counts[0] / median(t[0] for t in times)},
        "medusa": {"tokens_per_s": counts[1] / median(t[1] for t in times)},
        "speedup": median((counts[1] / t[1]) / (counts[0] / t[0]) for t in times),
        "acceptance_length": stats.acceptance_length,
        "acceptance_rate_per_depth": [a / d for a, d in zip(stats.accepted, stats.drafted, strict=True)],
        "branch_accepted": stats.branch_accepted / max(stats.branch_drafted, 1),
        "branch_share": stats.branch_drafted / max(sum(stats.drafted), 1),
        "steps_by_nodes": dict(sorted(stats.sizes.items())),
        "head_steps": dict(sorted(stats.head_steps.items())),
        "tree_nodes": 1 + sum(stats.drafted) / max(stats.steps, 1),
        "draft_us": stats.draft_s * micro,
        "decode_us": stats.decode_s * micro,
        "verify_us": stats.verify_s * micro,
        "other_us": stats.other_s * micro,
        "stages_us": {stage: getattr(stats, f"{stage}_s") * micro for stage in STAGES},
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


def repeated_ngrams(texts: Sequence[Sequence[int]]) -> float:
    """Return the share of 8-grams that stood in the same text before: how much it loops."""
    repeated, total = count_repeats(texts)
    return repeated / total if total else 0.0


def _add(total: Stats, one: Stats) -> None:
    for name in ("drafted", "accepted"):
        a, b = getattr(total, name), getattr(one, name)
        setattr(total, name, [x + y for x, y in zip_longest(a, b, fillvalue=0)])
    for ours, theirs in ((total.sizes, one.sizes), (total.head_steps, one.head_steps)):
        for n, steps in theirs.items():
            ours[n] = ours.get(n, 0) + steps
    counts = ("steps", "emitted", "branch_drafted", "branch_accepted")
    for name in (*counts, *(f"{stage}_s" for stage in STAGES)):
        setattr(total, name, getattr(total, name) + getattr(one, name))
