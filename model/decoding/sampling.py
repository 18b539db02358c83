"""How a token is chosen from logits: greedy, or temperature, top-k, top-p, min-p and a seed.

Knows nothing of drafts. The draw for the i-th new token uses the i-th number of the seed's stream,
whatever the batch looked like: so plain and speculative decoding make the same draws, and a
sequence can be replayed.

Penalties and grammars follow the sequence. Verification walks down the one accepted path, so a
sampler that takes each token just after it has chosen it has followed exactly the tokens before
every node: no path of the draft tree needs a state of its own.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from model.errors import UsageError

Float32Array = npt.NDArray[np.float32]
_BLOCK = 256
_SECOND = 1 << 40  # draws from here on are for tokens that a grammar made choose once more
# temperatures below are greedy: e^(difference / T) would overflow or round to it anyway
COLD = 1e-4
# Beside the likeliest: top-p sorts the tokens above the first of these bounds that hold its mass.
_BOUNDS = (1e-2, 1e-4, 0.0)
_SUMMED = 512  # a draw adds up so many tokens at a time, then goes through those of one sum


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. Raises UsageError for values that mean nothing.

    temperature 0 is greedy; top_k 0, top_p 1.0, min_p 0, repeat_penalty 1.0 and other penalties of
    0 are off. seed: of the draws; None: another one each time. min_p: a token must be this likely,
    beside the likeliest. presence_penalty, frequency_penalty: taken from the logits of new tokens,
    once and per time they came up. repeat_penalty: divides the logits of all tokens so far, prompt
    included, where they are positive, and multiplies the negative ones. logit_bias: added at last,
    by token.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UsageError(f"temperature {self.temperature} is outside 0 … 100")
        if self.top_k < 0:
            raise UsageError(f"top_k {self.top_k} is negative; 0 is off")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p} is not above 0 and at most 1")
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"seed {self.seed} is negative")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p {self.min_p} is outside 0 … 1")
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) <= 100:
                raise UsageError(f"{name} {getattr(self, name)} is outside -100 … 100")
        if not 0.01 <= self.repeat_penalty <= 100:
            raise UsageError(f"repeat_penalty {self.repeat_penalty} is outside 0.01 … 100")
        for token, bias in self.logit_bias.items():
            if not abs(bias) <= 1e6:
                raise UsageError(
                    f"logit_bias {bias} of token {token} is no number within ±1,000,000"
                )

    @property
    def penalized(self) -> bool:
        """Whether logits hang on the tokens before."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repeat_penalty != 1)


class Grammar(Protocol):
    """Which tokens a grammar allows next; `model.base.grammar` has llama.cpp's."""

    def allows(self, token: int) -> bool:
        """Say whether a token may come next."""
        ...

    def masked(self, logits: Float32Array) -> Float32Array:
        """Return a copy of logits (V,), minus infinity where a token must not come next."""
        ...

    def take(self, token: int) -> None:
        """Go on behind a token, which must be allowed."""
        ...


