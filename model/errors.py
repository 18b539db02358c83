"""The exception types, and the one line that an error is shown as.

    Exception
    ├── MedusaError             what a user can cause: commands print it and exit with status 2
    │   ├── UsageError          an option, an argument or an environment variable
    │   ├── ModelFileError      the GGUF
    │   ├── HeadsError          the draft heads
    │   ├── DataError           a data set, prompts, messages, stored states
    │   ├── ContextError        a prompt that the context cannot hold
    │   ├── OutputError         a result that cannot be written
    │   └── WorkerError         serving: the model's process cannot answer now
    ├── Overloaded              serving: more requests wait than may
    ├── ApiError                serving: a route answers with this status instead
    └── ClientGone              serving: nobody is left to answer

Those of serving are defined where they are raised (`model/serving/worker/protocol.py`,
`model/serving/http/errors.py`); the latter maps all of them to HTTP responses. Every message is one
line: what was wrong, with the value, and what to do.
"""

from __future__ import annotations

MAX_CHARACTERS = 200  # of a message in one line


class MedusaError(Exception):
    """Base of all errors that a user can cause; entry points print it and exit with status 2."""


class UsageError(MedusaError):
    """An option or environment variable holds a value that cannot be used."""


class ModelFileError(MedusaError):
    """A GGUF file is missing, damaged or of a kind that cannot be used."""


class HeadsError(MedusaError):
    """Draft heads are missing, damaged or belong to another model."""


class DataError(MedusaError):
    """A data set or a folder of stored states cannot be used."""


class ContextError(MedusaError):
    """A prompt does not fit into the context."""


class OutputError(MedusaError):
    """A result cannot be written."""


def one_line(error: Exception) -> str:
    """Return an error's message in one line of MAX_CHARACTERS at the most.

    For errors of other libraries, whose messages run over several lines.
    """
    return " ".join(str(error).split())[:MAX_CHARACTERS]
