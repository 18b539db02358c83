"""Peers: llama-cpp-python's own generation loop and its prompt lookup, in turn with ours."""

from __future__ import annotations

import collections.abc as abc
from time import perf_counter

import llama_cpp
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from model.decoding.request import Request
from model.evaluation.speed import TimedSequence, take_turns, turn_tokens
from model.loaded_model import LoadedModel

# By name: how many tokens prompt lookup drafts.
PEERS = {
    "llama-cpp-python": 0,
    "llama-cpp-python, prompt lookup of 10": 10,
    "llama-cpp-python, prompt lookup of 3": 3,
}


class PeerSequence:
    """A sequence that llama-cpp-python generates; see `model.evaluation.speed.Timed`.

    The prefill and the first token are done when it is made.
    """

    def __init__(self, llm: llama_cpp.Llama, request: Request) -> None:
        assert request.max_tokens is not None
        self._max_tokens = request.max_tokens
        self._tokens = llm.generate(
            request.prompt, temp=request.sampling.temperature, top_k=0, top_p=1.0, min_p=0.0
        )
        next(self._tokens)
        self.n_new = 1
        self.seconds = 0.0

    def advance(self, n_tokens: int) -> bool:
        """See Timed."""
        goal = min(n_tokens, self._max_tokens)
        began = perf_counter()
        while self.n_new < goal and next(self._tokens, None) is not None:
            self.n_new += 1
        self.seconds += perf_counter() - began
        ended_early = self.n_new < goal
        return ended_early or goal == self._max_tokens


def peer_rates(
    loaded: LoadedModel, requests: abc.Sequence[Request]
) -> tuple[float, dict[str, float]]:
    """Return tokens/s of our plain decoding, and of each peer, in turn."""
    peers = {name: _load(loaded, n_drafted) for name, n_drafted in PEERS.items()}
    plain_tokens = 0
    plain_seconds = 0.0
    tokens = dict.fromkeys(peers, 0)
    seconds = dict.fromkeys(peers, 0.0)
    with loaded.fixed_decoder() as plain:
        piece = turn_tokens(plain, requests[0])
        for request in requests:
            ours = TimedSequence(plain, request)
            theirs = {name: PeerSequence(llm, request) for name, llm in peers.items()}
            take_turns([ours, *theirs.values()], piece)
            plain_tokens += ours.sequence.n_new
            plain_seconds += ours.seconds
            for name, timed in theirs.items():
                tokens[name] += timed.n_new - 1  # the first came with the prompt
                seconds[name] += timed.seconds
    for llm in peers.values():
        llm.close()
    rates = {name: tokens[name] / seconds[name] for name in peers}
    return plain_tokens / plain_seconds, rates


def _load(loaded: LoadedModel, n_drafted: int) -> llama_cpp.Llama:
    lookup = LlamaPromptLookupDecoding(num_pred_tokens=n_drafted) if n_drafted else None
    return llama_cpp.Llama(
        str(loaded.file.path),
        n_ctx=0,
        n_threads=loaded.options.n_threads,
        n_threads_batch=loaded.options.n_threads,
        draft_model=lookup,
        verbose=False,
    )
