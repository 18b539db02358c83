"""What runs in the process that owns the model: loads it, then takes commands in and sends events out, pass by pass.

llama.cpp ends its process on internal errors; this one can be lost and started again. Knows no HTTP and no asyncio.
Prompts are tokenized, fed and stepped here; every job stands for itself, and first come is first served.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import signal
import threading
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

from model.base.chat import template_of
from model.base.grammar import GbnfGrammar, schema_to_gbnf
from model.base.llama import MAX_SEQUENCES
from model.decoding.batching import Batch
from model.decoding.planning import FixedPlan
from model.decoding.sampling import SamplingParams
from model.engine import Engine, EngineOptions
from model.errors import MedusaError, UsageError
from model.measuring.choosing import Wish, choose, trial_requests
from model.serving.jobs import Event, Failed, Finished, Job, ModelInfo, Started, merged
from model.serving.protocol import WorkerError
from model.serving.writing import Writing

log = logging.getLogger(__name__)
COMMANDS_S = 0.02  # that commands may take between two passes, where there is more than one
SIGN_OF_LIFE_S = 2.0  # after which something is said even where nothing has happened, as while long prompts are read
GATHER_S = 0.01  # that text may wait for more: small models take a step in less than passing it on takes
STALL_S = 0.1  # that prompts may hold up running texts between two passes
CACHE_BYTES = 1 << 30  # of the KV cache, where nobody says how many cells; one context's at the least


@dataclass(frozen=True)
class ModelOptions:
    """What is loaded and how it is shared.

    slots: texts at a time. cells: tokens that the cache holds for all of them; 0: a context for each of them, as far as
    CACHE_BYTES goes.
    wish: who drafts where a job says "auto". trial_prompts: texts on which it is measured what pays.
    """

    model_path: Path
    engine: EngineOptions
    weights: Path | None
    heads_folder: Path
    slots: int = 4
    cells: int = 0
    wish: Wish = field(default_factory=Wish)
    trial_prompts: tuple[str, ...] = ("def ",)
    log_level: str = "WARNING"


def run(options: ModelOptions, inbox: Connection, outbox: Connection) -> None:
    """Load the model, say so, and work until the other side is gone: the main function of the process.

    Sends ("ready", ModelInfo) or ("refused", message), then ("events", events, cached tokens) and ("answer", key, value
    or error).
    """
    for reaches_the_whole_group in (signal.SIGINT, signal.SIGTERM):
        signal.signal(reaches_the_whole_group, signal.SIG_IGN)  # the parent decides
    logging.basicConfig(level=options.log_level, format="%(message)s")
    commands: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
    questions: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(inbox, commands, questions), daemon=True).start()
    try:
        model = ServedModel(options)
    except MedusaError as error:
        outbox.send(("refused", str(error)))
        return
    outbox.send(("ready", model.info))
    speaking = threading.Lock()
    threading.Thread(target=_answer, args=(model, questions, outbox, speaking), daemon=True).start()
    events, sent = list[Event](), perf_counter()
    while True:
        began = perf_counter()
        while not model.busy or (not commands.empty() and perf_counter() - began < COMMANDS_S):
            kind, *rest = commands.get()
            if kind == "quit":
                return
            model.submit(*rest) if kind == "submit" else model.cancel(*rest)
        events += model.work()
        hurry = not model.busy or any(isinstance(event, Started | Finished | Failed) for event in events)
        waited = perf_counter() - sent
        if (events and (hurry or waited > GATHER_S)) or waited > SIGN_OF_LIFE_S:
            with speaking:
                outbox.send(("events", merged(events), model.cached))
            events, sent = [], perf_counter()


def _listen(
    inbox: Connection, commands: queue.SimpleQueue[tuple[Any, ...]], questions: queue.SimpleQueue[tuple[Any, ...]]
) -> None:
    """Pass on what comes; leave at once when the parent is gone."""
    try:
        while True:
            command = inbox.recv()
            (commands if command[0] in ("submit", "cancel", "quit") else questions).put(command)
    except (EOFError, OSError):
        os._exit(1)


def _answer(
    model: ServedModel, questions: queue.SimpleQueue[tuple[Any, ...]], outbox: Connection, speaking: threading.Lock
) -> None:
    """Answer questions beside the passes: a tokenizer takes seconds for megabytes."""
    while True:
        kind, key, *values = questions.get()
        try:
            answer = getattr(model, kind)(*values)
        except MedusaError as error:
            answer = error
        except Exception:  # a fault of ours; the next question wants its answer all the same
            log.exception("a question could not be answered")
            answer = WorkerError("the model's process could not answer")
        with speaking:
            outbox.send(("answer", key, answer))


class ServedModel:
    """The model and the jobs that it writes. Raises MedusaError where it cannot be loaded as asked."""

    def __init__(self, options: ModelOptions) -> None:
        engine = self._engine = Engine(options.model_path, options.engine, options.weights, options.heads_folder)
        self._template = template_of(engine.file.metadata)
        trial = trial_requests(engine, options.trial_prompts, SamplingParams())
        chosen = choose(engine, options.wish, trial, lanes=MAX_SEQUENCES // options.slots)
        self._plan, self._drafter, self._ngrams, words = chosen
        nodes, lanes = self._plan.max_nodes, self._plan.lanes
        if options.slots * lanes > MAX_SEQUENCES:
            raise UsageError(f"{options.slots} slots of {lanes} lanes: llama.cpp has {MAX_SEQUENCES} sequences")
        affordable = min(engine.context * options.slots, CACHE_BYTES // engine.cell_bytes)
        cells = max(options.cells or affordable, engine.context)
        cells += (options.slots - 1) * (nodes - 1)
        self._base = engine.base(self._plan, sequences=options.slots * lanes, context=cells)
        if isinstance(self._plan, FixedPlan) and options.slots * nodes > self._base.n_batch:
            raise UsageError(f"{options.slots} slots of {nodes} nodes: a pass has {self._base.n_batch} at the most")
        self._slots = options.slots
        self._batch = self._new_batch()
        self._waiting: deque[Writing] = deque()
        self._running: dict[str, Writing] = {}
        self._failed: list[Event] = []
        self.info = ModelInfo(
            name=engine.file.name,
            file_type=engine.file.file_type,
            context=engine.context,
            vocabulary=engine.model.n_vocab,
            draft=words,
            slots=options.slots,
            cells=self._base.n_ctx,
            chat="tokenizer.chat_template" in engine.file.metadata,
            longest_token=max(len(t.encode()) for t in engine.file.metadata["tokenizer.ggml.tokens"]),
        )

    def _new_batch(self) -> Batch:
        return Batch(
            self._base,
            self._plan,
            places=self._slots,
            cells=self._base.n_ctx,
            stall_s=STALL_S,
            keep=self._engine.model.can_roll_back,  # a text that is kept has to lose its end
        )

    @property
    def busy(self) -> bool:
        """Whether there is anything to do without a further command."""
        return bool(self._waiting or self._running or self._failed)

    @property
    def cached(self) -> int:
        """Tokens in the cache."""
        return self._batch.cached

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Return the ids of a text. This and the next two may be called from another thread."""
        tokens: list[int] = self._engine.model.tokenize(text, add_bos=add_special, parse_special=parse_special).tolist()
        return tokens

    def detokenize(self, tokens: list[int]) -> str:
        """Return the text of ids."""
        model = self._engine.model
        outside = [t for t in tokens if not 0 <= t < model.n_vocab]
        if outside:
            raise UsageError(f"token {outside[0]}: the vocabulary has {model.n_vocab} tokens, from 0 on")
        return model.detokenize(tokens)

    def apply_template(self, messages: list[dict[str, Any]]) -> str:
        """Return a conversation as the model's template writes it."""
        return self._template.render(messages, prompt=True)

    def submit(self, job: Job) -> None:
        """Queue a job, or fail it where it cannot be written."""
        try:
            self._waiting.append(self._writing(job))
        except MedusaError as error:
            self._failed.append(Failed(job.id, "bad_request", str(error)))

    def _writing(self, job: Job) -> Writing:
        if job.draft in ("medusa", "both") and self._engine.weights is None:
            raise UsageError(f"draft {job.draft!r}: this model has no heads")
        grammar = None
        if job.grammar is not None or job.json_schema is not None:
            gbnf = job.grammar if job.grammar is not None else schema_to_gbnf(job.json_schema or {})
            grammar = GbnfGrammar(self._engine.model, gbnf)
        return Writing(
            job,
            self._prompt(job),
            self._engine.model,
            context=self._engine.context,
            draws=secrets.randbits(32),
            drafter=self._drafter if job.draft in ("auto", "medusa", "both") else None,
            ngrams=self._ngrams and job.draft in ("auto", "ngram", "both"),
            grammar=grammar,
        )

    def _prompt(self, job: Job) -> list[int]:
        """Return a job's token ids. A template that writes the begin-of-text mark itself gets no second one."""
        prompt = job.prompt
        if not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt):
            return [token for token in prompt if isinstance(token, int)]
        template = not isinstance(prompt, str)
        text = self.apply_template([m for m in prompt if isinstance(m, dict)]) if template else str(prompt)
        tokens, bos = self.tokenize(text, True, True), self._engine.model.bos
        return tokens[1:] if template and tokens[:2] == [bos, bos] else tokens

    def cancel(self, id: str) -> None:
        """Free a job's place; one that is unknown or done is no error."""
        writing = self._running.pop(id, None)
        if writing is not None:
            self._batch.evict(writing.slot)
        self._waiting = deque(waiting for waiting in self._waiting if waiting.job.id != id)

    def work(self) -> list[Event]:
        """Admit what fits, take all running jobs one pass further, return what has happened."""
        out, self._failed = self._failed, []
        try:
            while self._waiting:
                writing = self._waiting[0]
                if not self._batch.admit(writing.slot, fresh=writing.job.fresh, look=writing.look):
                    break
                self._waiting.popleft()
                writing.admitted()
                self._running[writing.job.id] = writing
            if not self._running:
                return out
            self._batch.step()
            for id, writing in list(self._running.items()):
                out += writing.events()
                if writing.slot.finished:
                    del self._running[id]
        except Exception:  # not one job's fault; all cells may be in disorder
            log.exception("a pass failed")
            out += [Failed(id, "internal", "the model could not go on with this text") for id in self._running]
            self._running.clear()
            self._base.clear()
            self._batch = self._new_batch()
        return out
