"""The model's process: takes commands in and sends events out, step by step.

llama.cpp ends its process on internal errors; this one can be lost and started again. Knows no HTTP
and no asyncio, and of the model only `ServedModel`.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

from model.errors import MedusaError
from model.serving.worker.messages import Event, Failed, Finished, Started, merged
from model.serving.worker.protocol import WorkerError
from model.serving.worker.served_model import ModelOptions, ServedModel

log = logging.getLogger(__name__)
COMMANDS_S = 0.02  # that commands may take between two steps, where there is more than one
# After which something is sent even where nothing has happened, as during long prefills.
SIGN_OF_LIFE_S = 2.0
GATHER_S = 0.01  # that text may wait for more: small models take a step in less than sending takes
Commands = queue.SimpleQueue[tuple[Any, ...]]


def run(options: ModelOptions, inbox: Connection, outbox: Connection) -> None:
    """Load the model, say so, and work until the other side is gone.

    The main function of the process. Sends ("ready", ModelInfo) or ("refused", message), then
    ("events", events, cached tokens), ("answer", key, value or error), and ("info", ModelInfo)
    where that has changed.
    """
    for reaches_the_whole_group in (signal.SIGINT, signal.SIGTERM):
        signal.signal(reaches_the_whole_group, signal.SIG_IGN)  # the parent decides
    logging.basicConfig(level=options.log_level, format="%(message)s")
    commands: Commands = queue.SimpleQueue()
    questions: Commands = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(inbox, commands, questions), daemon=True).start()
    try:
        model = ServedModel(options)
    except MedusaError as error:
        outbox.send(("refused", str(error)))
        return
    outbox.send(("ready", model.info))
    sending = threading.Lock()
    threading.Thread(target=_answer, args=(model, questions, outbox, sending), daemon=True).start()
    _work(model, commands, outbox, sending)


def _work(
    model: ServedModel, commands: Commands, outbox: Connection, sending: threading.Lock
) -> None:
    """Obey commands and take steps until told to quit."""
    events = list[Event]()
    last_sent = perf_counter()
    disturbed = False  # the last slice of a measurement
    while True:
        # Obey; without work, measure what is left to measure, or wait.
        began = perf_counter()
        while not (model.busy or model.measuring) or (
            not commands.empty() and perf_counter() - began < COMMANDS_S
        ):
            kind, *rest = commands.get()
            disturbed = True
            if kind == "quit":
                return
            if kind == "submit":
                model.submit(*rest)
            else:
                model.cancel(*rest)
        if not model.busy:
            if model.measure(disturbed=disturbed):
                with sending:
                    outbox.send(("info", model.info))
            disturbed = False
            continue
        events += model.work()

        # Text may wait a little for more; beginnings and ends don't.
        urgent = not model.busy or any(
            isinstance(event, Started | Finished | Failed) for event in events
        )
        waited = perf_counter() - last_sent
        due = events and (urgent or waited > GATHER_S)
        if due or waited > SIGN_OF_LIFE_S:
            with sending:
                outbox.send(("events", merged(events), model.n_cached))
            events = []
            last_sent = perf_counter()


def _listen(inbox: Connection, commands: Commands, questions: Commands) -> None:
    """Pass on what comes; leave at once when the parent is gone."""
    try:
        while True:
            command = inbox.recv()
            if command[0] in ("submit", "cancel", "quit"):
                commands.put(command)
            else:
                questions.put(command)
    except (EOFError, OSError):
        os._exit(1)


def _answer(
    model: ServedModel, questions: Commands, outbox: Connection, sending: threading.Lock
) -> None:
    """Answer questions beside the steps: a tokenizer takes seconds for megabytes."""
    while True:
        kind, key, *values = questions.get()
        try:
            answer = getattr(model, kind)(*values)
        except MedusaError as error:
            answer = error
        except Exception:  # a fault of ours; the next question wants its answer all the same
            log.exception("a question could not be answered")
            answer = WorkerError("the model's process could not answer")
        with sending:
            outbox.send(("answer", key, answer))
