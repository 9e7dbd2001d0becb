"""Search: passages once each, an embedder that ranks them, a reranker that reads the best again, rankings joined.

In: folders of models, texts. Out: vectors of length 1, scores, rankings (numbers of passages, best first). What does
not come from a model is exact and repeats; of equal scores the lower number comes first.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from famc.errors import StepFailed
from famc.steps.exports import CONVERTING, FILLING, RANKING, TEXT, VECTORS, task_in
from famc.work.bm25 import Bm25, highest
from famc.work.encoder_folder import EMBEDDER, encoder_tokenizer, save_embedder
from famc.work.likelihood import autocast, load_tokenizer, without_bars
from famc.work.onnx_file import quiet
from famc.work.scores import read_json
from famc.work.text import same

Found = tuple["Array", "Array"]  # numbers of passages, best first, and their scores
Array = np.ndarray[Any, np.dtype[Any]]
Progress = Callable[[float], None]  # share that is done

LONGEST = 512  # tokens that a base without a context of its own reads of a text
DECIMALS = 6  # of a cosine: the rest depends on the order of additions
_BATCH, _CHUNK = 64, 1024  # texts that run at once; between two reports of progress
# tokens of a padded batch of pairs (measured: what a core's cache holds); pairs that are tokenised at once
_PAIR_TOKENS, _PAIR_CHUNK = {"cpu": 2048, "cuda": 32768}, 4096
_CELLS, _MOST_ROWS = 2**24, 512  # similarities in memory at once: 64 MB
WHAT = {
    VECTORS: "an embedder", RANKING: "a reranker", CONVERTING: "an encoder and decoder",
    FILLING: "a masked language model", TEXT: "a language model",
}  # fmt: skip
# tasks of evaluations that search, and what can do them
SEARCHES = {
    "retrieval": (VECTORS, TEXT, FILLING),
    "mteb": (VECTORS, TEXT, FILLING),
    "rerank": (RANKING,),
}


@dataclass(frozen=True)
class Corpus:
    """Passages, each once: what differs in white space or case alone is one."""

    passages: tuple[str, ...]
    numbers: Mapping[str, int]  # same(text) -> its number

    @classmethod
    def of(cls, texts: Iterable[str]) -> Corpus:
        """As they stand first; blank ones are none."""
        unique: dict[str, str] = {}
        for text in texts:
            if key := same(text):
                unique.setdefault(key, text)
        return cls(tuple(unique.values()), {key: number for number, key in enumerate(unique)})

    def number(self, text: str) -> int:
        """Which passage a text is."""
        return self.numbers[same(text)]

    def __len__(self) -> int:
        return len(self.passages)


def what_is(folder: Path) -> str:
    """The task of a model's folder, one of WHAT."""
    path = folder / "config.json"
    if not path.is_file():
        raise StepFailed(f"{folder} is no model's folder: it has no config.json", "give a trained stage")
    return task_in(read_json(path), (folder / "modules.json").is_file())


def suits(folder: Path, task: str) -> None:
    """StepFailed for a task of an evaluation that a model is not for."""
    is_a = what_is(folder)
    if is_a in SEARCHES.get(task, (TEXT, FILLING, CONVERTING)):
        return
    asks = {
        "retrieval": "searches by vectors",
        "mteb": "compares vectors",
        "rerank": "lets a model read query and passage together",
    }
    hint = {VECTORS: "an embedder's task is retrieval", RANKING: "a reranker's task is rerank"}
    raise StepFailed(
        f"the task '{task}' {asks.get(task, 'asks a language model')}: {folder} is {WHAT[is_a]}",
        hint.get(is_a, "give retrieval an embedder, and rerank a reranker"),
    )


# --- rankings -----------------------------------------------------------------------------------------------


