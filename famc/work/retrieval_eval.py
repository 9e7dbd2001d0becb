"""`retrieval` and `rerank`: how early do held-out queries find the passages that answer them?

In: held-out pairs and an embedder's folder (or a language model's that is none yet), or a reranker's with maybe an
embedder's as its first stage. Out: nDCG@10 and others by query, through ir_measures, each beside BM25 on the same queries
and passages: what compares words and has learnt nothing is the bar.

The corpus is every held-out passage of the source, its negatives among them; rows with the same query are one query
that all their passages answer. BM25 finds only passages that share a word with the query. A gain over another system is
a ratio of sums over queries, sum(ours - theirs) / sum(theirs), with the error that such a ratio has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
from ir_measures import RR, R, nDCG

from famc.errors import StepFailed
from famc.work.bm25 import Bm25
from famc.work.evaluate import Measured, Subject, heldout
from famc.work.scores import Units
from famc.work.search import Array, Corpus, Embedder, Found, Reranker, by_words, cut, fused, nearest

DEPTH = 1000  # passages of a ranking; fusion reads as many
KEPT = 100  # of a ranking that is measured
TOP = 50  # passages that a reranker reads again
SHOWN, FOUND, CHARACTERS = 10, 3, 200  # samples, passages of each, and of each passage
MEASURES = {"ndcg@10": nDCG @ 10, "mrr@10": RR @ 10, "recall@10": R @ 10, "recall@100": R @ 100}
NDCG = "ndcg@10"
Ranking = Array  # numbers of passages, best first
ByQuery = dict[str, list[float]]  # metric -> a value for each query


@dataclass(frozen=True)
class Questions:
    """Held-out queries, each once, and the passages that answer them among all."""

    corpus: Corpus
    ids: tuple[str, ...]
    queries: tuple[str, ...]
    right: tuple[tuple[int, ...], ...]

    @classmethod
    def read(cls, data: Path | None, n: int | None) -> Questions:
        """The first `n` queries in the order of the hash of their ids, among all held-out passages."""
        rows = [
            {**row, "positives": json.loads(row["positives"]), "negatives": json.loads(row["negatives"])}
            for row in heldout(data, None, ["query", "positives", "negatives"])
        ]
        corpus = Corpus.of(text for side in ("positives", "negatives") for row in rows for text in row[side])
        ids: dict[str, str] = {}
        queries: dict[str, str] = {}
        right: dict[str, dict[int, None]] = {}
        for row in rows:
            query = " ".join(str(row["query"]).split())
            passages = [corpus.number(text) for text in row["positives"] if text.strip()]
            if query and passages:
                ids.setdefault(query, str(row["id"]))
                queries.setdefault(query, str(row["query"]))
                right.setdefault(query, {}).update(dict.fromkeys(passages))
        if not queries or len(corpus) < 2:
            raise StepFailed(
                f"searching needs a query and at least two passages; {len(queries)} and {len(corpus)} are held out",
                "raise heldout.fraction of the source",
            )
        chosen = list(queries)[:n]
        return cls(
            corpus,
            tuple(ids[query] for query in chosen),
            tuple(queries[query] for query in chosen),
            tuple(tuple(sorted(right[query])) for query in chosen),
        )

    def measure(self, rankings: Sequence[Ranking], measures: Mapping[str, Any]) -> ByQuery:
        """Each measure of each query. Places are handed over as scores, so that no tie is left to be broken."""
        qrels = {str(q): {str(p): 1 for p in right} for q, right in enumerate(self.right)}
        run = {
            str(q): {str(int(p)): float(-place) for place, p in enumerate(ranking[:KEPT])}
            for q, ranking in enumerate(rankings)
        }
        found: ByQuery = {name: [0.0] * len(self.queries) for name in measures}
        names = {measure: name for name, measure in measures.items()}
        for one in ir_measures.iter_calc(list(names), qrels, run):
            found[names[one.measure]][int(one.query_id)] = float(one.value)
        return found

    def units(self, num: Sequence[float], den: Sequence[float] | None = None) -> Units:
        """A mean over queries, or a ratio of sums."""
        return Units.of(zip(self.ids, num, den or [1.0] * len(num), strict=True))

    def gain(self, ours: Sequence[float], theirs: Sequence[float]) -> Units:
        """How much better ours is than theirs, as a share of theirs."""
        return self.units([a - b for a, b in zip(ours, theirs, strict=True)], theirs)

    def place(self, query: int, ranking: Ranking) -> int | None:
        """The place of the first right passage, from 1; None if the ranking has none."""
        places = np.flatnonzero(np.isin(ranking, self.right[query]))
        return int(places[0]) + 1 if len(places) else None

    def shown(self, ranking: Sequence[int] | Ranking) -> list[str]:
        """The beginning of its first passages."""
        return [self.corpus.passages[int(number)][:CHARACTERS] for number in ranking[:FOUND]]


# --- an embedder --------------------------------------------------------------------------------------------


def retrieval(subject: Subject, task: Mapping[str, Any], data: Path | None) -> Measured:
    """An embedder's rankings of all passages; BM25's; both joined; the embedder's with its shortest vectors."""
    questions = Questions.read(data, task["n"])
    embedder = Embedder(
        subject.folder, subject.tokenizer_folder, subject.threads, subject.precision, context=subject.context
    )
    queries, passages = _vectors(embedder, questions, subject, 0.9)
    near, words_found = list(nearest(queries, passages, DEPTH)), _bm25(questions)
    both = [fused(pair, len(questions.corpus), DEPTH) for pair in zip(near, words_found, strict=True)]
    ours, theirs = ([best for best, _ in found] for found in (near, words_found))
    mine = questions.measure(ours, MEASURES)
    words, joined = (questions.measure(some, {NDCG: MEASURES[NDCG]})[NDCG] for some in (theirs, both))
    found = Measured({name: questions.units(values) for name, values in mine.items()})
    found.units |= {
        f"bm25_{NDCG}": questions.units(words),
        "over_bm25": questions.gain(mine[NDCG], words),
        f"fused_{NDCG}": questions.units(joined),
        "fused_over_bm25": questions.gain(joined, words),
        "fused_over_embedder": questions.gain(joined, mine[NDCG]),
    }
    shortest = embedder.dims[-1]
    if shortest < embedder.dims[0]:
        short = [best for best, _ in nearest(cut(queries, shortest), cut(passages, shortest), KEPT)]
        kept = questions.measure(short, {NDCG: MEASURES[NDCG]})[NDCG]
        found.units["mrl_kept"] = questions.units(kept, mine[NDCG])
    for q in range(min(SHOWN, len(ours))):
        found.samples.append(
            {
                **_asked(questions, q, "retrieval"),
                "rank": questions.place(q, ours[q]),
                "found": questions.shown(ours[q]),
                "bm25_rank": questions.place(q, theirs[q]),
                "bm25_found": questions.shown(theirs[q]),
                "fused_rank": questions.place(q, both[q]),
            }
        )
    subject.progress(1.0)
    return found


