"""The Python API: load a GGUF with its draft heads, then generate, stream and chat.

    from model.engine import Engine

    with Engine("model.gguf") as engine:
        for chunk in engine.stream("def fibonacci(n):"):
            print(chunk.text, end="")

`LoadOptions` and `DraftOptions` say here what environment variables and options say to the
commands. Knows no environment, no terminal and no HTTP.
"""

from __future__ import annotations

import os

# Before numpy and llama.cpp are loaded, as main.py: numpy's threads would fight llama.cpp's, and
# llama.cpp's wait awake for 3 ms, as between two decodes.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "300000")

import collections.abc as abc
import contextlib
import inspect
import threading
import weakref
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from typing_extensions import Self

from model.base.chat import ChatTemplate, Message, chosen_template
from model.base.known_models import model_file
from model.base.llama import MAX_SEQUENCES
from model.base.prompt import encode_prompt
from model.decoding.decoder import Decoder
from model.decoding.request import Request
from model.decoding.sampling import SamplingParams
from model.decoding.sequence import FinishReason, Output, Sequence
from model.decoding.statistics import DraftStatistics
from model.errors import DataError, UsageError
from model.heads.known_heads import HEADS_FOLDER
from model.loaded_model import LoadedModel, LoadOptions
from model.planning.choice import DraftOptions, choose, trial_requests

