"""The sequence: a prompt and its tokens, what drafts and chooses them, and the text they make.

Knows neither the cache nor the order in which sequences run.
"""

from __future__ import annotations

import collections.abc as abc
from collections import deque
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from model.decoding.detokenizer import Detokenizer
from model.decoding.drafters.drafter import ContinuationDrafter, TreeDrafter
from model.decoding.loops import LoopWatch
from model.decoding.sampling import Grammar, Sampler, SamplingParams, log_softmax
from model.decoding.statistics import DraftStatistics
from model.errors import ContextError, UsageError
from model.trees.tree import Tree

Float32Array = npt.NDArray[np.float32]
# (text, log probability) of the likeliest tokens, best first
Likeliest = tuple[tuple[str, float], ...]
# stop: an end-of-generation token or a stop string; length: max_tokens or the context; loop: only
# repetition came.
FinishReason = Literal["stop", "length", "loop"]


class Vocabulary(Protocol):
    """What a sequence needs of the tokenizer; `model.base.llama_model.LlamaModel` has it."""

    @property
    def n_vocab(self) -> int: ...  # noqa: D102
    @property
    def eog(self) -> frozenset[int]: ...  # noqa: D102
    def piece(self, token: int) -> bytes: ...  # noqa: D102


class TokenOutput(NamedTuple):
    """One token of an output.

    drafted: it came free, accepted from a draft. logprob: its log probability before all sampling
    options. top: the likeliest tokens.
    """

    id: int
    text: str
    drafted: bool
    logprob: float | None = None
    top: Likeliest = ()


class Output(NamedTuple):
    """Text that has become certain, and the tokens that it is made of."""

    text: str
    tokens: tuple[TokenOutput, ...]


