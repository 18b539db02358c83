"""One job on its way: its slot, its text as it becomes certain, its events. Knows no queue, no pass and no process."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import numpy.typing as npt

from model.base.llama_model import LlamaModel
from model.decoding.drafting import Drafter
from model.decoding.generation import TextStream
from model.decoding.ngram import NgramIndex
from model.decoding.sampling import Grammar, Sampler, SamplingParams, log_softmax
from model.decoding.slot import Slot
from model.errors import ContextError, UsageError
from model.serving.jobs import Event, Finished, Job, Piece, Started, TokenInfo


@dataclass
class _Pending:
    """A token whose text may still turn out to begin a stop string. end: its text's, in characters from the start."""

    info: TokenInfo
    end: int


class Writing:
    """A job and its slot.

    draws: the seed where the job names none. Raises UsageError for what cannot be written, ContextError for a prompt
    that leaves no room in `context` tokens.
    """

    def __init__(
        self,
        job: Job,
        prompt: list[int],
        model: LlamaModel,
        *,
        context: int,
        draws: int,
        drafter: Drafter | None = None,
        ngrams: bool = False,
        grammar: Grammar | None = None,
    ) -> None:
        outside = [t for t in (*prompt, *job.sampling.logit_bias) if not 0 <= t < model.n_vocab]
        if outside:
            raise UsageError(f"token {outside[0]}: the vocabulary has {model.n_vocab} tokens, from 0 on")
        if not prompt:
            raise UsageError("the prompt is empty, and this model has no begin-of-text token to start from")
        if len(prompt) >= context:
            raise ContextError(f"the prompt has {len(prompt)} tokens, the context {context}")
        if job.max_tokens is not None and job.max_tokens < (0 if job.echo else 1):
            raise UsageError(f"max_tokens {job.max_tokens} is below 1")
        s = job.sampling
        params = SamplingParams(
            s.temperature, s.top_k, s.top_p, draws if s.seed is None else s.seed, s.min_p,
            s.presence_penalty, s.frequency_penalty, s.repeat_penalty, s.logit_bias,
        )  # fmt: skip
        self.job, self._model = job, model
        self._stream, self._decoder = TextStream(job.stop), codecs.getincrementaldecoder("utf-8")("replace")
        limit = min(context, len(prompt) + (context if job.max_tokens is None else job.max_tokens))
        self.slot = Slot(prompt, limit, Sampler(params, prompt, grammar), self._ends, drafter)
        self.slot.ngrams = NgramIndex(self.slot.tokens) if ngrams else None
        self.slot.typical = job.typical
        self.slot.trace = [] if job.logprobs is not None else None
        self.look = self._look if job.echo and job.logprobs is not None else None  # at the prompt's logits
        self._prompt: list[TokenInfo] = []
        self._texts: list[str] = []  # of the pass's tokens
        self._pending: list[_Pending] = []
        self._decoded = self._released = 0  # characters
        self._told = len(prompt)  # tokens
        self._admitted = 0.0

    def _ends(self, token: int) -> bool:
        """Say whether the text ends with this token; its bytes go into the stream in passing."""
        if token in self._model.eog:
            return True
        piece = self._model.piece(token)
        self._texts.append(self._decoder.decode(piece))
        return self._stream.feed(piece)

    def admitted(self) -> None:
        """Start the clock."""
        self._admitted = perf_counter()

    def events(self) -> list[Event]:
        """Return what a pass has brought."""
        slot, out = self.slot, list[Event]()
        won = slot.tokens[self._told :]
        if not won and not slot.finished:
            return out
        if self._told == slot.prompt_length:
            out.append(Started(self.job.id, slot.prompt_length, slot.reused))
            if self.job.echo:
                out.append(self._echo())
        self._note(won)
        self._told = len(slot.tokens)
        text = self._stream.take()
        if slot.finished:
            text += self._stream.finish()
        self._released += len(text)
        tokens = self._certain(slot.finished)
        if text or tokens:
            out.append(Piece(self.job.id, text, tokens))
        if slot.finished:
            out.append(self._finished())
        return out

    def _note(self, won: list[int]) -> None:
        """Put the tokens of a pass, but an end of text, where they wait for their text to become certain."""
        rows = self.slot.trace or []
        for i, (token, text) in enumerate(zip(won, self._texts, strict=False)):
            self._decoded += len(text)
            own, top = self._likely(rows[i], token) if rows else (None, ())
            info = TokenInfo(token, text, i < len(won) - 1, own, top)  # the last is the base model's own
            self._pending.append(_Pending(info, self._decoded))
        self._texts.clear()
        if self.slot.trace is not None:
            self.slot.trace.clear()

    def _likely(self, logits: npt.NDArray[np.float32], token: int) -> tuple[float, tuple[tuple[str, float], ...]]:
        """Return the log probability of a token, and the likeliest ones, as the model has them: before all options."""
        shares, n = log_softmax(logits), min(self.job.logprobs or 0, len(logits))
        best = np.argpartition(-shares, n - 1)[:n] if n else np.zeros(0, np.int64)
        best = best[np.argsort(-shares[best], kind="stable")]
        return float(shares[token]), tuple((self._text(int(t)), float(shares[t])) for t in best)

    def _text(self, token: int) -> str:
        return self._model.piece(token).decode("utf-8", "replace")

    def _certain(self, finished: bool) -> tuple[TokenInfo, ...]:
        """Take the tokens whose text has been released; at a stop string the token before it may lose its end."""
        at = 0
        while at < len(self._pending) and self._pending[at].end <= self._released:
            at += 1
        done = [pending.info for pending in self._pending[:at]]
        if finished and at < len(self._pending):
            cut = self._pending[at]
            over = cut.end - self._released
            kept = cut.info.text[: max(0, len(cut.info.text) - over)]
            if kept:
                done.append(TokenInfo(cut.info.id, kept, cut.info.drafted, cut.info.logprob, cut.info.top))
            self._pending.clear()
        else:
            del self._pending[:at]
        return tuple(done)

    def _echo(self) -> Piece:
        """Return the prompt's text."""
        prompt, told = self.slot.tokens[: self.slot.prompt_length], self._prompt
        told = told or [TokenInfo(token, self._text(token), False) for token in prompt]
        return Piece(self.job.id, self._model.detokenize(prompt), tuple(told))

    def _look(self, logits: npt.NDArray[np.float32]) -> None:
        """Take the logits (n, V) behind the next tokens of the prompt: the first one has no probability."""
        prompt = self.slot.tokens[: self.slot.prompt_length]
        if not self._prompt:
            self._prompt.append(TokenInfo(prompt[0], self._text(prompt[0]), False))
        for row in logits:
            token = prompt[len(self._prompt)]
            self._prompt.append(TokenInfo(token, self._text(token), False, *self._likely(row, token)))

    def _finished(self) -> Finished:
        slot, stats, now = self.slot, self.slot.stats, perf_counter()
        stopped = self._stream.stopped or (len(slot.tokens) > slot.prompt_length and slot.tokens[-1] in self._model.eog)
        return Finished(
            self.job.id,
            "stop" if stopped else "length",
            prompt_tokens=slot.prompt_length,
            new_tokens=len(slot.tokens) - slot.prompt_length,
            prompt_s=slot.began - self._admitted,
            predicted_s=now - slot.began,
            steps=stats.steps,
            drafted=sum(stats.drafted),
            accepted=sum(stats.accepted),
            accepted_per_depth=tuple(stats.accepted),
        )