__all__ = ["Completion", "DraftOptions", "Engine", "LoadOptions", "SamplingParams", "Stream"]
TextOrTokens = str | list[int]  # text, or token ids


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The model's answer to one prompt, with its timings and draft statistics.

    text: without the stop string that ended it. tokens: the new ones, an end-of-generation token
    included. finish_reason: why it ended; None: it was ended early, by `Stream.close()`.
    prompt_tokens: how many the prompt has; cached_tokens: how many of them the prefix cache held.
    prefill_s, decode_s: seconds for the prompt and for the new tokens. statistics: acceptance by
    depth and by draft source, seconds by stage.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason | None
    prompt_tokens: int
    cached_tokens: int
    prefill_s: float
    decode_s: float
    statistics: DraftStatistics

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second of decoding."""
        return len(self.tokens) / self.decode_s if self.decode_s else 0.0

    @property
    def acceptance_length(self) -> float:
        """New tokens per step; plain decoding has 1.0."""
        return self.statistics.acceptance_length

    @property
    def acceptance_rate(self) -> float:
        """Accepted ÷ drafted nodes; 0 where nothing was drafted."""
        drafted = sum(self.statistics.drafted)
        return sum(self.statistics.accepted) / drafted if drafted else 0.0


class Stream:
    """A generation under way: iterate over it for `Output`s.

    An Output has the `text` that has become certain since the last one, and its `tokens`; each
    token says whether it was `drafted`. Afterwards, or after `close()`, which ends the generation
    early, `completion` has the whole; until then the engine is busy.
    """

    def __init__(self, sequence: Sequence, outputs: abc.Generator[Output, None, None]) -> None:
        self._sequence = sequence
        self._outputs = outputs
        self._text = list[str]()
        self._engine_closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Output:
        self._refuse_other_threads()
        if self._engine_closed and not self._sequence.finished:
            raise UsageError("this engine is closed")
        output = next(self._outputs)
        self._text.append(output.text)
        return output

    def close(self) -> None:
        """End the generation here; a second call does nothing."""
        self._refuse_other_threads()
        self._outputs.close()

    def close_with_engine(self) -> None:
        """End the generation here; reading on is then an error, not an end."""
        self.close()
        self._engine_closed = True

    def _refuse_other_threads(self) -> None:
        if inspect.getgeneratorstate(self._outputs) == inspect.GEN_RUNNING:
            raise UsageError("another thread is waiting for this stream's next output")

    @property
    def completion(self) -> Completion:
        """The whole so far."""
        return _completion(self._sequence, "".join(self._text))


class Engine:
    """A GGUF with its draft heads, ready to generate.

    path: the GGUF; of a split one, the first part. Or a short name, as in MODEL_PATH.
    heads_path: folder or file of the draft heads; None: those below `heads_folder` that belong to
        the model, if there are any. Without heads, the other sources draft.
    n_parallel: prompts that `generate` runs at the same time.
    chat_template: auto (the GGUF's own), vicuna, none, or a file that holds a Jinja template.
    load: threads, context size, GPU layers, KV cache type and the like.
    draft: draft sources and tree; None: the fastest as measured on this machine.
    on_measure: called before that measurement, which takes seconds at the first use of a model on a
        machine and is remembered.

    `loaded` is the model behind the API (file, tokenizer, heads), `template` its chat template, if
    any. One thread at a time: while a generation is under way, another one raises UsageError.
    `with Engine(...)` closes it, and `close()` does; both end an unfinished stream. Raises
    ModelFileError, HeadsError and UsageError.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        heads_path: Path | str | None = None,
        heads_folder: Path = HEADS_FOLDER,
        n_parallel: int = 1,
        chat_template: str = "auto",
        load: LoadOptions | None = None,
        draft: DraftOptions | None = None,
        on_measure: abc.Callable[[], None] = lambda: None,
    ) -> None:
        if not 1 <= n_parallel <= MAX_SEQUENCES:
            raise UsageError(f"n_parallel {n_parallel} is outside 1 … {MAX_SEQUENCES}")
        self.loaded = LoadedModel(
            model_file(str(path)),
            load or LoadOptions(),
            heads_path=None if heads_path is None else Path(heads_path),
            heads_folder=heads_folder,
        )
        self.template: ChatTemplate | None = chosen_template(
            self.loaded.file.metadata, chat_template
        )
        self._n_parallel = n_parallel
        self._draft = draft or DraftOptions()
        self._on_measure = on_measure
        self._in_use = threading.Lock()
        self._streams = weakref.WeakSet[Stream]()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free everything; an unfinished stream ends, a second call does nothing."""
        if self._closed:
            return
        for stream in list(self._streams):
            stream.close_with_engine()
        with self._exclusively():
            self._closed = True
            if "_decoder" in self.__dict__:  # it was made
                self._decoder.base.close()
            self.loaded.close()

    def prepare(self) -> None:
        """Measure and allocate now what the first generation would otherwise have to wait for."""
        with self._exclusively():
            _ = self._decoder

    def generate(
        self,
        prompts: abc.Sequence[TextOrTokens],
        sampling: SamplingParams | None = None,
        *,
        max_tokens: int | None = 256,
        stop: abc.Sequence[str] = (),
    ) -> list[Completion]:
        """Continue each prompt; return the completions in the order of the prompts.

        prompts: texts, or lists of token ids. sampling: None: greedy. max_tokens: most new tokens
        per prompt; None: as many as the context holds. stop: strings that end an output before
        them. The i-th prompt is sampled with seed + i. Raises ContextError for a prompt that the
        context cannot hold.
        """
        if isinstance(prompts, str) or not isinstance(prompts, abc.Sequence):
            raise UsageError("prompts: needs a list of prompts, not a single one")
        sampling = sampling or SamplingParams()
        with self._exclusively():
            # A sequence for each prompt.
            scheduler = self._decoder.scheduler
            sequences = list[Sequence]()
            for i, prompt in enumerate(prompts):
                seed = None if sampling.seed is None else sampling.seed + i
                params = replace(sampling, seed=seed)
                sequences.append(self._new_sequence(self._encode(prompt), params, max_tokens, stop))

            # All of them to their ends.
            with self._cache_in_order():
                for sequence in sequences:
                    scheduler.add(sequence)
                while scheduler.has_unfinished:
                    scheduler.step()
            return [_completion(sequence, sequence.take_output().text) for sequence in sequences]

    def stream(
        self,
        prompt: TextOrTokens,
        sampling: SamplingParams | None = None,
        *,
        max_tokens: int | None = 256,
        stop: abc.Sequence[str] = (),
    ) -> Stream:
        """Continue a prompt; iterate over the result for text as it is generated.

        Takes and raises what `generate` does, for one prompt.
        """
        with self._exclusively():
            return self._stream(self._encode(prompt), sampling, max_tokens, stop)

    def chat(
        self,
        messages: abc.Sequence[Message],
        sampling: SamplingParams | None = None,
        *,
        max_tokens: int | None = None,
        stop: abc.Sequence[str] = (),
    ) -> Stream:
        """Answer a conversation; iterate over the result for text as it is generated.

        messages: [{"role": "user", "content": "..."}, ...]. To go on, append the answer with the
        role assistant and the next message: the prefix cache has all that came before. max_tokens:
        None: as many as the context holds. Raises UsageError for a model without a chat template,
        DataError for messages that are none or that its template refuses, ContextError for too
        many.
        """
        if self.template is None:
            raise UsageError(
                f"{self.loaded.file.path} has no chat template; "
                'name one (chat_template="vicuna") or use stream()'
            )
        _check_messages(messages)
        with self._exclusively():
            prompt = encode_prompt(self.loaded.base_model, list(messages), self.template)
            return self._stream(prompt, sampling, max_tokens, stop)

    @cached_property
    def _decoder(self) -> Decoder:
        """The decoder that everything runs on: what it drafts is measured at the first use."""
        policy, drafters, _ = choose(
            self.loaded,
            self._draft,
            trial_requests(self.loaded, SamplingParams(), self.template),
            max_leaves=MAX_SEQUENCES // self._n_parallel,
            on_measure=self._on_measure,
        )
        return self.loaded.shared_decoder(policy, drafters, n_parallel=self._n_parallel)

    def _encode(self, prompt: TextOrTokens) -> list[int]:
        if not (isinstance(prompt, str) or _all_ints(prompt)):
            raise UsageError("prompt: needs a text or a list of token ids")
        return encode_prompt(self.loaded.base_model, prompt)

    def _stream(
        self,
        prompt: list[int],
        sampling: SamplingParams | None,
        max_tokens: int | None,
        stop: abc.Sequence[str],
    ) -> Stream:
        sequence = self._new_sequence(prompt, sampling or SamplingParams(), max_tokens, stop)
        stream = Stream(sequence, self._outputs(sequence))
        self._streams.add(stream)
        return stream

    def _outputs(self, sequence: Sequence) -> abc.Generator[Output, None, None]:
        with self._exclusively(), self._cache_in_order():
            self._decoder.scheduler.add(sequence)
            yield from self._decoder.stream(sequence)

    def _new_sequence(
        self,
        prompt: list[int],
        params: SamplingParams,
        max_tokens: int | None,
        stop: abc.Sequence[str],
    ) -> Sequence:
        if isinstance(stop, str):
            raise UsageError("stop: needs a list of strings, not a single one")
        request = Request(prompt=prompt, max_tokens=max_tokens, sampling=params, stop=tuple(stop))
        return self._decoder.new_sequence(request)

    @contextlib.contextmanager
    def _exclusively(self) -> abc.Iterator[None]:
        """Keep others out while the block runs.

        Raises UsageError where a generation is under way, or the engine is closed.
        """
        if not self._in_use.acquire(blocking=False):
            raise UsageError(
                "this engine is generating already; "
                "finish or close that stream first, or load another engine"
            )
        try:
            if self._closed:
                raise UsageError("this engine is closed")
            yield
        finally:
            self._in_use.release()

    @contextlib.contextmanager
    def _cache_in_order(self) -> abc.Iterator[None]:
        """Empty the cache after an error or Ctrl+C, which may have cut a step short."""
        try:
            yield
        except GeneratorExit:  # a stream that is closed: between two steps
            raise
        except BaseException:
            self._decoder.reset()
            raise


def _check_messages(messages: abc.Sequence[Message]) -> None:
    """Raise DataError where there is none, or one that is no message."""
    if not messages:
        raise DataError("messages: there is none to answer")
    for message in messages:
        if not (
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise DataError(
                'messages: each has two texts, {"role": "user", "content": "..."}; '
                f"{str(message)[:80]!r} has not"
            )


def _all_ints(prompt: abc.Sequence[int]) -> bool:
    return isinstance(prompt, abc.Sequence) and all(isinstance(token, int) for token in prompt)


def _completion(sequence: Sequence, text: str) -> Completion:
    return Completion(
        text=text,
        tokens=sequence.new_tokens,
        finish_reason=sequence.finish_reason,
        prompt_tokens=sequence.n_prompt,
        cached_tokens=sequence.n_reused,
        prefill_s=max(0.0, sequence.prefilled_at - sequence.admitted_at),
        decode_s=sequence.statistics.seconds,
        statistics=sequence.statistics,
    )
