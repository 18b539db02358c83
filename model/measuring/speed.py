"""Plain decoding and drafted decoding side by side: the same prompts, one process, in turn.

Plain decoding has a context of its own (one sequence, no states), so that nothing flatters the comparison.
Times run from the end of the prompt to the end of the text. All ways write a text at the same time, a piece each in
turn: a machine that is slow for some seconds is slow for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from math import ceil
from statistics import median
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from model.decoding.generation import Generation, Request
from model.decoding.loops import count_repeats
from model.decoding.sampling import Sampler
from model.decoding.slot import STAGES, Stats
from model.engine import Decoder, Engine

TURN_S = 1.0  # of plain decoding, before the next way's turn; the texts of a tiny model are written in one piece


class Timed(Protocol):
    """A text in the making and the seconds that it has taken, its prompt left out."""

    seconds: float

    def write(self, tokens: int | None = None) -> bool:
        """Go on until there are so many tokens (None: to the end); say whether the text is finished."""
        ...


class TimedText:
    """A text that a decoder writes; see Timed. The prompt and the first step are done when it is made."""

    def __init__(self, decoder: Decoder, request: Request) -> None:
        self.generation = decoder.start(request)
        self._pieces = iter(self.generation)
        next(self._pieces)
        self.seconds = self.generation.slot.stats.seconds

    def write(self, tokens: int | None = None) -> bool:
        """See Timed."""
        since, slot = perf_counter(), self.generation.slot
        for _ in self._pieces:
            if tokens is not None and len(slot.tokens) - slot.prompt_length >= tokens and not slot.finished:
                break
        self.seconds += perf_counter() - since
        return slot.finished


def take_turns(texts: Sequence[Timed], piece: int) -> None:
    """Write all texts to their ends, `piece` tokens of each in turn."""
    writing, goal = list(texts), 0
    while writing:
        goal += piece
        writing = [text for text in writing if not text.write(goal)]


def turn_tokens(plain: Decoder, request: Request) -> int:
    """Return how many tokens plain decoding writes in TURN_S."""
    text = TimedText(plain, replace(request, max_tokens=min(16, request.max_tokens)))
    text.write()
    return ceil(TURN_S * len(text.generation.tokens) / text.seconds)


@dataclass(frozen=True)
class Divergence:
    """Where a text parts from the plain one: prompt and position count from 0.

    margin: in logits; None where one text is the other's beginning.
    """

    prompt: int
    position: int
    margin: float | None


def compare(engine: Engine, requests: Sequence[Request], *ways: Decoder, runs: int = 3) -> list[dict[str, Any]]:
    """Write all texts `runs` times by plain decoding and each of the ways, in turn; return each way's figures.

    Rates are medians over runs.
    """
    with engine.decoder() as plain:
        piece = [turn_tokens(decoder, requests[0]) for decoder in (*ways, plain)][-1]  # and all are warm
        measured = _in_turn((plain, *ways), requests, runs, piece)
        return [_figures(engine, requests, measured[0], way) for way in measured[1:]]


@dataclass
class _Measured:
    """One way to decode: seconds of each run, the last run's texts, what all steps did."""

    decoder: Decoder
    seconds: list[float] = field(default_factory=list)
    texts: list[Generation] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each run."""
        tokens = sum(len(text.tokens) for text in self.texts)
        return [tokens / seconds for seconds in self.seconds]


def _in_turn(decoders: Sequence[Decoder], requests: Sequence[Request], runs: int, piece: int) -> list[_Measured]:
    measured = [_Measured(decoder) for decoder in decoders]
    for run in range(runs):
        for one in measured:
            one.seconds.append(0.0)
            one.texts.clear()
        for i, request in enumerate(requests):
            first = (i + run) % len(decoders)  # who goes first changes
            order = [*measured[first:], *measured[:first]]
            texts = [TimedText(one.decoder, request) for one in order]
            take_turns(texts, piece)
            for one, text in zip(order, texts, strict=True):
                one.seconds[-1] += text.seconds
                one.texts.append(text.generation)
                _add(one.stats, text.generation.slot.stats)
    return measured


def _figures(engine: Engine, requests: Sequence[Request], plain: _Measured, way: _Measured) -> dict[str, Any]:
    stats, texts = way.stats, [(p.tokens, w.tokens) for p, w in zip(plain.texts, way.texts, strict=True)]
    divergences = find_divergences(plain.decoder, plain.texts, way.texts, requests)
    ratios, micro = [w / p for p, w in zip(plain.rates, way.rates, strict=True)], 1e6 / max(stats.steps, 1)
    return {
        "plain": {"tokens_per_s": median(plain.rates)},
        "medusa": {"tokens_per_s": median(way.rates)},
        "speedup": median(ratios),
        "speedup_by_run": ratios,
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
        "outside_draft_vocab": _outside(way.decoder, [p for p, _ in texts]),
        "repeated_8grams": repeated_ngrams([p for p, _ in texts]),
        "text_pairs": [(engine.model.detokenize(p), engine.model.detokenize(w)) for p, w in texts],
    }


def _outside(decoder: Decoder, texts: Sequence[Sequence[int]]) -> float:
    """Return the share of tokens that the drafter cannot name: no head can be right more often than by the rest."""
    ids = getattr(decoder.drafter, "ids", None)  # the heads' drafter has them
    tokens = np.concatenate([np.array(text, np.int32) for text in texts])
    return 0.0 if ids is None else 1 - float(np.isin(tokens, ids).mean())


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
            found.append(Divergence(i, min(len(a.tokens), len(b.tokens)), None))
            continue
        shared = a.tokens[:at]  # read at once: written anew, they take the time of a whole text
        again = plain.start(replace(requests[i], prompt=requests[i].prompt + shared, max_tokens=1), keep_logits=True)
        again.run()
        assert again.slot.trace is not None
        sampler = Sampler(requests[i].sampling, requests[i].prompt)
        for token in shared:
            sampler.take(token)
        found.append(Divergence(i, at, sampler.margin(again.slot.trace[-1], b.tokens[at], at)))
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
