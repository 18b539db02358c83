"""The exception types. Every message is one line: what was wrong, with the value, and what to do."""


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
    """A text does not fit into the context."""


class OutputError(MedusaError):
    """A result cannot be written."""
