"""How a token is chosen from logits: greedy, or temperature, top-k and top-p with a seed. Knows nothing of drafts.

The draw for the i-th new token uses the i-th number of the seed's stream, whatever the batch looked like:
so plain and speculative decoding make the same draws, and a text can be replayed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.errors import UsageError

Float32Array = npt.NDArray[np.float32]
_BLOCK = 256
COLD = 1e-4  # temperatures below are greedy: e^(difference / T) would overflow or round to it anyway
_CANDIDATES = 256  # top-p sorts this many first; they nearly always hold the mass


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy; top_k 0 and top_p 1.0 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UsageError(f"temperature {self.temperature} is outside 0 … 100")
        if self.top_k < 0:
            raise UsageError(f"top_k {self.top_k} is negative; 0 is off")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p} is outside 0 … 1")
        if self.seed < 0:
            raise UsageError(f"seed {self.seed} is negative")


class Sampler:
    """Chooses tokens for one text."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._rng = np.random.default_rng(params.seed)
        self._draws: list[float] = []

    def _draw(self, index: int) -> float:
        while index >= len(self._draws):
            self._draws += self._rng.random(_BLOCK).tolist()
        return self._draws[index]

    def choose(self, logits: Float32Array, index: int) -> int:
        """Return the token for logits (V,) as the `index`-th new token of the text (from 0)."""
        p = self.params
        if p.temperature < COLD:
            return int(logits.argmax())
        if p.top_k == 0 and p.top_p == 1:
            mass = _mass(logits, p.temperature)
            return int(mass.searchsorted(self._draw(index) * mass[-1], side="right"))
        kept = self.kept(logits)
        mass = _mass(logits[kept], p.temperature)
        return int(kept[mass.searchsorted(self._draw(index) * mass[-1], side="right")])

    def kept(self, logits: Float32Array) -> npt.NDArray[np.int64]:
        """Return the ids, ascending, that top-k and then top-p leave."""
        p = self.params
        n = len(logits)
        if p.top_k and p.top_k < n:
            ids = np.argpartition(logits, n - p.top_k)[n - p.top_k :]
        else:
            ids = np.arange(n)
        if p.top_p < 1:
            scaled = np.exp((logits[ids] - logits[ids].max()) / np.float32(p.temperature))
            goal = p.top_p * float(scaled.sum(dtype=np.float64))
            few = min(_CANDIDATES, len(ids))
            best = np.argpartition(scaled, len(ids) - few)[len(ids) - few :]
            if float(scaled[best].sum(dtype=np.float64)) < goal:
                best = np.arange(len(ids))
            best = best[np.argsort(-scaled[best], kind="stable")]
            mass = np.cumsum(scaled[best], dtype=np.float64)
            ids = ids[best[: int(mass.searchsorted(goal)) + 1]]
        return np.sort(ids)

    def margin(self, logits: Float32Array, token: int, index: int) -> float:
        """Return by how much logits would have to differ for `token` to be chosen: 0 when it is.

        If every logit moves by no more than ε, a choice with a margin above 2ε cannot change. Greedy: the
        distance to the best logit. Sampling: T times the distance in log-odds between the draw and the
        token's interval of the cumulated distribution (a cumulated share's odds move by e^(2ε/T) at the
        most). With top-k or top-p the kept set may jump, so there a different choice has no finite margin.
        """
        if self.choose(logits, index) == token:
            return 0.0
        p = self.params
        if p.temperature < COLD:
            return float(logits.max() - logits[token])
        if p.top_k or p.top_p < 1:
            return float("inf")
        mass = _mass(logits, p.temperature)
        share = mass / mass[-1]
        draw = self._draw(index)
        edge = share[token] if share[token] <= draw else (share[token - 1] if token else 0.0)
        with np.errstate(divide="ignore"):
            odds = np.log([draw, edge]) - np.log1p([-draw, -edge])
        return float(p.temperature * abs(odds[0] - odds[1]))


def _mass(logits: Float32Array, temperature: float) -> npt.NDArray[np.float64]:
    """Return the cumulated, unnormalised probabilities (V,)."""
    scaled = logits * np.float32(1 / temperature)
    scaled -= scaled.max()
    np.exp(scaled, out=scaled)
    return scaled.cumsum(dtype=np.float64)
