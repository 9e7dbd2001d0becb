"""Is a converted embedder or reranker still the same? Its vectors, its logits and the order it puts documents in.

In: the source's folder, the export (a graph, a GGUF file, or a folder of weights) and what is held out: pairs of a query and its
passages, or texts, some of which serve as queries to the others; or both sides as Encoders. Out: figures by name; of
pairs also nDCG@10 of both sides. A gate should ask for `value <= limit` or `value >= limit`: a broken candidate gives
nan, which fails both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from famc.errors import StepFailed
from famc.work.encoder_session import (
    MAX_LENGTH,
    Array,
    Batch,
    Encoder,
    TorchEncoder,
    encode,
    longest,
    opened,
    prompts_of,
)

BATCH = 32  # texts that run at once
EVERY = 5  # one text in so many is a query
MAX_QUERIES, MAX_DOCUMENTS = 64, 2000
# a reranker reads every pair
MAX_PAIR_QUERIES, MAX_PAIR_DOCUMENTS = 8, 32
# of pairs: what a reranker reads for one query, its positive among them
CANDIDATES = 32
TOP = 10
EncodeTexts = Callable[[Sequence[str]], Batch]
EncodePairs = Callable[[Sequence[str], Sequence[str]], Batch]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Held-out queries, and the passages that answer each."""

    queries: tuple[str, ...]
    positives: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, examples: Sequence[Mapping[str, Any]], most: int) -> Pairs:
        """The first ones of a corpus, as long as there are no more than `most` passages."""
        queries: list[str] = []
        positives: list[tuple[str, ...]] = []
        seen: set[str] = set()
        for example in examples:
            texts = tuple(text for text in example["positives"] if text.strip())
            if len(seen | set(texts)) > most:
                break
            if texts and example["query"].strip():
                seen |= set(texts)
                queries.append(str(example["query"]))
                positives.append(texts)
        return cls(tuple(queries), tuple(positives))

    @property
    def passages(self) -> tuple[str, ...]:
        """Each once, in the order of a hash: neighbours have nothing to do with each other."""
        unique = dict.fromkeys(text for texts in self.positives for text in texts)
        return tuple(sorted(unique, key=lambda text: (hashlib.sha256(text.encode()).hexdigest(), text)))

    def relevant(self) -> Array:
        """[queries, passages]: whether a passage answers a query."""
        return np.array([[text in texts for text in self.passages] for texts in self.positives])

    def candidates(self, count: int) -> list[list[str]]:
        """For each query its first positive, then the passages that follow it in their order, without its others: so
        many for every query."""
        ring = self.passages
        found = []
        for texts in self.positives:
            at = ring.index(texts[0])
            others = [text for text in (*ring[at + 1 :], *ring[:at]) if text not in texts]
            found.append([texts[0], *others[: count - 1]])
        even = min(map(len, found), default=0)
        return [row[:even] for row in found]


def compare_embedder(
    source: Path,
    export: Path,
    texts: list[str],
    tokenizer: Any,
    threads: int,
    *,
    max_length: int = MAX_LENGTH,
    pairs: Pairs | None = None,
) -> dict[str, float]:
    """`compare_embedders` of a model folder in torch, with the pooling that its files ask for, and what was made of
    it. With pairs, their queries and passages are read instead of the texts, with the model's own prompts."""
    reference = TorchEncoder(source, threads, "feature-extraction")
    candidate = opened(export, threads, "feature-extraction")
    limit = longest(tokenizer, reference.positions, max_length)
    relevant = None
    if pairs:
        query, document = (prompts_of(source).get(side, "") for side in ("query", "document"))
        queries = [query + text for text in pairs.queries]
        documents = [document + text for text in pairs.passages]
        relevant = pairs.relevant()
    else:
        queries, documents = split(texts, MAX_QUERIES, MAX_DOCUMENTS)
    return compare_embedders(
        reference,
        candidate,
        queries,
        documents,
        lambda some: encode(tokenizer, some, max_length=limit),
        relevant=relevant,
    )


