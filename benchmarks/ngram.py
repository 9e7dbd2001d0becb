"""A 5-gram model over the family's own tokens: the baseline that a trained model must beat.

Interpolated Kneser–Ney (Chen & Goodman 1999, with one discount an order): continuation counts below the top order.
In: token streams. Out: bits per byte of held-out documents.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np


class KneserNey:
    """Counts of all orders up to `order`; `log2(history, token)` is the interpolated probability's logarithm."""

    def __init__(
        self, documents: Iterable[Sequence[int]], vocab: int, order: int = 5, start: int = 0
    ) -> None:
        self.order, self.vocab, self.start = order, vocab, start
        top: dict[tuple[int, ...], int] = defaultdict(int)
        for document in documents:
            padded = [start] * (order - 1) + list(document)
            for i in range(order - 1, len(padded)):
                top[tuple(padded[i - order + 1 : i + 1])] += 1
        self.counts: list[dict[tuple[int, ...], int]] = [{} for _ in range(order + 1)]
        self.counts[order] = dict(top)
        for n in range(order - 1, 0, -1):  # how many different tokens stand before an n-gram
            lower: dict[tuple[int, ...], int] = defaultdict(int)
            for gram in self.counts[n + 1]:
                lower[gram[1:]] += 1
            self.counts[n] = dict(lower)
        self.totals: list[dict[tuple[int, ...], int]] = [{} for _ in range(order + 1)]
        self.kinds: list[dict[tuple[int, ...], int]] = [{} for _ in range(order + 1)]
        self.discount = [0.0] * (order + 1)
        for n in range(1, order + 1):
            total: dict[tuple[int, ...], int] = defaultdict(int)
            kinds: dict[tuple[int, ...], int] = defaultdict(int)
            once = twice = 0
            for gram, count in self.counts[n].items():
                total[gram[:-1]] += count
                kinds[gram[:-1]] += 1
                once += count == 1
                twice += count == 2
            self.totals[n], self.kinds[n] = dict(total), dict(kinds)
            self.discount[n] = once / (once + 2 * twice) if once else 0.5

    def probability(self, history: tuple[int, ...], token: int) -> float:
        value = 1.0 / self.vocab
        for n in range(1, self.order + 1):
            context = history[len(history) - n + 1 :] if n > 1 else ()
            total = self.totals[n].get(context)
            if not total:
                continue
            count = self.counts[n].get((*context, token), 0)
            d = self.discount[n]
            value = max(count - d, 0.0) / total + d * self.kinds[n][context] / total * value
        return value

    def bits(self, document: Sequence[int]) -> float:
        """Bits that a document costs."""
        padded = [self.start] * (self.order - 1) + list(document)
        first = self.order - 1
        return -sum(
            math.log2(self.probability(tuple(padded[i - first : i]), padded[i]))
            for i in range(first, len(padded))
        )


def split(stream: np.ndarray, end: int) -> list[list[int]]:
    """A packed stream -> its documents, each with its end."""
    edges = np.flatnonzero(stream == end) + 1
    return [part.tolist() for part in np.split(stream, edges) if len(part)]
