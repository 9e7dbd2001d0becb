"""BM25 by bm25s, with words cut as they are written in code and in prose.

In: passages, then queries. Out: scores, or the best passages. Lucene's variant with its defaults, k1 1.2 and b 0.75.
The same input gives the same scores and the same order; equal scores stand in the passages' order.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import bm25s
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets DEBUG for itself

_HUMPS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # json|Decoder, JSON|Decoder
# Scripts without spaces are cut into characters: as runs, hardly two of their words would ever be equal.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W\d_{_UNSPACED}]+|\d+")


class Bm25:
    """An index of passages."""

    def __init__(self, passages: Sequence[str]) -> None:
        self.size = len(passages)
        self.index = bm25s.BM25(k1=1.2, b=0.75, method="lucene")
        texts = [words(passage) for passage in passages]
        self.empty = not any(texts)  # bm25s divides by the mean length
        if not self.empty:
            self.index.index(texts, show_progress=False)

    def scores(self, query: str) -> Array:
        """The score of every passage; 0 for those that share no word with the query."""
        known = [] if self.empty else self.index.get_tokens_ids(words(query))
        if not known:
            return np.zeros(self.size, np.float32)
        return np.asarray(self.index.get_scores_from_ids(known), np.float32)

    def top(self, query: str, k: int) -> tuple[Array, Array]:
        """(passages, their scores) of the `k` best, best first."""
        scores = self.scores(query)
        best = highest(scores, k)
        return best, scores[best]


def words(text: str) -> list[str]:
    """`JSONDecoder.raw_decode2` -> json, decoder, raw, decode, 2."""
    return [word.lower() for word in _WORD.findall(_HUMPS.sub(" ", text))]


def highest(scores: Array, k: int) -> Array:
    """Where the `k` highest scores are, highest first; among equals the first."""
    if k <= 0 or not len(scores):
        return np.empty(0, np.int64)
    if k < len(scores):
        edge = np.partition(scores, len(scores) - k)[len(scores) - k]
        above = np.flatnonzero(scores > edge)
        chosen = np.concatenate([above, np.flatnonzero(scores == edge)[: k - len(above)]])
    else:
        chosen = np.arange(len(scores))
    return chosen[np.lexsort((chosen, -scores[chosen]))]