def compare_reranker(
    source: Path,
    export: Path,
    texts: list[str],
    tokenizer: Any,
    threads: int,
    *,
    max_length: int = MAX_LENGTH,
    pairs: Pairs | None = None,
) -> dict[str, float]:
    """`compare_rerankers` of a model folder in torch and what was made of it. With pairs, each query is read with its
    positive and with passages of others."""
    reference = TorchEncoder(source, threads, "text-ranking")
    candidate = opened(export, threads, "text-ranking")
    limit = longest(tokenizer, reference.positions, max_length)

    def encoded(some: Sequence[str], others: Sequence[str]) -> Batch:
        return encode(tokenizer, some, others, max_length=limit)

    if pairs:
        documents = pairs.candidates(CANDIDATES)
        relevant = np.zeros((len(documents), len(documents[0])), dtype=bool)
        relevant[:, 0] = True
        return compare_rerankers(reference, candidate, pairs.queries, documents, encoded, relevant=relevant)
    queries, every = split(texts, MAX_PAIR_QUERIES, MAX_PAIR_DOCUMENTS)
    return compare_rerankers(reference, candidate, queries, [every] * len(queries), encoded)


def split(texts: Sequence[str], queries: int, documents: int) -> tuple[list[str], list[str]]:
    """At most so many texts as queries, and as documents. A text that is both would find itself first, whatever
    its export had lost."""
    unique = list(dict.fromkeys(text for text in texts if text.strip()))
    chosen = unique[::EVERY][:queries]
    kept = set(chosen)
    return chosen, [text for text in unique if text not in kept][:documents]


def compare_embedders(
    reference: Encoder,
    candidate: Encoder,
    queries: Sequence[str],
    documents: Sequence[str],
    encode: EncodeTexts,
    *,
    relevant: Array | None = None,
) -> dict[str, float]:
    """Cosines between both sides' vectors of the same text, and both sides' rankings of all documents by each
    query; where it is known which documents are relevant, how good both rankings are."""
    _enough(queries, documents)
    ours, theirs = (
        [_run(encoder, texts, encode) for texts in (queries, documents)] for encoder in (reference, candidate)
    )
    if ours[0].shape != theirs[0].shape:
        raise StepFailed(
            f"the vectors differ in shape: {ours[0].shape} and {theirs[0].shape}",
            "compare an export of this model",
        )
    a, b = np.concatenate(ours), np.concatenate(theirs)
    cosine = (unit(a) * unit(b)).sum(axis=1)
    scores = [unit(queries_) @ unit(documents_).T for queries_, documents_ in (ours, theirs)]
    return {
        "vectors": float(len(a)),
        "cosine_mean": float(cosine.mean()),
        "cosine_min": float(cosine.min()),  # numpy's min keeps a nan
        "max_difference": float(np.abs(a - b).max()),
        **compare_rankings(*scores),
        **({} if relevant is None else compare_ndcg(scores[0], scores[1], relevant)),
    }


def compare_rerankers(
    reference: Encoder,
    candidate: Encoder,
    queries: Sequence[str],
    documents: Sequence[Sequence[str]],
    encode: EncodePairs,
    *,
    relevant: Array | None = None,
) -> dict[str, float]:
    """Largest difference of logits over all queries, each with documents of its own (as many for each), and both
    sides' rankings. With several labels the last one's logit ranks: it is the most relevant grade, or `yes`."""
    _enough(queries, documents[0] if documents else ())
    first = [query for query, some in zip(queries, documents, strict=True) for _ in some]
    second = [document for some in documents for document in some]
    logits: list[Array] = []
    for encoder in (reference, candidate):
        parts = [
            encoder.outputs(encode(first[i : i + BATCH], second[i : i + BATCH]))
            for i in range(0, len(first), BATCH)
        ]
        logits.append(np.concatenate(parts))
    ours, theirs = logits
    if ours.shape != theirs.shape:
        raise StepFailed(
            f"the logits differ in shape: {ours.shape} and {theirs.shape}", "compare an export of this model"
        )
    scores = [side[:, -1].reshape(len(queries), -1) for side in (ours, theirs)]
    return {
        "pairs": float(len(ours)),
        "max_logit_difference": float(np.abs(ours - theirs).max()),
        **compare_rankings(*scores),
        **({} if relevant is None else compare_ndcg(scores[0], scores[1], relevant)),
    }