def fuse(found: Iterable[Found], size: int) -> Array:
    """Rankings joined by their scores: of each of `size` passages the sum of its standardised scores. A passage that a
    ranking does not hold has the least score of those that it does; one that none holds is -inf.

    Scores say by how much one passage is better, which ranks throw away: a sum of normalised scores found more than
    reciprocal ranks in Bruch et al. 2022 (arXiv 2210.11934), and does so here (docs/decisions.md).

    >>> fuse([(np.array([2, 0]), np.array([3.0, 1.0])), (np.array([2]), np.array([7.0]))], 3).tolist()
    [-1.0, -inf, 1.0]
    """
    total, held = np.zeros(size), np.zeros(size, bool)
    for ranking, scores in found:
        if len(ranking):
            spread = float(np.std(scores))
            standard = (scores - np.mean(scores)) / spread if spread > 0 else np.zeros(len(scores))
            whole = np.full(size, standard.min())
            whole[ranking] = standard
            total += whole
            held[ranking] = True
    return np.where(held, total, -np.inf)


def fused(found: Sequence[Found], size: int, depth: int) -> Array:
    """The best `depth` of several rankings joined; only what one of them holds."""
    scores = np.round(fuse(found, size), DECIMALS)
    best = highest(scores, depth)
    return best[np.isfinite(scores[best])]


def nearest(queries: Array, passages: Array, depth: int) -> Iterator[Found]:
    """Of each query's vector: the `depth` passages of greatest cosine, and those cosines."""
    rows = max(1, min(_MOST_ROWS, _CELLS // max(len(passages), 1)))
    for at in range(0, len(queries), rows):
        similar = np.round(queries[at : at + rows] @ passages.T, DECIMALS)
        for scores in similar:
            best = highest(scores, depth)
            yield best, scores[best]


def by_words(index: Bm25, query: str, depth: int) -> Found:
    """The best passages by BM25, and their scores; those that share no word with the query are not found."""
    best, scores = index.top(query, depth)
    return best[scores > 0], scores[scores > 0]


def cut(vectors: Array, width: int) -> Array:
    """The first numbers of vectors, again of length 1."""
    if width == vectors.shape[1]:
        return vectors
    short = vectors[:, :width]
    made: Array = short / np.maximum(np.linalg.norm(short, axis=1, keepdims=True), 1e-12)
    return made


# --- models -------------------------------------------------------------------------------------------------


class Embedder:
    """An embedder's folder in sentence-transformers; a language model that is none yet, with the mean of its tokens."""

    def __init__(
        self,
        folder: Path,
        tokenizer_folder: Path | None,
        threads: int,
        precision: str = "fp32",
        *,
        context: int = LONGEST,
    ) -> None:
        torch.set_num_threads(threads)
        task = what_is(folder)
        if task in (RANKING, CONVERTING):
            raise StepFailed(
                f"{folder} is {WHAT[task]}: it has no vectors to search by", "give a stage of kind embed"
            )
        self.folder, self.precision, self.tuned = folder, precision, task == VECTORS
        if self.tuned:
            self.model = _sentence_transformer(folder)
        else:
            with tempfile.TemporaryDirectory(prefix="famc-base-") as scratch:
                _save_base(folder, tokenizer_folder or folder, Path(scratch), context)
                self.model = _sentence_transformer(Path(scratch))
        said = folder / EMBEDDER
        width = int(self.model.get_embedding_dimension() or 0)
        own = (read_json(said).get("matryoshka_dims") or ()) if said.is_file() else ()
        self.dims = tuple(sorted({width, *(int(dim) for dim in own if 0 < int(dim) < width)}, reverse=True))

    def queries(self, texts: Sequence[str], progress: Progress = lambda share: None) -> Array:
        """[texts, width] vectors of questions."""
        return self._vectors(self.model.encode_query, texts, progress)

    def passages(self, texts: Sequence[str], progress: Progress = lambda share: None) -> Array:
        """[texts, width] vectors of what is searched."""
        return self._vectors(self.model.encode_document, texts, progress)

    def _vectors(self, encode: Callable[..., Any], texts: Sequence[str], progress: Progress) -> Array:
        order = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), i))
        made = np.zeros((len(texts), self.dims[0]), np.float32)
        for at in range(0, len(order), _CHUNK):
            part = order[at : at + _CHUNK]
            with autocast(self.model, self.precision):
                found = encode(
                    [texts[i] for i in part], batch_size=_BATCH, normalize_embeddings=True, show_progress_bar=False
                )  # fmt: skip
            made[part] = np.asarray(found, np.float32)
            progress((at + len(part)) / len(order))
        if not np.isfinite(made).all():
            raise StepFailed(
                f"{self.folder} gives vectors that are not finite", "look at the losses of its training"
            )
        return made


