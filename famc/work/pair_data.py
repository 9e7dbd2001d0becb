"""Pairs of a mix as a contrastive step reads them: texts as ids, each once; rows in training order; batches in columns.

In: the mix's examples.parquet, mined negatives.parquet, a tokenizer, prompts. Out: features of queries, positives and
k negatives, each column sorted by length, and the labels of `contrast.InfoNCE`. The order is a function of the seed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from famc.errors import StepFailed
from famc.work.text import Pair, draw, from_columns, read_rows, same

_SENTENCES = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
_SHORTEST = 20  # characters of a sentence that may ask
_ENDING = 80  # characters by which passages that were cut out of one document are known: they end alike
Order = np.ndarray[Any, np.dtype[np.int64]]
Ids = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class Row:
    """One query with its passages, by the numbers of their texts."""

    query: int
    positives: tuple[int, ...]
    negatives: tuple[int, ...]


@dataclass(frozen=True)
class Pairs:
    """All texts once, and the rows over them. families: the same number for what can't be told apart."""

    rows: tuple[Row, ...]
    ids: tuple[Ids, ...]
    families: torch.Tensor
    texts: tuple[str, ...]
    cut: float  # share of texts that were longer than the context


def read_pairs(
    mix: Path, mined: Path | None, tokenizer: Any, *, context: int, k: int, prompts: Mapping[str, str],
    cloze: int = 0, seed: int = 0,
) -> Pairs:  # fmt: skip
    """The pairs of a mix with their negatives: mined ones if there are any, else those that the data gives; and `cloze`
    sentences of each passage as queries for the rest of it."""
    texts: dict[tuple[str, str], int] = {}

    def number(side: str, text: str) -> int:
        return texts.setdefault((side, text), len(texts))

    given = _read(mix, mined)
    answers: dict[str, set[str]] = {}
    for pair in given:
        answers.setdefault(pair.query, set()).update(pair.positives)
    rows = []
    for pair in given:
        right = answers[pair.query]  # no negatives, wherever they stand in the data
        negatives = [text for text in dict.fromkeys(pair.negatives) if text not in right]
        rows.append(
            Row(
                number("query", pair.query),
                tuple(number("document", text) for text in pair.positives),
                tuple(number("document", text) for text in negatives[:k]),
            )
        )
    whole = {}  # the number of a passage without one of its sentences -> that of the passage
    for passage in [text for side, text in texts if side == "document"] if cloze else ():
        for sentence, left in _cloze(passage, cloze, seed):
            rest = number("document", left)
            whole[rest] = texts["document", passage]
            rows.append(Row(number("query", sentence), (rest,), ()))
    shown = [prompts.get(side, "") + text for side, text in texts]
    encoded = tokenizer(shown, truncation=True, max_length=context).encodings if shown else []
    ids = tuple(np.array(one.ids, np.int32) for one in encoded)
    keys: dict[tuple[str, str], int] = {}
    families = [
        keys.setdefault((side, same(text) if side == "query" else same(text)[-_ENDING:]), len(keys))
        for side, text in texts
    ]
    for rest, passage_number in whole.items():
        families[rest] = families[passage_number]
    cut = sum(bool(one.overflowing) for one in encoded) / max(1, len(ids))
    return Pairs(tuple(rows), ids, torch.tensor(families), tuple(text for _, text in texts), cut)


def _cloze(passage: str, n: int, seed: int) -> list[tuple[str, str]]:
    """At most `n` sentences of a passage, each with what is left without it; drawn by seed and passage alone."""
    parts = [part for part in _SENTENCES.split(passage) if part.strip()]
    able = [i for i, part in enumerate(parts) if len(part) >= _SHORTEST]
    if len(parts) < 2:
        return []
    chosen = sorted(able, key=lambda i: draw(seed, f"{i}:{passage}"))[:n]
    return [(" ".join(parts[i].split()), "\n".join(parts[:i] + parts[i + 1 :])) for i in sorted(chosen)]


def _read(mix: Path, mined: Path | None) -> list[Pair]:
    """The pairs in the mix's order, with the mined negatives in place of their own."""
    negatives = read_rows(mined / "negatives.parquet", ("id", "negatives")) if mined else None
    rows = read_rows(mix / "examples.parquet")
    pairs = []
    for record, found in zip_longest(rows, negatives) if negatives else ((record, None) for record in rows):
        if negatives and (record is None or found is None or record["id"] != found["id"]):
            raise StepFailed("the negatives were mined for another mix", "build the mining step again")
        pair = from_columns(record)
        if not isinstance(pair, Pair):
            raise StepFailed(
                "a contrastive step reads pairs, this mix holds none", "mix sources of format pairs"
            )
        if found:
            pair = Pair(pair.query, pair.positives, tuple(json.loads(found["negatives"])))
        pairs.append(pair)
    return pairs


class Ordered(torch.utils.data.Dataset[tuple[int, ...]]):
    """Rows in training order: each item the numbers of a query, one of its positives, and its negatives."""

    def __init__(self, pairs: Pairs, order: Sequence[int] | Order, k: int) -> None:
        self.pairs, self.order, self.k = pairs, order, k

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[int, ...]:
        row = self.pairs.rows[int(self.order[index])]
        turn = index // len(self.pairs.rows)  # another answer in each pass
        positive = row.positives[turn % len(row.positives)]
        # what is missing is filled with the positive, which its own family leaves out of the loss
        negatives = (*row.negatives[: self.k], *[positive] * (self.k - len(row.negatives)))
        return (row.query, positive, *negatives)


class Columns:
    """Items -> the features of each column, sorted by length, and their labels."""

    def __init__(self, pairs: Pairs, pad: int, types: bool) -> None:
        self.pairs, self.pad, self.types = pairs, pad, types

    def __call__(self, items: list[tuple[int, ...]]) -> dict[str, Any]:
        numbers = np.array(items, np.int64)
        columns, places = [], []
        for column in numbers.T:
            lengths = [len(self.pairs.ids[n]) for n in column]
            order = np.argsort(lengths, kind="stable")
            columns.append(self.features([self.pairs.ids[n] for n in column[order]]))
            places.append(np.argsort(order))
        return {
            "columns": columns,
            "labels": torch.from_numpy(np.concatenate([numbers, np.stack(places, 1)], 1)),
        }

    def features(self, texts: Sequence[Ids]) -> dict[str, torch.Tensor]:
        """Ids and mask, padded on the right."""
        width = max(map(len, texts))
        ids = np.full((len(texts), width), self.pad, np.int64)
        mask = np.zeros((len(texts), width), np.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = text
            mask[row, : len(text)] = 1
        made = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        return made | ({"token_type_ids": torch.zeros_like(made["input_ids"])} if self.types else {})