def compare_ndcg(reference: Array, candidate: Array, relevant: Array) -> dict[str, float]:
    """nDCG@10 of two tables of scores, [queries, documents], and which share of it the candidate loses."""
    ours, theirs = (float(ndcg(scores, relevant).mean()) for scores in (reference, candidate))
    lost = (ours - theirs) / ours if ours else theirs * 0  # nothing to lose; a nan stays one
    return {"ndcg": theirs, "ndcg_source": ours, "ndcg_drop": lost}


def ndcg(scores: Array, relevant: Array) -> Array:
    """nDCG@10 of each query, [queries]: of equal scores the irrelevant comes first, so that a model that tells nothing
    apart gains nothing; nan where a score is."""
    order = np.lexsort((relevant, -scores.astype(np.float64)), axis=1)[:, :TOP]
    gains = 1 / np.log2(np.arange(2, order.shape[1] + 2))
    found = (np.take_along_axis(relevant, order, axis=1) * gains).sum(axis=1)
    best = np.array([gains[:count].sum() for count in relevant.sum(axis=1)])
    with np.errstate(invalid="ignore", divide="ignore"):
        made: Array = np.where(np.isfinite(scores).all(axis=1), found / best, np.nan)
    return made


def compare_rankings(reference: Array, candidate: Array) -> dict[str, float]:
    """How alike two tables of scores, [queries, documents], put the documents in order: the share of queries with
    the same first one, the mean share of the first ten in common, and Kendall's tau-b, mean and worst query."""
    finite = np.isfinite(reference).all(axis=1) & np.isfinite(candidate).all(axis=1)
    top = min(TOP, reference.shape[1])
    # stable: among equal scores the earlier document is first, on both sides
    orders = [np.argsort(-scores, axis=1, kind="stable")[:, :top] for scores in (reference, candidate)]
    first = orders[0][:, 0] == orders[1][:, 0]
    common = [len(set(a) & set(b)) / top for a, b in zip(*(order.tolist() for order in orders), strict=True)]
    taus = np.array([kendall_tau(a, b) for a, b in zip(reference, candidate, strict=True)])
    return {
        "queries": float(len(reference)),
        "documents": float(reference.shape[1]),
        "top1_agreement": float(np.where(finite, first, np.nan).mean()),
        "overlap_at_10": float(np.where(finite, common, np.nan).mean()),
        "kendall_tau": float(taus.mean()),
        "kendall_tau_min": float(taus.min()),
    }


def kendall_tau(a: Array, b: Array) -> float:
    """Kendall's tau-b of two scorings of the same things: 1 the same order, -1 the opposite one; nan if one of them
    says nothing about the order, or holds a nan."""
    upper = np.triu_indices(len(a), 1)
    x, y = (np.sign(np.subtract.outer(s.astype(np.float64), s.astype(np.float64)))[upper] for s in (a, b))
    scale = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / scale) if scale > 0 else float("nan")


def unit(vectors: Array) -> Array:
    """Rows of length 1, in float64; nan for a row of zeros, which has no direction."""
    exact = vectors.astype(np.float64)
    length = np.linalg.norm(exact, axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        divided: Array = exact / length
    return divided


def _run(encoder: Encoder, texts: Sequence[str], encode: EncodeTexts) -> Array:
    parts = [encoder.outputs(encode(texts[i : i + BATCH])) for i in range(0, len(texts), BATCH)]
    return np.concatenate(parts)


def _enough(queries: Sequence[str], documents: Sequence[str]) -> None:
    if not queries or len(documents) < 2:
        raise StepFailed(
            "comparing rankings needs a query and at least two documents", "give more held-out text"
        )