def _sentence_transformer(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    with _loading(folder):
        return SentenceTransformer(str(folder), local_files_only=True, device=_device())


def _save_base(folder: Path, tokenizer_folder: Path, out: Path, context: int) -> None:
    """A causal or masked language model as an embedder's folder: the mean of its last hidden states."""
    arch = str(read_json(folder / "config.json").get("model_type", ""))
    extra = {"add_pooling_layer": False} if arch == "bert" else {}
    with _loading(folder):
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **extra)
        limit = min(context, int(getattr(model.config, "max_position_embeddings", context)))
        tokenizer = encoder_tokenizer(tokenizer_folder, arch, words=False)
        save_embedder(model, tokenizer, out, pooling="mean", prompts={}, mrl=(), context=limit)


class Reranker:
    """A sequence classifier's folder; with several labels the last one's logit ranks."""

    def __init__(self, folder: Path, threads: int, precision: str = "fp32") -> None:
        torch.set_num_threads(threads)
        task = what_is(folder)
        if task != RANKING:
            raise StepFailed(
                f"{folder} is {WHAT[task]}: it does not score pairs", "give a stage of kind rerank"
            )
        self.folder, self.precision = folder, precision
        self.tokenizer = load_tokenizer(folder)
        with _loading(folder):
            model = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True
            )
        self.model = model.eval().to(_device())
        positions = int(getattr(model.config, "max_position_embeddings", None) or LONGEST)
        self.limit = min(positions, int(self.tokenizer.model_max_length))
        # a query longer than this takes no more than half of what two texts may have, as in training
        self.half = max(1, (self.limit - self.tokenizer.num_special_tokens_to_add(pair=True)) // 2)

    def scores(self, query: str, passages: Sequence[str]) -> Array:
        """How well each passage answers the query."""
        return self.pairs([query] * len(passages), passages)

    def pairs(
        self, queries: Sequence[str], passages: Sequence[str], progress: Progress = lambda share: None
    ) -> Array:
        """How well each passage answers the query beside it. Pairs of like length run together."""
        short = {query: self._short(query) for query in dict.fromkeys(queries)}
        order = sorted(range(len(queries)), key=lambda i: (-len(queries[i]) - len(passages[i]), i))
        made = np.zeros(len(queries), np.float32)
        room = _PAIR_TOKENS[self.model.device.type]
        for at in range(0, len(order), _PAIR_CHUNK):
            part = order[at : at + _PAIR_CHUNK]
            encoded = self.tokenizer(
                [short[queries[i]] for i in part], [passages[i] for i in part],
                truncation="only_second", max_length=self.limit, padding=False,
            )  # fmt: skip
            lengths = [len(ids) for ids in encoded["input_ids"]]
            ranked = sorted(range(len(part)), key=lambda i: (-lengths[i], i))
            start = 0
            while start < len(ranked):
                some = ranked[start : start + max(1, room // max(lengths[ranked[start]], 1))]
                start += len(some)
                batch = {name: [rows[i] for i in some] for name, rows in encoded.items()}
                made[[part[i] for i in some]] = self._logits(batch)
                progress((at + start) / len(order))
        if not np.isfinite(made).all():
            raise StepFailed(
                f"{self.folder} gives scores that are not finite", "look at the losses of its training"
            )
        return made

    def _logits(self, batch: Mapping[str, Any]) -> Array:
        padded = self.tokenizer.pad(batch, padding=True, return_tensors="pt").to(self.model.device)
        with torch.inference_mode(), autocast(self.model, self.precision):
            logits = self.model(**padded).logits[:, -1]
        found: Array = logits.float().cpu().numpy()
        return found

    def _short(self, query: str) -> str:
        made = self.tokenizer(query, add_special_tokens=False, return_offsets_mapping=True)
        ends = [int(end) for _, end in made["offset_mapping"]]
        return query if len(ends) <= self.half else query[: ends[self.half - 1]]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Whatever a library says about a folder, as a sentence."""
    try:
        with without_bars(), quiet():
            yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise StepFailed(
            f"{folder} can't be loaded: {error}",
            "its configuration, tokenizer and weights must belong together",
        ) from error
