"""Names of draft sources: what users may choose from."""

from __future__ import annotations

from typing import Literal, get_args

from model.decoding.drafters.drafter import HEADS, NGRAM
from model.errors import UsageError

Sources = Literal["auto", "heads", "ngram", "both", "none"]
SOURCES: tuple[Sources, ...] = get_args(Sources)
SOURCE_ALIASES: dict[str, Sources] = {"medusa": "heads"}  # names of before
NAMES: dict[Sources, frozenset[str]] = {
    "heads": frozenset({HEADS}),
    "ngram": frozenset({NGRAM}),
    "both": frozenset({HEADS, NGRAM}),
    "none": frozenset(),
}


def parse_sources(name: str) -> Sources:
    """Return a choice of draft sources by its name or alias. Raises UsageError for any other."""
    name = SOURCE_ALIASES.get(name, name)
    for sources in SOURCES:
        if name == sources:
            return sources
    raise UsageError(f"draft {name!r}: use one of {', '.join(SOURCES)}")


def source_names(sources: Sources) -> frozenset[str] | None:
    """Return the names of the sources that a choice means; None: all there are (auto)."""
    return NAMES.get(sources)
