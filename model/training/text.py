"""Documents in, samples out: windows of token ids, with a mask of the tokens that are to be learnt.

The tokenizer is the GGUF's own. Knows neither file formats nor hidden states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import click
import numpy as np
import numpy.typing as npt

from model.base.chat import ChatTemplate, Segment
from model.errors import DataError
from model.training.documents import Document

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


class Tokenizer(Protocol):
    """What is needed of a model to make tokens of a text."""

    bos: int

    def tokenize(self, text: str, *, add_bos: bool = True, parse_special: bool = False) -> npt.NDArray[np.int32]:
        """Return the ids (n,) of a text."""

    def piece(self, token: int) -> bytes:
        """Return the bytes of one token."""


@dataclass(frozen=True)
class Sample:
    """A window of one document: what is decoded as one sequence.

    tokens: (T,) int32; mask: (T,) bool, True where a token is to be learnt; document: its number.
    """

    name: str
    document: int
    tokens: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_]


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
    assistant's tokens are targets. Recorded ids are taken as they are. max_tokens: stop there (0: take all).
    vocabulary: the model's `heads_fingerprint`; base: its name: answers of another one are taken, and told of.
    Records that cannot be used, or that the template refuses, are skipped and counted in one line. Raises DataError
    when nothing is left, and for ids of another vocabulary.
    """
    samples: list[Sample] = []
    skipped: list[str] = []  # where and why
    authors: set[str] = set()  # of recorded answers, where they are not this model's
    encoder = PartEncoder(tokenizer)
    bos = encoder.bos
    budget = max_tokens
    for number, document in enumerate(documents):
        if document.recorded and document.recorded.vocabulary != vocabulary:
            raise DataError(
                f"{document.name}: holds ids of {document.recorded.base} (vocabulary "
                f"{document.recorded.vocabulary[:12]}), which mean something else to this model (vocabulary "
                f"{vocabulary[:12] or 'unknown'}); distil anew with this model, or give it text"
            )
        if document.recorded and base and document.recorded.base != base:
            authors.add(document.recorded.base)
        try:
            tokens, mask = _encode(document, encoder, template)
        except DataError as error:
            skipped.append(f"{document.name}: {error}")
            continue
        window = max_length - len(bos)
        for at in range(0, len(tokens), window):
            piece, learn = tokens[at : at + window], mask[at : at + window]
            if max_tokens:
                piece, learn = piece[: max(budget - len(bos), 0)], learn[: max(budget - len(bos), 0)]
            if not learn[
                2 - len(bos) :
            ].any():  # nothing that head 1 could learn: it drafts the third token at the earliest
                continue
            whole = np.concatenate([bos, piece]).astype(np.int32)
            learn = np.concatenate([np.zeros(len(bos), np.bool_), learn])
            samples.append(Sample(f"{document.name}+{at}", number, whole, learn))
            budget -= len(whole)
        if max_tokens and budget < 3:
            break
    told = f"records skipped: {len(skipped):,}; the first, {skipped[0]}" if skipped else ""
    if not samples:
        why = f" ({told})" if told else ""
        raise DataError(f"the data set is empty: not one text of three tokens or more that could be learnt{why}")
    if told:
        click.echo(told, err=True)
    if authors:
        click.echo(f"answers of {', '.join(sorted(authors))}: heads for {base} learn best from its own", err=True)
    return samples


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


class PartEncoder:
    """Encodes parts of one text as if they stood together. bos: the model's begin mark, (1,); (0,) where it has none.

    Tokenizers that put a space before every text would put a second one before a part that begins with a space.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        start = tokenizer.tokenize("a", add_bos=False)
        self._adds_space = tokenizer.piece(int(start[0])).startswith(b" ") if len(start) else False
        first = tokenizer.tokenize("", add_bos=True)[:1]
        self.bos: Ids = first[first == tokenizer.bos]

    def encode(self, text: str, *, special: bool = False, later: bool = False) -> Ids:
        """Return the ids of one part; `later`: another one stands before it."""
        cut = int(later and self._adds_space and text.startswith(" "))
        return self._tokenizer.tokenize(text[cut:], add_bos=False, parse_special=special)

    def join(self, parts: Sequence[Segment], *, special: bool = False) -> tuple[Ids, Mask]:
        """Return the ids of all parts, without the begin mark that a template may write, and which are answers."""
        rows = [self.encode(part.text, special=special, later=i > 0) for i, part in enumerate(parts)]
        tokens = np.concatenate([np.empty(0, np.int32), *rows])
        mask = np.repeat([part.answer for part in parts], [len(row) for row in rows]).astype(np.bool_)
        return self.without_bos(tokens, mask)

    def without_bos(self, tokens: Ids, mask: Mask) -> tuple[Ids, Mask]:
        """Take the begin mark away where there is one."""
        marked = int(len(self.bos) > 0 and len(tokens) > 0 and tokens[0] == self.bos[0])
        return tokens[marked:], mask[marked:]


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


def split_samples(samples: list[Sample], val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the indices of training and validation samples: whole documents where there are enough of them.

    Raises DataError where there are not two samples.
    """
    if len(samples) < 2:
        raise DataError(
            "the data set gives one sample only; training needs a second one to validate on: give more text"
        )
    keys = [sample.document for sample in samples]
    if len(set(keys)) == 1:
        keys = list(range(len(samples)))
    groups = np.random.default_rng(seed).permutation(np.unique(keys))
    chosen = set(groups[: min(max(1, round(val_fraction * len(groups))), len(groups) - 1)].tolist())
    validation = [i for i, key in enumerate(keys) if key in chosen]
    return [i for i, key in enumerate(keys) if key not in chosen], validation
