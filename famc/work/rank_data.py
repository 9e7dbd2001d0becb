"""What a reranker reads: lists of a query with one answer and passages that are none, and pairs of them as tokens.

In: a mix of pairs, mined negatives, a tokenizer. Out: for each place of the training order a `Member` list; a pair's ids.
Everything is a function of data, seed and place alone: a job that resumes reads the same lists.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from famc.errors import StepFailed
from famc.work.text import Pair, draw, from_columns, read_rows

Array = np.ndarray[Any, np.dtype[Any]]
_TEXTS = 1024  # encoded at once
LEAST_ROOM = 8  # tokens of query and passage together


@dataclass(frozen=True, slots=True)
class Query:
    """A row of the mix, its texts by their numbers."""

    query: int
    positives: tuple[int, ...]
    negatives: tuple[int, ...]


@dataclass
class Lists:
    """The queries that have negatives, and every text once."""

    queries: list[Query] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    mined: bool = False
    without: int = 0  # queries that have no negatives: nothing to tell apart, so left out

    def members(self, row: int, turn: int, k: int | None, seed: int) -> list[int]:
        """The passages of a query in its `turn`-th pass: one of its positives, then at most `k` negatives. Mined ones
        are the hardest; of the data's own, which are in no order, each pass draws others.
        """
        query = self.queries[row]
        positive = query.positives[0]
        if len(query.positives) > 1:
            positive = query.positives[draw(seed, f"{turn}:{row}") % len(query.positives)]
        negatives = query.negatives
        if k is not None and len(negatives) > k:
            chosen = range(k)
            if not self.mined:
                drawn = np.random.Generator(np.random.PCG64([seed, turn, row])).permutation(len(negatives))
                chosen = sorted(drawn[:k].tolist())  # type: ignore[assignment]
            negatives = tuple(negatives[at] for at in chosen)
        return [positive, *negatives]


def read_lists(data: Path, mined: Path | None) -> Lists:
    """The lists of a mix, with mined negatives if there are any, else with the data's own."""
    pairs: list[Pair] = []
    negatives = read_rows(mined / "negatives.parquet", ("id", "negatives")) if mined else None
    rows = read_rows(data / "examples.parquet")
    for record, found in zip_longest(rows, negatives) if negatives else ((record, None) for record in rows):
        if negatives and (record is None or found is None or record["id"] != found["id"]):
            raise StepFailed("the negatives were mined for another mix", "build the mining step again")
        pair = from_columns(record)
        if not isinstance(pair, Pair):
            raise StepFailed("a reranker reads pairs, this mix holds none", "mix sources of format pairs")
        if found:
            pair = Pair(pair.query, pair.positives, tuple(json.loads(found["negatives"])))
        pairs.append(pair)
    answers: dict[str, set[str]] = {}
    for pair in pairs:
        answers.setdefault(pair.query, set()).update(pair.positives)
    lists, numbers = Lists(mined=mined is not None), dict[str, int]()
    for pair in pairs:
        right = answers[pair.query]  # no negatives, wherever they stand in the data
        wrong = tuple(dict.fromkeys(text for text in pair.negatives if text not in right))
        if not wrong:
            lists.without += 1
            continue
        query, *passages = (
            numbers.setdefault(t, len(numbers)) for t in (pair.query, *pair.positives, *wrong)
        )
        cut = len(pair.positives)
        lists.queries.append(Query(query, tuple(passages[:cut]), tuple(passages[cut:])))
    lists.texts = list(numbers)
    if not lists.queries:
        raise StepFailed(
            f"none of {len(pairs):,} queries has a negative: a reranker learns from passages that are no answer",
            "set hard_negatives, or give records of data `negatives`",
        )
    return lists


# --- tokens -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """Ids before the first text, between the two and after the second, and the type of the second text's tokens."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    types: tuple[int, int, int, int, int]

    @property
    def ids(self) -> set[int]:
        """All ids that stand around texts."""
        return {*self.before, *self.between, *self.after}

    @property
    def typed(self) -> bool:
        """Whether the tokens' types tell anything."""
        return any(self.types)