class Sampler:
    """Chooses the tokens of one sequence.

    `take` tells it what was chosen where `follows` says that it must know. prompt: the tokens
    before, for repeat_penalty.
    """

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int] = (), grammar: Grammar | None = None
    ) -> None:
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(32))
        self.params = params
        self._rng = np.random.default_rng(params.seed)
        self._draws: list[float] = []
        self._shares = np.empty((0, _SUMMED), np.float32)
        self._grammar = grammar
        self.follows = params.penalized or grammar is not None
        self._shapes = params.penalized or bool(params.logit_bias)
        self._biased = np.array(list(params.logit_bias), np.int64)
        self._bias = np.array(list(params.logit_bias.values()), np.float32)
        self._counts: dict[int, int] = {}  # of the new tokens
        self._seen = set(prompt) if params.repeat_penalty != 1 else set[int]()

    def take(self, token: int) -> None:
        """Take note of the sequence's next token."""
        self._counts[token] = self._counts.get(token, 0) + 1
        if self.params.repeat_penalty != 1:
            self._seen.add(token)
        if self._grammar is not None:
            self._grammar.take(token)

    def _shaped(self, logits: Float32Array) -> Float32Array:
        """Return logits with penalties and biases."""
        p = self.params
        out = logits.copy()
        if p.repeat_penalty != 1 and self._seen:
            ids = np.fromiter(self._seen, np.int64, len(self._seen))
            rows = out[ids]
            factor = np.float32(p.repeat_penalty)
            out[ids] = np.where(rows > 0, rows / factor, rows * factor)
        if (p.presence_penalty or p.frequency_penalty) and self._counts:
            ids = np.fromiter(self._counts, np.int64, len(self._counts))
            times = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            out[ids] -= np.float32(p.presence_penalty) + np.float32(p.frequency_penalty) * times
        if len(self._biased):
            out[self._biased] += self._bias
        return out

    def _draw(self, index: int) -> float:
        if index >= _SECOND:
            return float(np.random.default_rng([self.params.seed or 0, index]).random())
        while index >= len(self._draws):
            self._draws += self._rng.random(_BLOCK).tolist()
        return self._draws[index]

    def choose(self, logits: Float32Array, index: int) -> int:
        """Return the token for logits (V,) as the `index`-th new token (from 0)."""
        if self._shapes:
            logits = self._shaped(logits)
        token = self._pick(logits, index)
        if self._grammar is None or self._grammar.allows(token):
            return token
        # As llama.cpp does: nearly always the grammar allows what the model wants, and masking
        # looks at every token. Without top-k, top-p and min-p, which look at what they are given,
        # it is a draw from the masked distribution: p(x) + (1 - P) · p(x) / P = p(x) / P, where P
        # is the share that is allowed.
        return self._pick(self._grammar.masked(logits), index + _SECOND)

    def _pick(self, logits: Float32Array, index: int) -> int:
        p = self.params
        if p.temperature < COLD:
            return int(logits.argmax())
        if p.top_k == 0 and p.top_p == 1 and not p.min_p:
            return self._draw_from(logits, self._draw(index))
        kept = self.kept(logits)
        mass = _mass(logits[kept], p.temperature)
        return int(kept[mass.searchsorted(self._draw(index) * mass[-1], side="right")])

    def _draw_from(self, logits: Float32Array, draw: float) -> int:
        """Return the token at which the cumulated probabilities pass a share 0 ≤ draw < 1.

        The whole vocabulary is added up in sums, and only one of them is gone through. What it
        takes in memory stays: new memory for each token took longer than the exponentials.
        """
        n = len(logits)
        if self._shares.size < n:
            self._shares = np.zeros((-(-n // _SUMMED), _SUMMED), np.float32)
        shares = self._shares.reshape(-1)[:n]
        _exponentials(logits, self.params.temperature, out=shares)
        sums = self._shares.sum(axis=1, dtype=np.float64).cumsum()
        goal = draw * sums[-1]
        block = int(sums.searchsorted(goal, side="right"))
        before = sums[block - 1] if block else 0.0
        mass = self._shares[block].cumsum(dtype=np.float64)
        last = int(mass.searchsorted(mass[-1]))  # that is possible: rounding must not pass it
        within = int(mass.searchsorted(goal - before, side="right"))
        return block * _SUMMED + min(within, last)

    def kept(self, logits: Float32Array) -> npt.NDArray[np.int64]:
        """Return the ids, ascending, that top-k, then top-p, then min-p leave."""
        p = self.params
        n = len(logits)
        ids: npt.NDArray[np.int64] | None = None  # all
        if p.top_k and p.top_k < n:
            ids = np.argpartition(logits, n - p.top_k)[n - p.top_k :]
        if p.top_p < 1:
            best = _nucleus(logits if ids is None else logits[ids], p.temperature, p.top_p)
            ids = best if ids is None else ids[best]
        if p.min_p:
            bound = logits.max() + p.temperature * np.log(p.min_p)
            ids = np.flatnonzero(logits >= bound) if ids is None else ids[logits[ids] >= bound]
        return np.arange(n) if ids is None else np.sort(ids)

    def log_shares(self, logits: Float32Array) -> npt.NDArray[np.float64]:
        """Return the log probabilities (V,) that `choose` draws from, penalties left out.

        Not to be asked where the choice is greedy.

        Biases, top-k, top-p, min-p and temperature are in them; what they leave out is minus
        infinity.
        """
        if self._shapes:
            logits = self._shaped(logits)
        kept = self.kept(logits)
        out = np.full(len(logits), -np.inf)
        out[kept] = log_softmax(logits[kept] / np.float32(self.params.temperature))
        return out

    def margin(self, logits: Float32Array, token: int, index: int) -> float:
        """Return by how much logits would have to differ for `token` to be chosen: 0 when it is.

        If every logit moves by no more than ε, a choice with a margin above 2ε cannot change.
        Greedy: the distance to the best logit. Sampling: T times the distance in log-odds between
        the draw and the token's interval of the cumulated distribution (a cumulated share's odds
        move by e^(2ε/T) at the most). With top-k, top-p or min-p the kept set may jump, so there a
        different choice has no finite margin.
        """
        if self.choose(logits, index) == token:
            return 0.0
        p = self.params
        if self._grammar is not None:
            return float("inf")
        if self._shapes:
            logits = self._shaped(logits)
        if p.temperature < COLD:
            return float(logits.max() - logits[token])
        if p.top_k or p.top_p < 1 or p.min_p:
            return float("inf")
        mass = _mass(logits, p.temperature)
        share = mass / mass[-1]
        draw = self._draw(index)
        edge = share[token] if share[token] <= draw else (share[token - 1] if token else 0.0)
        with np.errstate(divide="ignore"):
            odds = np.log([draw, edge]) - np.log1p([-draw, -edge])
        return float(p.temperature * abs(odds[0] - odds[1]))


def log_softmax(logits: Float32Array) -> npt.NDArray[np.float64]:
    """Return the log probabilities (V,) at temperature 1."""
    wide = logits.astype(np.float64) - float(logits.max())
    shares: npt.NDArray[np.float64] = wide - np.log(np.exp(wide).sum())
    return shares


def _nucleus(logits: Float32Array, temperature: float, top_p: float) -> npt.NDArray[np.int64]:
    """Return the fewest ids, likeliest first, that hold a share top_p of the probability."""
    scaled = _exponentials(logits, temperature)
    goal = top_p * float(scaled.sum(dtype=np.float64))
    for bound in _BOUNDS:
        ids = np.flatnonzero(scaled >= bound)
        if float(scaled[ids].sum(dtype=np.float64)) >= goal:
            break
    ids = ids[np.argsort(-scaled[ids], kind="stable")]
    mass = np.cumsum(scaled[ids], dtype=np.float64)
    return ids[: int(mass.searchsorted(goal)) + 1]


def _mass(logits: Float32Array, temperature: float) -> npt.NDArray[np.float64]:
    """Return the cumulated, unnormalised probabilities (V,)."""
    return _exponentials(logits, temperature).cumsum(dtype=np.float64)


def _exponentials(
    logits: Float32Array, temperature: float, out: Float32Array | None = None
) -> Float32Array:
    """Return the unnormalised probabilities (V,), 1 for the likeliest; out: where they go."""
    scaled = np.multiply(logits, np.float32(1 / temperature), out=out)
    scaled -= scaled.max()
    return np.exp(scaled, out=scaled)