# --- a reranker ---------------------------------------------------------------------------------------------


def rerank(subject: Subject, task: Mapping[str, Any], data: Path | None) -> Measured:
    """A reranker's order of the first `top` of an embedder's ranking, or of BM25's if there is no embedder. Passages
    behind those keep their places; of equal scores the first stage's order stands."""
    questions = Questions.read(data, task["n"])
    reranker = Reranker(subject.folder, subject.threads, subject.precision)
    top = int(task.get("top") or TOP)
    depth = max(DEPTH, top)
    theirs = [best for best, _ in _bm25(questions, depth)]
    first, share = theirs, 0.0
    if subject.retriever is not None:
        share = 0.3
        embedder = Embedder(
            subject.retriever, subject.tokenizer_folder, subject.threads, subject.precision, context=subject.context
        )  # fmt: skip
        first = [best for best, _ in nearest(*_vectors(embedder, questions, subject, share), depth)]
        del embedder
    ours = again(reranker, questions, first, top, lambda done: subject.progress(share + (1.0 - share) * done))
    mine = questions.measure(ours, {name: MEASURES[name] for name in (NDCG, "mrr@10")})
    before = questions.measure(first, {NDCG: MEASURES[NDCG]})[NDCG]
    words = questions.measure(theirs, {NDCG: MEASURES[NDCG]})[NDCG]
    reached = [
        float(np.isin(right, ranking[:top]).mean())
        for right, ranking in zip(questions.right, first, strict=True)
    ]
    found = Measured({name: questions.units(values) for name, values in mine.items()})
    found.units |= {
        f"retriever_{NDCG}": questions.units(before),
        "retriever_recall": questions.units(reached),
        f"bm25_{NDCG}": questions.units(words),
        "over_retriever": questions.gain(mine[NDCG], before),
        "over_bm25": questions.gain(mine[NDCG], words),
    }
    for q in range(min(SHOWN, len(ours))):
        found.samples.append(
            {
                **_asked(questions, q, "rerank"),
                "retriever": "bm25" if subject.retriever is None else "embedder",
                "rank": questions.place(q, ours[q]),
                "found": questions.shown(ours[q]),
                "retriever_rank": questions.place(q, first[q]),
                "retriever_found": questions.shown(first[q]),
                "bm25_rank": questions.place(q, theirs[q]),
            }
        )
    return found


def again(
    reranker: Any,
    questions: Questions,
    first: Sequence[Ranking],
    top: int,
    progress: Any = lambda share: None,
) -> list[Ranking]:
    """Rankings whose first `top` passages stand in the order of a reranker's scores."""
    heads = [ranking[:top] for ranking in first]
    asked = [questions.queries[q] for q, head in enumerate(heads) for _ in head]
    read = [questions.corpus.passages[int(number)] for head in heads for number in head]
    scores = reranker.pairs(asked, read, progress)
    made, at = [], 0
    for ranking, head in zip(first, heads, strict=True):
        order = np.argsort(-scores[at : at + len(head)], kind="stable")
        made.append(np.concatenate([head[order], ranking[top:]]))
        at += len(head)
    return made


# --- what both need -----------------------------------------------------------------------------------------


def _vectors(embedder: Embedder, questions: Questions, subject: Subject, share: float) -> tuple[Array, Array]:
    total = len(questions.queries) + len(questions.corpus)
    part = len(questions.queries) / total
    queries = embedder.queries(questions.queries, lambda done: subject.progress(share * part * done))
    passages = embedder.passages(
        questions.corpus.passages, lambda done: subject.progress(share * (part + (1.0 - part) * done))
    )
    return queries, passages


def _bm25(questions: Questions, depth: int = DEPTH) -> list[Found]:
    index = Bm25(questions.corpus.passages)
    return [by_words(index, query, depth) for query in questions.queries]


def _asked(questions: Questions, query: int, task: str) -> dict[str, Any]:
    return {
        "id": questions.ids[query],
        "task": task,
        "query": questions.queries[query][:CHARACTERS],
        "right": questions.corpus.passages[questions.right[query][0]][:CHARACTERS],
    }
