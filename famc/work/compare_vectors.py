"""Is a converted embedder or reranker still the same? Its vectors, its logits and the order it puts documents in.

In: the source's folder, the export's graph and held-out texts, some of which serve as queries to the others; or
both sides as Encoders. Out: figures by name. A gate should ask for `value <= limit` or `value >= limit`: a broken
candidate gives nan, which fails both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from famc.errors import StepFailed
from famc.work.encoder_session import Array, Batch, Encoder, OnnxEncoder, TorchEncoder, encode, longest

BATCH = 32  # texts that run at once
MAX_LENGTH = 512  # tokens of a text: cost grows with the square, and damage shows in the first page
EVERY = 5  # one text in so many is a query
MAX_QUERIES, MAX_DOCUMENTS = 64, 2000
# a reranker reads every pair
MAX_PAIR_QUERIES, MAX_PAIR_DOCUMENTS = 8, 32
TOP = 10  # as many documents as a reader of search results looks at

EncodeTexts = Callable[[Sequence[str]], Batch]
EncodePairs = Callable[[Sequence[str], Sequence[str]], Batch]


def compare_embedder(
    source: Path,
    export_graph: Path,
    texts: list[str],
    tokenizer: Any,
    threads: int,
    *,
    max_length: int = MAX_LENGTH,
) -> dict[str, float]:
    """`compare_embedders` of a model folder in torch, with the pooling that its files ask for, and its graph."""
    queries, documents = split(texts, MAX_QUERIES, MAX_DOCUMENTS)
    reference = TorchEncoder(source, threads, "feature-extraction")
    limit = longest(tokenizer, reference.positions, max_length)
    return compare_embedders(
        reference,
        OnnxEncoder(export_graph, threads, "feature-extraction"),
        queries,
        documents,
        lambda some: encode(tokenizer, some, max_length=limit),
    )


def compare_reranker(
    source: Path,
    export_graph: Path,
    texts: list[str],
    tokenizer: Any,
    threads: int,
    *,
    max_length: int = MAX_LENGTH,
) -> dict[str, float]:
    """`compare_rerankers` of a model folder in torch and its graph."""
    queries, documents = split(texts, MAX_PAIR_QUERIES, MAX_PAIR_DOCUMENTS)
    reference = TorchEncoder(source, threads, "text-ranking")
    limit = longest(tokenizer, reference.positions, max_length)
    return compare_rerankers(
        reference,
        OnnxEncoder(export_graph, threads, "text-ranking"),
        queries,
        documents,
        lambda some, others: encode(tokenizer, some, others, max_length=limit),
    )


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
) -> dict[str, float]:
    """Cosines between both sides' vectors of the same text, and both sides' rankings of all documents by each
    query."""
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
    }


def compare_rerankers(
    reference: Encoder,
    candidate: Encoder,
    queries: Sequence[str],
    documents: Sequence[str],
    encode: EncodePairs,
) -> dict[str, float]:
    """Largest difference of logits over all queries x documents, and both sides' rankings. With several labels the
    last one's logit ranks: it is the most relevant grade, or `yes`."""
    _enough(queries, documents)
    first = [query for query in queries for _ in documents]
    second = [document for _ in queries for document in documents]
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
    table = (len(queries), len(documents))
    return {
        "pairs": float(len(ours)),
        "max_logit_difference": float(np.abs(ours - theirs).max()),
        **compare_rankings(ours[:, -1].reshape(table), theirs[:, -1].reshape(table)),
    }


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
