"""Speed: plain and drafted decoding side by side, the same prompts, one process, in turn.

Plain decoding has a context of its own (one sequence id, no states), so that nothing flatters the
comparison. Times run from the end of the prefill to the end of the sequence. All decoders generate
at the same time, a piece each in turn: a machine that is slow for some seconds is slow for all of
them.
"""

from __future__ import annotations

import collections.abc as abc
from dataclasses import asdict, dataclass, replace
from math import ceil
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from model.decoding.decoder import Decoder
from model.decoding.drafters.drafter import HEADS
from model.decoding.request import Request
from model.decoding.sampling import Sampler
from model.decoding.sequence import Sequence
from model.evaluation.figures import Measured, old_names, speed_figures
from model.loaded_model import LoadedModel

# Of plain decoding, before the next decoder's turn; a tiny model generates all in one piece.
TURN_S = 1.0


class Timed(Protocol):
    """A sequence that is generated piece by piece; seconds: that it has taken after its prefill."""

    seconds: float

    def advance(self, n_tokens: int) -> bool:
        """Go on until there are so many new tokens; say whether the sequence is finished."""
        ...


class TimedSequence:
    """A sequence of a decoder; see Timed. It is made with its prefill and first step done."""

    def __init__(self, decoder: Decoder, request: Request) -> None:
        self._decoder = decoder
        self.sequence = decoder.start(request)
        while not self.sequence.n_new:
            decoder.scheduler.step()
        self.seconds = self.sequence.statistics.seconds

    def advance(self, n_tokens: int) -> bool:
        """See Timed."""
        sequence = self.sequence
        began = perf_counter()
        while not sequence.finished and sequence.n_new < n_tokens:
            self._decoder.scheduler.step()
            sequence.take_output()
        self.seconds += perf_counter() - began
        return sequence.finished


def take_turns(timed: abc.Sequence[Timed], piece: int) -> None:
    """Generate all sequences to their ends, `piece` tokens of each in turn."""
    unfinished = list(timed)
    goal = 0
    while unfinished:
        goal += piece
        unfinished = [each for each in unfinished if not each.advance(goal)]


def turn_tokens(plain: Decoder, request: Request) -> int:
    """Return how many tokens plain decoding generates in TURN_S."""
    most = 16 if request.max_tokens is None else min(16, request.max_tokens)
    timed = TimedSequence(plain, replace(request, max_tokens=most))
    timed.advance(most)
    return ceil(TURN_S * timed.sequence.n_new / timed.seconds)


@dataclass(frozen=True)
class Divergence:
    """Where a sequence begins to differ from the plain one; prompt and position count from 0.

    margin: between the two tokens there, in logits; None where one sequence ends there.
    """

    prompt: int
    position: int
    margin: float | None


def compare(
    loaded: LoadedModel,
    requests: abc.Sequence[Request],
    *decoders: Decoder,
    runs: int = 3,
    kinds: abc.Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Generate all requests `runs` times, by plain decoding and each decoder in turn.

    kinds: of task, one for each request. Returns each decoder's figures, and by kind those of each
    kind; rates are medians over runs.
    """
    with loaded.fixed_decoder() as plain:
        for decoder in decoders:
            turn_tokens(decoder, requests[0])  # warm
        piece = turn_tokens(plain, requests[0])
        measured = _in_turn((plain, *decoders), requests, runs, piece)
        return [_figures(loaded, requests, kinds, measured[0], drafted) for drafted in measured[1:]]


def _in_turn(
    decoders: abc.Sequence[Decoder], requests: abc.Sequence[Request], runs: int, piece: int
) -> list[Measured]:
    measured = [Measured(decoder, len(requests)) for decoder in decoders]
    for run in range(runs):
        for one in measured:
            one.begin_run()
        for i, request in enumerate(requests):
            first = (i + run) % len(decoders)  # another decoder goes first each time
            order = [*measured[first:], *measured[:first]]
            timed = [TimedSequence(one.decoder, request) for one in order]
            take_turns(timed, piece)
            for one, each in zip(order, timed, strict=True):
                one.add(i, each.sequence, each.seconds)
    return measured


def _figures(
    loaded: LoadedModel,
    requests: abc.Sequence[Request],
    kinds: abc.Sequence[str],
    plain: Measured,
    drafted: Measured,
) -> dict[str, Any]:
    """Return all figures of one decoder beside plain decoding's."""
    # The outputs: how many are equal, and where the others begin to differ.
    divergences = find_divergences(plain.decoder, plain.sequences, drafted.sequences, requests)
    differing = {divergence.prompt for divergence in divergences}
    plain_tokens = [sequence.new_tokens for sequence in plain.sequences]
    detokenize = loaded.base_model.detokenize

    # Speed and drafts, of all requests and of each kind.
    every = range(len(requests))
    figures = speed_figures(plain, drafted, every, differing)
    return {
        **figures,
        **old_names(figures),
        "by_kind": {
            kind: speed_figures(plain, drafted, [i for i in every if kinds[i] == kind], differing)
            for kind in dict.fromkeys(kinds)
        },
        "divergences": [asdict(divergence) for divergence in divergences],
        "outside_draft_vocab": _outside_draft_vocab(drafted.decoder, plain_tokens),
        "text_pairs": [
            (detokenize(p.new_tokens), detokenize(d.new_tokens))
            for p, d in zip(plain.sequences, drafted.sequences, strict=True)
        ],
    }


def _outside_draft_vocab(decoder: Decoder, outputs: abc.Sequence[abc.Sequence[int]]) -> float:
    """Return the share of tokens that the heads cannot draft: so often they must be wrong."""
    ids = getattr(decoder.drafters.trees.get(HEADS), "ids", None)  # the heads' drafter has them
    if ids is None:
        return 0.0
    tokens = np.concatenate([np.array(output, np.int32) for output in outputs])
    return 1 - float(np.isin(tokens, ids).mean())


def find_divergences(
    plain: Decoder,
    ours: abc.Sequence[Sequence],
    theirs: abc.Sequence[Sequence],
    requests: abc.Sequence[Request],
) -> list[Divergence]:
    """List where sequences begin to differ from plain decoding's, with the margin there.

    ours: plain decoding's. theirs: those that are compared with them.
    """
    found = list[Divergence]()
    for i, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        a = our.new_tokens
        b = their.new_tokens
        if a == b:
            continue
        pairs = zip(a, b, strict=False)
        at = next((k for k, (x, y) in enumerate(pairs) if x != y), -1)
        if at < 0:  # one of the two ends there
            found.append(Divergence(i, min(len(a), len(b)), None))
            continue
        found.append(Divergence(i, at, _margin(plain, requests[i], a[:at], b[at])))
    return found


def _margin(plain: Decoder, request: Request, shared: list[int], token: int) -> float:
    """Return by how much logits would have to differ for `token` to follow the shared ones."""
    # The shared tokens are prefilled: generated anew, they take the time of a whole sequence.
    again = plain.run(
        replace(request, prompt=request.prompt + shared, max_tokens=1), keep_logits=True
    )
    assert again.logits is not None
    sampler = Sampler(request.sampling, request.prompt)
    for each in shared:
        sampler.take(each)
    return sampler.margin(again.logits[-1], token, len(shared))
