"""Training text that repeats evaluations: found by shared word n-grams, shorter texts by whole equality.

Of a pair, query and passages count; each answer is a text of its own, as another query may have it too.

A word n-gram in 10 or more training documents of 3 or more groups is boilerplate (licences, idioms of a
language, phrases of a generator) and no evidence. Words are numbered by the held-out text's vocabulary,
n-grams hashed to 64 bits in numpy: memory grows with the held-out text only, and a chance collision is one in
2**64 a pair.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from famc.work.text import Body, Pair, from_columns, joined, read_rows

COMMON_DOCUMENTS, COMMON_GROUPS = 10, 3

Array = np.ndarray[Any, np.dtype[Any]]
_WORD = re.compile(r"\w+")
_PRIME = 0x9E3779B97F4A7C15  # odd: multiplication is one-to-one modulo 2**64


class HeldOut:
    """The n-grams of all held-out text."""

    def __init__(self, ngram: int) -> None:
        self.ngram = ngram
        self.texts = 0
        self.vocabulary: dict[str, int] = {}
        self.short: set[tuple[str, ...]] = set()  # whole texts of less than n words
        self._hashes: list[Array] = []
        self._sorted: Array | None = None

    def add(self, path: Path) -> None:
        """Take in a held-out file, whatever its format."""
        for row in read_rows(path):
            body = from_columns(row)
            words = split(joined(body))
            self.texts += 1
            self.short.update(self.short_texts(body, words))
            if len(words) < self.ngram:
                continue
            vocabulary = self.vocabulary
            numbers = np.fromiter(
                (vocabulary.setdefault(word, len(vocabulary)) for word in words), np.int64, len(words)
            )
            self._hashes.append(np.unique(hashes(numbers, self.ngram)))
        self._sorted = None

    def short_texts(self, body: Body, words: list[str]) -> list[tuple[str, ...]]:
        """The words of each text of a body, itself of some words, that is too short for an n-gram."""
        texts = map(split, body.positives) if isinstance(body, Pair) else (words,)
        return [tuple(text) for text in texts if len(text) < self.ngram]

    def matches(self, words: list[str]) -> tuple[Array, Array]:
        """(n-grams of a text that are held out, where each begins first)."""
        if self._sorted is None:
            self._sorted = np.unique(np.concatenate(self._hashes)) if self._hashes else np.empty(0, np.uint64)
        nothing = np.empty(0, np.uint64), np.empty(0, np.int64)
        if len(words) < self.ngram or not len(self._sorted):
            return nothing
        get = self.vocabulary.get
        numbers = np.fromiter((get(word, -1) for word in words), np.int64, len(words))
        unknown = np.concatenate([[0], np.cumsum(numbers < 0)])
        starts = np.flatnonzero(
            unknown[self.ngram :] == unknown[: -self.ngram]
        )  # no unknown word in the window
        if not len(starts):
            return nothing
        wanted = hashes(numbers, self.ngram)[starts]
        places = np.minimum(np.searchsorted(self._sorted, wanted), len(self._sorted) - 1)
        hit = self._sorted[places] == wanted
        found, first = np.unique(wanted[hit], return_index=True)
        return found, starts[hit][first]


def split(text: str) -> list[str]:
    """The words that are compared; of a text without any, its characters."""
    return _WORD.findall(text.lower()) or list(text.strip())


def hashes(numbers: Array, ngram: int) -> Array:
    """A 64-bit hash of each window of `ngram` word numbers."""
    mixed = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(_PRIME)
    mixed ^= mixed >> np.uint64(29)
    count = len(numbers) - ngram + 1
    total = np.zeros(count, np.uint64)
    for offset in range(ngram):
        total = total * np.uint64(0xD1342543DE82EF95) + mixed[offset : offset + count]
    total ^= total >> np.uint64(32)
    return total * np.uint64(_PRIME)


def dropped(held: HeldOut, sources: Iterable[Iterator[tuple[str, Body]]]) -> tuple[list[dict[int, str]], int]:
    """For each source of (group, body): {row: the words that it shares}; how many n-grams were common."""
    whole: list[dict[int, str]] = []
    matched: list[dict[int, tuple[Array, list[str]]]] = []
    documents: dict[int, int] = {}
    groups: dict[int, set[str]] = {}
    for rows in sources:
        whole.append({})
        matched.append({})
        for number, (group, body) in enumerate(rows):
            words = split(joined(body))
            equal = next((text for text in held.short_texts(body, words) if text in held.short), None)
            if equal is not None:
                whole[-1][number] = " ".join(equal)
                continue
            found, starts = held.matches(words)
            if not len(found):
                continue
            phrases = [" ".join(words[at : at + held.ngram]) for at in starts]
            matched[-1][number] = found, phrases
            for key in found.tolist():
                documents[key] = documents.get(key, 0) + 1
                seen = groups.setdefault(key, set())
                if len(seen) < COMMON_GROUPS:
                    seen.add(group)
    common = {
        key
        for key, count in documents.items()
        if count >= COMMON_DOCUMENTS and len(groups[key]) >= COMMON_GROUPS
    }
    for hits, rows_matched in zip(whole, matched, strict=True):
        for number, (found, phrases) in rows_matched.items():
            evidence = next(
                (p for key, p in zip(found.tolist(), phrases, strict=True) if key not in common), None
            )
            if evidence is not None:
                hits[number] = evidence
    return whole, len(common)
