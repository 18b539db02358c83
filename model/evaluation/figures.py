"""Figures of a comparison: tokens per second, drafted and accepted nodes, of any of its requests.

Computes them from what was measured; measures nothing, and knows no model file.
"""

from __future__ import annotations

import collections.abc as abc
from statistics import median
from typing import Any

from model.decoding.decoder import Decoder
from model.decoding.drafters.drafter import NGRAM
from model.decoding.loops import count_repeats
from model.decoding.sequence import Sequence
from model.decoding.statistics import DraftStatistics


class Measured:
    """What one decoder did with n requests.

    seconds, tokens: of each run, by request. sequences: those of the last run. statistics: of all
    runs, by request.
    """

    def __init__(self, decoder: Decoder, n_requests: int) -> None:
        self.decoder = decoder
        self.seconds = list[list[float]]()
        self.tokens = list[list[int]]()
        self.sequences = list[Sequence]()
        self.statistics = [DraftStatistics() for _ in range(n_requests)]

    def begin_run(self) -> None:
        """Begin another run over all requests, which nothing is remembered of."""
        self.decoder.drafters.forget()
        self.seconds.append([])
        self.tokens.append([])
        self.sequences = []

    def add(self, i: int, sequence: Sequence, seconds: float) -> None:
        """Add the sequence of the i-th request, which is the next one of this run."""
        self.seconds[-1].append(seconds)
        self.tokens[-1].append(sequence.n_new)
        self.sequences.append(sequence)
        self.statistics[i].add(sequence.statistics)

    def rates(self, which: abc.Iterable[int]) -> list[float]:
        """Return the tokens per second of each run, over these requests."""
        chosen = list(which)
        return [
            sum(tokens[i] for i in chosen) / sum(seconds[i] for i in chosen)
            for tokens, seconds in zip(self.tokens, self.seconds, strict=True)
        ]


def speed_figures(
    plain: Measured, drafted: Measured, which: abc.Sequence[int], differing: set[int]
) -> dict[str, Any]:
    """Return the figures of a decoder beside plain decoding's, over some of the requests.

    which: their numbers. differing: the numbers of those whose outputs are not the same.
    """
    plain_rates = plain.rates(which)
    drafted_rates = drafted.rates(which)
    speedups = [d / p for p, d in zip(plain_rates, drafted_rates, strict=True)]
    statistics = DraftStatistics()
    for i in which:
        statistics.add(drafted.statistics[i])
    return {
        "plain": {"tokens_per_s": median(plain_rates)},
        "drafted": {"tokens_per_s": median(drafted_rates)},
        "speedup": median(speedups),
        "speedup_by_run": speedups,
        **draft_figures(statistics),
        "equal_sequences": sum(i not in differing for i in which),
        "sequences": len(which),
        "repeated_8grams": repeated_ngrams([plain.sequences[i].new_tokens for i in which]),
    }


def draft_figures(statistics: DraftStatistics) -> dict[str, Any]:
    """Return what was drafted and accepted, and microseconds of a step by stage."""
    steps = max(statistics.steps, 1)
    return {
        "acceptance_length": statistics.acceptance_length,
        "acceptance_rate_per_depth": [
            accepted / drafted
            for accepted, drafted in zip(statistics.accepted, statistics.drafted, strict=True)
        ],
        "drafted_per_depth": statistics.drafted,
        "by_source": {
            source: {
                "drafted": nodes,
                "accepted": statistics.accepted_by_source[source],
                "tried": statistics.tried_by_source[source],
                "promised": statistics.promised_by_source.get(source, 0.0),
            }
            for source, nodes in statistics.drafted_by_source.items()
        },
        "steps_by_nodes": dict(sorted(statistics.steps_by_nodes.items())),
        "steps_by_depth": dict(sorted(statistics.steps_by_depth.items())),
        "tree_nodes": 1 + statistics.nodes_per_step,
        "stages_us": {
            stage: 1e6 * seconds / steps for stage, seconds in statistics.seconds_by_stage.items()
        },
    }


def old_names(figures: dict[str, Any]) -> dict[str, Any]:
    """Return figures under the names that they had before, which scripts may read."""
    stages_us = figures["stages_us"]
    ngram = figures["by_source"].get(NGRAM, {"drafted": 0, "accepted": 0})
    return {
        "medusa": figures["drafted"],
        "head_steps": figures["steps_by_depth"],
        "branch_accepted": ngram["accepted"] / max(ngram["drafted"], 1),
        "branch_share": ngram["drafted"] / max(sum(figures["drafted_per_depth"]), 1),
        "draft_us": stages_us["draft"],
        "decode_us": stages_us["decode"],
        "verify_us": stages_us["verify"],
        "other_us": stages_us["tree"] + stages_us["cache"] + stages_us["policy"],
    }


def repeated_ngrams(outputs: abc.Sequence[abc.Sequence[int]]) -> float:
    """Return the share of 8-grams that came before in the same sequence: how much it loops."""
    repeated, total = count_repeats(outputs)
    return repeated / total if total else 0.0
