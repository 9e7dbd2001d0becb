"""`mine`: for every query of a mix of pairs the passages that look like an answer and are none.

In: `data` (a mix of pairs) and, unless BM25 works alone, `model` (an embedder's folder). Out, in the mix's order:
`negatives.parquet` with id, negatives (texts, hardest first), scores, positive_score; `stats.json`.

The corpus is every passage of the mix, once. Candidates are the best `depth` of each method, two of them joined by
their scores (`search.fuse`). Answers of the same query are no negatives, wherever they stand in the data,
nor is what holds an answer whole or is a piece of one: passages are often cut out of one document twice.
What scores as high as the query's worst positive less `margin` is taken for an unmarked answer and left out
(NV-Retriever, arXiv 2407.15831, names the rule): the margin is one of cosine, or with BM25 alone a share of the
positive's score. Negatives that the data gives come first and are not doubted. A query may get less than `k`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from famc.errors import StepFailed
from famc.job import Job
from famc.work.bm25 import Bm25, highest
from famc.work.text import Pair, Writer, dumps, from_columns, limit_threads, read_rows, write_json

Array = np.ndarray[Any, np.dtype[Any]]
Found = tuple[Array, Array]  # numbers of passages, best first, and their scores

_CELLS, _MOST_ROWS = 2**24, 512  # similarities in memory at once: 64 MB
_EXAMPLES, _CHARACTERS = 5, 300  # in stats.json


@dataclass(frozen=True)
class Row:
    """A pair, its passages by their numbers in the corpus."""

    id: str
    query: int
    positives: tuple[int, ...]
    negatives: tuple[int, ...]


@dataclass
class Corpus:
    """Every query and passage of a mix once; texts that differ in white space alone are one."""

    rows: list[Row] = field(default_factory=list)
    queries: dict[str, str] = field(default_factory=dict)  # without extra white space -> as it stands first
    passages: dict[str, str] = field(default_factory=dict)
    answers: dict[int, set[int]] = field(default_factory=dict)  # query -> all its positives
    keys: list[str] = field(default_factory=list)  # of the passages

    @classmethod
    def read(cls, path: Path) -> Corpus:
        """The corpus of a mix."""
        corpus = cls()
        queries: dict[str, int] = {}
        passages: dict[str, int] = {}
        for record in read_rows(path):
            pair = from_columns(record)
            if not isinstance(pair, Pair):
                raise StepFailed(
                    "negatives are mined for pairs, this mix holds none", "mix sources of format pairs"
                )
            query = _number(pair.query, queries, corpus.queries)
            positives, negatives = (
                tuple(_number(text, passages, corpus.passages) for text in texts)
                for texts in (pair.positives, pair.negatives)
            )
            corpus.rows.append(Row(record["id"], query, positives, negatives))
            corpus.answers.setdefault(query, set()).update(positives)
        corpus.keys = list(corpus.passages)
        return corpus


def _number(text: str, numbers: dict[str, int], texts: dict[str, str]) -> int:
    key = " ".join(text.split())
    texts.setdefault(key, text)
    return numbers.setdefault(key, len(numbers))


def run(job: Job, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Read, rank, leave out, write."""
    limit_threads(job.threads)
    params = job.params
    corpus = Corpus.read(inputs["data"] / "examples.parquet")
    queries, passages = list(corpus.queries.values()), list(corpus.passages.values())
    total = len(queries) + len(passages) + len(corpus.rows)
    dense = None
    if "embedder" in params["methods"]:
        if "model" not in inputs:
            raise StepFailed("negatives by an embedder need one", "methods: [bm25] works alone")
        dense = _vectors(job, inputs["model"], queries, passages, total)
    lexical = Bm25(passages) if "bm25" in params["methods"] else None
    if dense is None and lexical is None:
        raise StepFailed("no method to mine negatives by", "methods: embedder, bm25, or both")
    counts = Counts()
    done = len(queries) + len(passages)
    with Writer(
        out / "negatives.parquet", ("id", "negatives", "scores", "positive_score"), ("positive_score",)
    ) as writer:
        for row, scores, ranked in _ranked(corpus, queries, dense, lexical, params["depth"]):
            found = _choose(row, scores, ranked, corpus, params, dense is not None, counts)
            values = [round(float(scores[number]), 6) for number in found]
            positive = round(float(min(scores[number] for number in row.positives)), 6)
            texts = [passages[number] for number in found]
            writer.add((row.id, dumps(texts), dumps(values), positive))
            counts.add(positive, values, params["k"])
            if len(counts.examples) < _EXAMPLES and found:
                shown = {"query": queries[row.query], "positive": passages[row.positives[0]]}
                shown["negative"] = texts[0]
                counts.examples.append({name: text[:_CHARACTERS] for name, text in shown.items()})
            done += 1
            if done % 500 == 0:
                job.progress(done, total)
    job.progress(total, total)
    if not counts.negatives:
        raise StepFailed(
            f"no negative is left for any of {counts.queries:,} queries among {len(passages):,} passages",
            f"a smaller margin (it is {params['margin']:g}) or a greater depth (it is {params['depth']}) finds more"
            if counts.suspects
            else "the data needs more passages than one a query",
        )
    metrics = {"passages": len(passages), **counts.metrics()}
    write_json(out / "stats.json", {**metrics, "examples": counts.examples})
    return metrics


