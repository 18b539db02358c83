"""Names of draft sources: what users may choose from."""

from __future__ import annotations

from typing import Literal, get_args

from model.decoding.drafters.drafter import HEADS, NGRAM, RECYCLED
from model.errors import UsageError

# both: heads and n-grams; free: what needs no heads; auto: all there are.
Sources = Literal["auto", "heads", "ngram", "recycled", "both", "free", "none"]
SOURCES: tuple[Sources, ...] = get_args(Sources)
SOURCE_ALIASES: dict[str, Sources] = {"medusa": "heads"}  # names of before
FREE = frozenset({NGRAM, RECYCLED})  # sources that need no heads, and next to no time
NAMES: dict[Sources, frozenset[str]] = {
    "heads": frozenset({HEADS}),
    "ngram": frozenset({NGRAM}),
    "recycled": frozenset({RECYCLED}),
    "both": frozenset({HEADS, NGRAM}),
    "free": FREE,
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