def template_of(tokenizer: Any) -> Template:
    """What a tokenizer puts around two texts. It will neither pad nor cut any more: a saved one may do both."""
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    encoding = tokenizer.backend_tokenizer.encode("a", "a")
    sides, parts, types = encoding.sequence_ids, [list[int](), [], []], [0] * 5
    at = 0  # before, first text, between, second text, after
    for side, one, kind in zip(sides, encoding.ids, encoding.type_ids, strict=True):
        if side is not None:
            at = 2 * side + 1
        elif at % 2:
            at += 1
        types[at] = kind
        if side is None:
            parts[at // 2].append(one)
    before, between, after = map(tuple, parts)
    return Template(before, between, after, (types[0], types[1], types[2], types[3], types[4]))


@dataclass(frozen=True)
class Tokens:
    """A pair's ids, and the types of its tokens where they tell anything."""

    ids: Array
    types: Array | None = None


class Encoder:
    """Texts as ids, and pairs of them as a model reads them: at most `context` tokens, of which the query takes half
    at most, and the passage is cut.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], context: int) -> None:
        self.template = template_of(tokenizer)
        self.room = context - sum(
            map(len, (self.template.before, self.template.between, self.template.after))
        )
        if self.room < LEAST_ROOM:
            raise StepFailed(
                f"a context of {context} leaves {max(0, self.room)} tokens for a query and a passage",
                f"set context to {context + LEAST_ROOM - self.room} or more",
            )
        backend = tokenizer.backend_tokenizer
        self.ids: list[Array] = []
        for at in range(0, len(texts), _TEXTS):
            made = backend.encode_batch(list(texts[at : at + _TEXTS]), add_special_tokens=False)
            # one more than fits tells that something was cut
            self.ids += [np.asarray(one.ids[: self.room + 1], np.int32) for one in made]

    def cut(self, query: int, passage: int) -> tuple[int, int]:
        """Tokens that a pair keeps of each text."""
        first = min(len(self.ids[query]), self.room // 2)
        return first, min(len(self.ids[passage]), self.room - first)

    def truncated(self, query: int, passage: int) -> bool:
        """Whether a pair loses tokens."""
        return self.cut(query, passage) != (len(self.ids[query]), len(self.ids[passage]))

    def length(self, query: int, passage: int) -> int:
        """Tokens of a pair."""
        return self.cut(query, passage)[0] + self.cut(query, passage)[1] + self.marks

    @property
    def marks(self) -> int:
        """Tokens around the texts."""
        return len(self.template.before) + len(self.template.between) + len(self.template.after)

    def pair(self, query: int, passage: int) -> Tokens:
        """A pair's tokens."""
        first, second = self.cut(query, passage)
        t = self.template
        parts = [t.before, self.ids[query][:first], t.between, self.ids[passage][:second], t.after]
        ids = np.concatenate([np.asarray(part, np.int64) for part in parts])
        if not t.typed:
            return Tokens(ids)
        return Tokens(ids, np.repeat(np.asarray(t.types, np.int64), [len(part) for part in parts]))


def padded(pairs: Sequence[Tokens], pad: int) -> Mapping[str, Array]:
    """Pairs as a batch, padded on the right."""
    width = max(len(pair.ids) for pair in pairs)
    ids = np.full((len(pairs), width), pad, np.int64)
    mask = np.zeros((len(pairs), width), np.int64)
    types = np.zeros((len(pairs), width), np.int64)
    for at, pair in enumerate(pairs):
        ids[at, : len(pair.ids)] = pair.ids
        mask[at, : len(pair.ids)] = 1
        if pair.types is not None:
            types[at, : len(pair.ids)] = pair.types
    made = {"input_ids": ids, "attention_mask": mask}
    return made if pairs[0].types is None else {**made, "token_type_ids": types}


def buckets(lengths: Sequence[int], pass_tokens: int) -> list[list[int]]:
    """Numbers of pairs, the longest first, cut where padding would cost more than one more pass does: `pass_tokens`."""
    made: list[list[int]] = []
    order = sorted(range(len(lengths)), key=lambda at: (-lengths[at], at))
    waste = 0
    for at in order:
        more = lengths[made[-1][0]] - lengths[at] if made else 0
        if not made or waste + more > pass_tokens:
            made.append([at])
            waste = 0
        else:
            made[-1].append(at)
            waste += more
    return made