# --- ranking ------------------------------------------------------------------------------------------------


def _vectors(
    job: Job, folder: Path, queries: Sequence[str], passages: Sequence[str], total: int
) -> tuple[Array, Array]:
    """Vectors of length 1 of all queries and passages."""
    from famc.work.search import Embedder

    if not (folder / "modules.json").is_file():  # a base would be searched by the mean of its tokens
        raise StepFailed(
            f"{folder} is no embedder's folder: it has no modules.json", "give a stage of kind embed"
        )
    embedder = Embedder(folder, None, job.threads, job.precision)
    read = embedder.passages(passages, lambda share: job.progress(share * len(passages), total))
    asked = embedder.queries(queries, lambda share: job.progress(len(passages) + share * len(queries), total))
    return asked, read


def _ranked(
    corpus: Corpus,
    queries: Sequence[str],
    dense: tuple[Array, Array] | None,
    lexical: Bm25 | None,
    depth: int,
) -> Iterator[tuple[Row, Array, list[Found]]]:
    """Of every row: the score of each passage, by the embedder if there is one, and each method's best."""
    rows = max(1, min(_MOST_ROWS, _CELLS // len(corpus.passages))) if corpus.rows else 1
    for at in range(0, len(corpus.rows), rows):
        block = corpus.rows[at : at + rows]
        similar = dense[0][[row.query for row in block]] @ dense[1].T if dense else None
        for index, row in enumerate(block):
            found = []
            if similar is not None:
                scores = similar[index]
                best = highest(scores, depth)
                found.append((best, scores[best]))
            if lexical is not None:
                words = lexical.scores(queries[row.query])
                best = highest(words, depth)
                best = best[words[best] > 0]  # others share no word with the query
                found.append((best, words[best]))
                scores = words if similar is None else scores
            yield row, scores, found


# --- choosing -----------------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What was found and left out."""

    queries: int = 0
    short: int = 0
    negatives: int = 0
    candidates: int = 0
    suspects: int = 0
    positive_sum: float = 0.0
    negative_sum: float = 0.0
    examples: list[dict[str, str]] = field(default_factory=list)

    def add(self, positive: float, negatives: Sequence[float], k: int) -> None:
        self.queries += 1
        self.short += len(negatives) < k
        self.negatives += len(negatives)
        self.positive_sum += positive
        self.negative_sum += sum(negatives)

    def metrics(self) -> dict[str, Any]:
        return {
            "queries": self.queries,
            "negatives": self.negatives,
            "mean_negatives": round(self.negatives / self.queries, 4),
            "queries_with_fewer": self.short,
            "dropped_suspects_share": round(self.suspects / max(1, self.candidates), 4),
            "mean_positive_score": round(self.positive_sum / self.queries, 4),
            "mean_negative_score": round(self.negative_sum / max(1, self.negatives), 4),
        }


def _choose(
    row: Row,
    scores: Array,
    found: Sequence[Found],
    corpus: Corpus,
    params: Mapping[str, Any],
    by_cosine: bool,
    counts: Counts,
) -> list[int]:
    """The negatives of a row, hardest first."""
    from famc.work.search import fused

    positive, margin = float(min(scores[number] for number in row.positives)), params["margin"]
    limit = positive - margin if by_cosine else positive * (1.0 - margin)
    answers = corpus.answers[row.query]
    answer_texts = [corpus.keys[number] for number in answers]
    chosen = [number for number in row.negatives if number not in answers]
    for number in fused(found, len(corpus.keys), sum(len(best) for best, _ in found)).tolist():
        text = corpus.keys[number]
        if number in answers or any(text in answer or answer in text for answer in answer_texts):
            continue
        counts.candidates += 1
        if scores[number] >= limit:
            counts.suspects += 1
        elif number not in chosen:
            chosen.append(number)
    return chosen[: params["k"]]