class Sequence:
    """A sequence on its way from prompt to end. Identity, not content, makes two of them equal.

    tokens: prompt and new tokens; all but the last are in the KV cache while it runs. n_prompt:
    tokens of the prompt. max_length: how many tokens it may come to. hidden: (1, D), the final
    hidden state that the last token was decided from, None where nobody asked for it.
    finish_reason: None while it runs, and after an abort. seq_ids: llama.cpp's sequence ids, equal
    on all tokens but the last. n_reused: tokens of the prompt that were in the cache already.
    admitted_at, prefilled_at: when it left the waiting queue and when its prompt was in the cache,
    by perf_counter.
    """

    def __init__(
        self,
        prompt: abc.Sequence[int],
        vocabulary: Vocabulary,
        params: SamplingParams,
        *,
        context: int,
        max_tokens: int | None = None,
        stop: abc.Sequence[str] = (),
        grammar: Grammar | None = None,
        typical_acceptance: bool = False,
        logprobs: int | None = None,
        echo: bool = False,
        use_prefix_cache: bool = True,
        keep_logits: bool = False,
        loop_watch: LoopWatch | None = None,
    ) -> None:
        """Check the prompt and make everything that the sequence needs but its drafters.

        context: tokens that the KV cache holds for one sequence. max_tokens: new ones at the most;
        None: as many as fit. typical_acceptance: Medusa's lossy rule. logprobs: tell log
        probabilities, and those of so many of the likeliest tokens. echo: the prompt belongs to the
        output. use_prefix_cache: False reads the whole prompt. keep_logits: keep those that decided
        each token. loop_watch: ends the sequence where it only repeats itself. Raises UsageError
        for an empty prompt, unknown tokens and empty stop strings, ContextError for a long prompt.
        """
        check_prompt(prompt, vocabulary.n_vocab, context)
        check_tokens(params.logit_bias, vocabulary.n_vocab)
        if max_tokens is not None and max_tokens < (0 if echo else 1):
            raise UsageError(f"max_tokens {max_tokens} is below 1")
        self.tokens = list(prompt)
        self.n_prompt = len(prompt)
        self.max_length = context if max_tokens is None else min(context, len(prompt) + max_tokens)
        self.sampler = Sampler(params, self.tokens, grammar)
        self.tree_drafters: dict[str, TreeDrafter] = {}
        self.continuation_drafters: dict[str, ContinuationDrafter] = {}
        self.typical_acceptance = typical_acceptance
        self.echo = echo
        # A prompt whose logits are wanted is read whole: what the cache holds has none.
        self.wants_prompt_logits = echo and logprobs is not None
        self.use_prefix_cache = use_prefix_cache and not self.wants_prompt_logits

        self.seq_ids = range(1)
        self.hidden: Float32Array | None = None
        self.finish_reason: FinishReason | None = None
        self.statistics = DraftStatistics()
        self.logits: list[Float32Array] | None = [] if keep_logits else None
        self.n_reused = 0
        self.admitted_at = 0.0
        self.prefilled_at = 0.0

        self._vocabulary = vocabulary
        self._detokenizer = Detokenizer(vocabulary.piece, stop)
        self._loop_watch = loop_watch
        self._logprobs = logprobs
        self._prompt_outputs = list[TokenOutput]()
        # new tokens without certain text
        self._pending: deque[tuple[int, bool, float | None, Likeliest]] = deque()

    @property
    def new_tokens(self) -> list[int]:
        """The tokens behind the prompt."""
        return self.tokens[self.n_prompt :]

    @property
    def n_new(self) -> int:
        """How many tokens there are behind the prompt."""
        return len(self.tokens) - self.n_prompt

    @property
    def draft_room(self) -> int:
        """How deep a draft is of use: the last token that the sequence may get is never drafted."""
        return self.max_length - len(self.tokens) - 1

    @property
    def finished(self) -> bool:
        """Whether nothing is to follow."""
        return self.finish_reason is not None

    def ends_with(self, token: int) -> bool:
        """Take note of the next new token; say whether the sequence ends with it.

        To be asked once, in order.
        """
        if token in self._vocabulary.eog or self._detokenizer.add(token):
            self.finish_reason = "stop"
        elif self._loop_watch is not None and self._loop_watch.add(token):
            self.finish_reason = "loop"
        return self.finish_reason is not None

    def accept(self, emitted: list[int], logits: Float32Array, tree: Tree, node: int) -> None:
        """Append the tokens of a step, all of which `ends_with` has seen.

        logits: (N, V) of the draft tree, a view that may change afterwards; those on the path to
        `node`, the last accepted one, decided the tokens.
        """
        last = len(emitted) - 1  # the base model's own token: it was not drafted
        if self._logprobs is None:
            for i, token in enumerate(emitted):
                self._pending.append((token, i < last, None, ()))
        else:
            for i, at in enumerate(tree.path_to(node)):
                logprob, top = self._logprobs_of(logits[at], emitted[i])
                self._pending.append((emitted[i], i < last, logprob, top))
        if self.logits is not None:
            self.logits += [logits[at].copy() for at in tree.path_to(node)]
        self.tokens += emitted
        if self.finish_reason is None and len(self.tokens) >= self.max_length:
            self.finish_reason = "length"

    def add_prompt_logits(self, logits: Float32Array) -> None:
        """Take the logits (n, V) behind the prompt's next tokens, from the first on."""
        if not self._prompt_outputs:  # nothing comes before the first token: it has no probability
            self._prompt_outputs.append(
                TokenOutput(self.tokens[0], self._text(self.tokens[0]), False)
            )
        for row in logits:
            token = self.tokens[len(self._prompt_outputs)]
            logprob, top = self._logprobs_of(row, token)
            self._prompt_outputs.append(TokenOutput(token, self._text(token), False, logprob, top))

    def prompt_output(self) -> Output:
        """Return the prompt as a part of the output."""
        prompt = self.tokens[: self.n_prompt]
        outputs = self._prompt_outputs or [
            TokenOutput(token, self._text(token), False) for token in prompt
        ]
        text = b"".join(self._vocabulary.piece(token) for token in prompt).decode(
            "utf-8", "replace"
        )
        return Output(text, tuple(outputs))

    def take_output(self) -> Output:
        """Return what has become certain since the last call; once finished, all that is left."""
        text, token_texts = self._detokenizer.take(last=self.finish_reason is not None)
        pending = self._pending
        outputs = list[TokenOutput]()
        for token_text in token_texts:
            token, drafted, logprob, top = pending.popleft()
            outputs.append(TokenOutput(token, token_text, drafted, logprob, top))
        return Output(text, tuple(outputs))

    def _logprobs_of(self, logits: Float32Array, token: int) -> tuple[float, Likeliest]:
        """Return the log probability of a token and those of the likeliest ones, all at T = 1."""
        shares = log_softmax(logits)
        n = min(self._logprobs or 0, len(shares))
        best = np.argpartition(-shares, n - 1)[:n] if n else np.zeros(0, np.int64)
        best = best[np.argsort(-shares[best], kind="stable")]
        return float(shares[token]), tuple((self._text(int(t)), float(shares[t])) for t in best)

    def _text(self, token: int) -> str:
        return self._vocabulary.piece(token).decode("utf-8", "replace")


def check_prompt(prompt: abc.Sequence[int], n_vocab: int, context: int) -> None:
    """Check a prompt.

    Raises UsageError where it is empty or holds unknown tokens, ContextError where it is too long.
    """
    check_tokens(prompt, n_vocab)
    if not prompt:
        raise UsageError(
            "the prompt is empty, and this model has no begin-of-text token to start from"
        )
    if len(prompt) >= context:
        raise ContextError(
            f"the prompt has {len(prompt)} tokens, the context {context}; shorten the prompt or "
            "raise MODEL_CONTEXT_SIZE"
        )


def check_tokens(tokens: abc.Iterable[int], n_vocab: int) -> None:
    """Raise UsageError for a token that the vocabulary does not have."""
    for token in tokens:
        if not 0 <= token < n_vocab:
            raise UsageError(f"token {token}: the vocabulary has {n_vocab} tokens, from 0 on")
