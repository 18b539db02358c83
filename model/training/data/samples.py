"""Documents in, samples out: windows of token ids, with a mask of the tokens that are to be learnt.

Knows neither file formats nor hidden states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import click
import numpy as np
import numpy.typing as npt

from model.base.chat import ChatTemplate, Segment
from model.errors import DataError
from model.training.data.documents import Document, Recorded
from model.training.data.token_encoder import Ids, Mask, PartEncoder, Tokenizer

LEAST = 3  # tokens: head 1 drafts the third one of a text at the earliest


@dataclass(frozen=True)
class Sample:
    """A window of one document: what is decoded as one sequence.

    tokens: (T,) int32; mask: (T,) bool, True where a token is to be learnt; document: its number.
    """

    name: str
    document: int
    tokens: Ids
    mask: Mask


def make_samples(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    max_length: int,
    max_tokens: int = 0,
    *,
    vocabulary: str = "",
    base: str = "",
) -> list[Sample]:
    """Tokenize documents and cut them into windows of at most max_length tokens.

    Each window begins with the model's begin mark where it has one; of a conversation only the
    assistant's tokens are targets. Recorded ids are used as they are. max_tokens: stop there (0: no
    limit). vocabulary: the model's `heads_fingerprint`. base: its name; answers of another one are
    used, and reported. Records that cannot be used, or that the template refuses, are skipped and
    counted in one line. Raises DataError when nothing is left, and for ids of another vocabulary.
    """
    samples: list[Sample] = []
    skipped: list[str] = []  # where and why
    authors: set[str] = set()  # of recorded answers
    encoder = PartEncoder(tokenizer)
    budget = max_tokens or float("inf")
    for number, document in enumerate(documents):
        if document.recorded:
            _require_vocabulary(document.name, document.recorded, vocabulary)
            authors.add(document.recorded.base)
        try:
            tokens, mask = _encode(document, encoder, template)
        except DataError as error:
            skipped.append(f"{document.name}: {error}")
            continue
        for start, row, learn in _windows(tokens, mask, encoder.bos, max_length):
            # The last window of all is cut to what is left of the budget.
            if budget < len(row):
                row = row[: int(budget)]
                learn = learn[: int(budget)]
            if not learn[LEAST - 1 :].any():
                continue
            samples.append(Sample(f"{document.name}+{start}", number, row, learn))
            budget -= len(row)
        if budget < LEAST:
            break
    _report(samples, skipped, authors - {base} if base else set(), base)
    return samples


def _require_vocabulary(name: str, recorded: Recorded, vocabulary: str) -> None:
    """Raise DataError where ids were recorded of a model with another vocabulary."""
    if recorded.vocabulary != vocabulary:
        raise DataError(
            f"{name}: holds ids of {recorded.base} (vocabulary {recorded.vocabulary[:12]}), which "
            f"mean something else to this model (vocabulary {vocabulary[:12] or 'unknown'}); "
            "distil anew with this model, or give it text"
        )


def _encode(document: Document, encoder: PartEncoder, template: ChatTemplate) -> tuple[Ids, Mask]:
    """Return a document's ids without the begin mark, and what is to be learnt of them: (T,) each.

    Raises DataError where it cannot be used.
    """
    if document.problem:
        raise DataError(document.problem)
    if document.recorded:
        return encoder.without_bos(document.recorded.tokens, document.recorded.mask)
    if document.messages:
        return encoder.join(template.segments(list(document.messages)), special=True)
    return encoder.join([Segment(document.text, True)])


def _windows(tokens: Ids, mask: Mask, bos: Ids, max_length: int) -> Iterator[tuple[int, Ids, Mask]]:
    """Yield where each window of a document begins, its ids with the begin mark, and its mask."""
    step = max_length - len(bos)
    unlearnt = np.zeros(len(bos), np.bool_)
    for start in range(0, len(tokens), step):
        row = np.concatenate([bos, tokens[start : start + step]]).astype(np.int32)
        yield start, row, np.concatenate([unlearnt, mask[start : start + step]])


def _report(samples: list[Sample], skipped: list[str], others: set[str], base: str) -> None:
    """Say what was skipped, and whose answers these are; raise DataError where nothing is left."""
    problem = ""
    if skipped:
        problem = f"records skipped: {len(skipped):,}; the first, {skipped[0]}"
    if not samples:
        why = f" ({problem})" if problem else ""
        raise DataError(
            "the data set is empty: not one text of three tokens or more that could be learnt" + why
        )
    if problem:
        click.echo(problem, err=True)
    if others:
        names = ", ".join(sorted(others))
        click.echo(f"answers of {names}: heads for {base} learn best from its own", err=True)


def count_tokens(samples: Iterable[Sample]) -> int:
    """Return the tokens of all samples."""
    return sum(len(sample.tokens) for sample in samples)


def token_counts(samples: Iterable[Sample], n_vocab: int) -> npt.NDArray[np.int64]:
    """Count how often each token is a target: (V,)."""
    learnt = np.concatenate([sample.tokens[sample.mask] for sample in samples])
    return np.bincount(learnt, minlength=n_vocab).astype(np.int64)


def digest(samples: Iterable[Sample]) -> str:
    """Return the SHA-256 of all samples' tokens and masks: states belong to exactly these."""
    total = hashlib.sha256()
    for sample in samples:
        total.update(len(sample.tokens).to_bytes(8, "little"))
        total.update(sample.tokens.tobytes())
        total.update(sample.mask.tobytes())
    return total.hexdigest()


def split_samples(
    samples: list[Sample], val_fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Return the indices of training and validation samples.

    Whole documents where there are enough of them. Documents that are appended later change nothing
    for those that are there: heads that are taught more are never judged by what they have learnt.
    Raises DataError where there are not two samples.
    """
    if len(samples) < 2:
        raise DataError(
            "the data set gives one sample only; training needs a second one to validate on: "
            "give more text"
        )
    keys = [sample.document for sample in samples]
    if len(set(keys)) == 1:
        keys = list(range(len(samples)))
    groups = np.unique(keys)
    drawn = np.random.default_rng(seed).random(len(groups))  # each one's stays its own
    at_least_one = max(val_fraction, drawn.min())
    chosen = set(groups[(drawn <= at_least_one) & (drawn < drawn.max())].tolist())
    train = [i for i, key in enumerate(keys) if key not in chosen]
    validation = [i for i, key in enumerate(keys) if key in chosen]
    return train, validation
