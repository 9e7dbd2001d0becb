"""A built variant that answers texts: `python -m famc.work.attempt REQUEST.json`, loaded once, one line a text.

In: a request (famc.attempt.Request as JSON); then on stdin lines `{"text": …}`. Out, a line each: what is being done
(`doing`), `{"ready": true}` once, and for each text its answer: `results` or `answer`; `refused` for a text that can't
be asked, `failed` if something broke, each with a `hint`. Greedy everywhere: the same text gets the same answer.

Passages are the positives and negatives of every pair, train and held-out, each once. Their vectors are kept in float16,
the same on the first search as on those that find them kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from famc.errors import FamcError, StepFailed, UsageError
from famc.steps.exports import CONVERTING, FILLING, RANKING, TEXT, VECTORS
from famc.work.scores import read_json
from famc.work.text import limit_threads, read_rows

Array = np.ndarray[Any, np.dtype[Any]]
Tell = Callable[[str], None]
Request = Mapping[str, Any]

MASK = "<|mask|>"  # how a user writes the gap, whatever the tokenizer calls it
NEAR_ONE = 0.01  # of a kept vector's length: float16 loses less than a thousandth
_BATCH = 32
PACKAGES = {"bm25s": "bm25s", "sentence_transformers": "sentence-transformers", "onnxruntime": "onnxruntime"}


class Subject(Protocol):
    """A loaded model."""

    def __call__(self, text: str) -> dict[str, Any]:
        """The answer to a text. UsageError for one that can't be asked."""
        ...


# --- passages -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Passage:
    """What is found, and the pair that brought it."""

    id: str
    source: str
    text: str


def passages_of(corpora: Mapping[str, str]) -> list[Passage]:
    """Every passage of the corpora once, in their order; what answers a query stands before what is known not to."""
    from famc.work.search import Corpus

    found: list[Passage] = []
    for column in ("positives", "negatives"):
        for source, folder in corpora.items():
            for side in ("train", "heldout"):
                for row in read_rows(Path(folder) / f"{side}.parquet", ("id", column)):
                    found += [Passage(str(row["id"]), source, text) for text in json.loads(row[column])]
    corpus = Corpus.of(passage.text for passage in found)
    first: dict[int, Passage] = {}
    for passage in found:
        if passage.text.strip():
            first.setdefault(corpus.number(passage.text), passage)
    if not first:
        raise StepFailed(
            f"{', '.join(corpora)}: no passage to search", "look at its records, and at what its filters drop"
        )
    return [first[number] for number in range(len(corpus))]


def kept(path: Path | None, shape: tuple[int, int], make: Callable[[], Array], tell: Tell) -> Array:
    """Vectors of unit length in float16: those of the file if it holds such, else made and kept there. A file that is
    damaged is made again; one that can't be written is told, and nothing is lost by it."""
    if path is not None and (found := _vectors(path, shape)) is not None:
        return found
    made = make().astype(np.float16)
    if path is not None:
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                np.save(file, made, allow_pickle=False)
            partial.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            tell(f"vectors are not kept: {path}: {error.strerror or error}")
    return made


def _vectors(path: Path, shape: tuple[int, int]) -> Array | None:
    """A file's vectors; None if it isn't there, or holds something else."""
    try:
        found = np.load(path, allow_pickle=False)
    except Exception:  # numpy has one for each way a file can be damaged
        return None
    if not isinstance(found, np.ndarray) or found.dtype != np.float16 or found.shape != shape:
        return None
    lengths = np.linalg.norm(found.astype(np.float32), axis=1)
    return found if bool((np.abs(lengths - 1.0) < NEAR_ONE).all()) else None


# --- search -------------------------------------------------------------------------------------------------


class Finder:
    """The family's passages, ranked by an embedder, by BM25, or by both."""

    def __init__(self, request: Request, tell: Tell) -> None:
        from famc.work.search import cut

        self.by, self.depth = str(request["by"]), int(request["depth"])
        self.passages = passages_of(request["corpora"])
        texts = [passage.text for passage in self.passages]
        self.words = None
        if self.by != "embedder":
            from famc.work.bm25 import Bm25

            tell(f"indexing {len(texts):,} passages")
            self.words = Bm25(texts)
        self.embedder: Any = None
        if self.by != "bm25":
            folder, threads = Path(request["retriever"]), int(request["threads"])
            tell("loading the embedder")
            self.embedder = _embedder(request, folder, threads)
            width = int(read_json(folder / "config.json")["hidden_size"])
            self.width = min(int(request["dims"]) or width, width)

            def make() -> Array:
                tell(f"encoding {len(texts):,} passages")

                def progress(share: float) -> None:
                    tell(f"encoding {len(texts):,} passages: {share:.0%}")

                made: Array = self.embedder.passages(texts, progress)
                return made

            path = Path(request["cache"]) if request["cache"] else None
            whole = kept(path, (len(texts), width), make, tell).astype(np.float32)
            self.vectors = cut(whole, self.width)

    def __call__(self, query: str, depth: int) -> list[tuple[int, float]]:
        """(passage, score) of the best, best first."""
        from famc.work.search import by_words, cut, fuse, fused, nearest

        rankings: list[tuple[Array, Array]] = []
        if self.embedder is not None:
            vector = cut(np.asarray(self.embedder.queries([query]), np.float32), self.width)
            best, cosines = next(nearest(vector, self.vectors, depth))
            if self.words is None:
                return list(zip(best.tolist(), cosines.tolist(), strict=True))
            rankings.append((best, cosines))
        assert self.words is not None
        if self.embedder is None:
            best, scores = self.words.top(query, depth)
            return [(int(n), float(s)) for n, s in zip(best, scores, strict=True) if s > 0]
        rankings.append(by_words(self.words, query, depth))
        total = fuse(rankings, len(self.passages))
        return [(int(number), float(total[number])) for number in fused(rankings, len(self.passages), depth)]

    def result(self, rank: int, number: int, score: float) -> dict[str, Any]:
        """A line of an answer."""
        found = self.passages[number]
        return {
            "rank": rank, "score": round(score, 6), "id": found.id, "source": found.source, "text": found.text
        }  # fmt: skip


class Search:
    """An embedder."""

    def __init__(self, request: Request, tell: Tell) -> None:
        self.find, self.k = Finder(request, tell), int(request["k"])

    def __call__(self, text: str) -> dict[str, Any]:
        found = self.find(text, max(self.find.depth, self.k))[: self.k]
        results = [self.find.result(rank, *item) for rank, item in enumerate(found, 1)]
        return {"results": results, "passages": len(self.find.passages)}


class Rerank:
    """A reranker behind its first stage."""

    def __init__(self, request: Request, tell: Tell) -> None:
        from famc.work.search import Reranker

        self.find, self.k = Finder(request, tell), int(request["k"])
        tell("loading the reranker")
        folder, threads = Path(request["model"]), int(request["threads"])
        self.score = (
            OnnxReranker(folder, Path(request["graph"]), threads)
            if request["graph"]
            else Reranker(folder, threads)
        )

    def __call__(self, text: str) -> dict[str, Any]:
        found = [number for number, _ in self.find(text, max(self.find.depth, self.k))][: self.find.depth]
        texts = [self.find.passages[number].text for number in found]
        scores = np.asarray(self.score.scores(text, texts), np.float64) if texts else np.empty(0)
        order = np.lexsort((np.arange(len(found)), -scores))[: self.k].tolist()
        results = [
            {**self.find.result(rank, found[at], float(scores[at])), "before": at + 1}
            for rank, at in enumerate(order, 1)
        ]
        return {"results": results, "passages": len(self.find.passages)}


class OnnxEmbedder:
    """A released graph of an embedder, with the prompts that its files name."""

    def __init__(self, folder: Path, graph: Path, threads: int) -> None:
        self.run = _Graph(folder, graph, threads, "feature-extraction")
        from famc.work.encoder_session import prompts_of

        self.prompts = prompts_of(folder)

    def queries(self, texts: Sequence[str], progress: Callable[[float], None] = lambda share: None) -> Array:
        """[texts, width] vectors of questions."""
        return self._vectors(texts, self.prompts.get("query", ""), progress)

    def passages(self, texts: Sequence[str], progress: Callable[[float], None] = lambda share: None) -> Array:
        """[texts, width] vectors of what is searched."""
        return self._vectors(texts, self.prompts.get("document", ""), progress)

    def _vectors(self, texts: Sequence[str], prompt: str, progress: Callable[[float], None]) -> Array:
        made = self.run([prompt + text for text in texts], None, progress)
        lengths = np.linalg.norm(made, axis=1, keepdims=True)
        unit: Array = made / np.maximum(lengths, 1e-12)
        return unit


class OnnxReranker:
    """A released graph of a reranker."""

    def __init__(self, folder: Path, graph: Path, threads: int) -> None:
        self.run = _Graph(folder, graph, threads, "text-ranking")

    def scores(self, query: str, passages: Sequence[str]) -> Array:
        """How well each passage answers the query."""
        found: Array = self.run([query] * len(passages), passages, lambda share: None)[:, -1]
        return found


class _Graph:
    """A graph with the tokenizer that is released beside it. Texts of like length run together."""

    def __init__(self, folder: Path, graph: Path, threads: int, task: Any) -> None:
        from famc.work.encoder_session import OnnxEncoder, longest
        from famc.work.likelihood import load_tokenizer

        self.session = OnnxEncoder(graph, threads, task)
        self.tokenizer = load_tokenizer(folder)
        positions = int(read_json(folder / "config.json")["max_position_embeddings"])
        self.limit = longest(self.tokenizer, positions, positions)

    def __call__(
        self, texts: Sequence[str], others: Sequence[str] | None, progress: Callable[[float], None]
    ) -> Array:
        from famc.work.encoder_session import encode

        sizes = [len(text) + (len(others[i]) if others is not None else 0) for i, text in enumerate(texts)]
        order = sorted(range(len(texts)), key=lambda i: (-sizes[i], i))
        rows: list[Array] = [np.empty(0)] * len(texts)
        for at in range(0, len(order), _BATCH):
            part = order[at : at + _BATCH]
            beside = None if others is None else [others[i] for i in part]
            batch = encode(self.tokenizer, [texts[i] for i in part], beside, max_length=self.limit)
            for index, row in zip(part, self.session.outputs(batch), strict=True):
                rows[index] = row
            progress((at + len(part)) / len(order))
        return np.stack(rows).astype(np.float32)


def _embedder(request: Request, folder: Path, threads: int) -> Any:
    """The graph if the variant itself is tried as one, else the weights."""
    if request["graph"] and request["task"] == VECTORS:
        return OnnxEmbedder(folder, Path(request["graph"]), threads)
    from famc.work.search import Embedder

    return Embedder(folder, None, threads)


# --- text ---------------------------------------------------------------------------------------------------


class _Model:
    """A model folder with its own tokenizer: what is released."""

    def __init__(self, request: Request, tell: Tell) -> None:
        from famc.work.arch import load_fitting
        from famc.work.likelihood import end_ids, load_tokenizer

        tell("loading the model")
        folder = Path(request["model"])
        self.model = load_fitting(folder, int(request["threads"]))
        self.tokenizer = load_tokenizer(folder)
        self.ends = end_ids(self.tokenizer)
        self.context, self.limit = int(request["context"]), int(request["max_new_tokens"])
        self.k, self.chat = int(request["k"]), bool(request["chat"])

    def fits(self, tokens: int, room: int = 0) -> None:
        """UsageError for a text that is longer than the model reads."""
        if tokens + room > self.context:
            left = f" and says at least {room}" if room else ""
            raise UsageError(
                f"the text has {tokens:,} tokens; the model reads {self.context:,}{left}", "make it shorter"
            )

    def said(self, new: Sequence[int], *, special: bool = False) -> dict[str, Any]:
        """New tokens as text; `ended` by the model itself, not by the limit."""
        ids = [token for token in new if token not in self.ends]
        text = self.tokenizer.decode(ids, skip_special_tokens=not special)
        return {"answer": text, "tokens": len(new), "ended": bool(new) and new[-1] in self.ends}


class Speaker(_Model):
    """A language model: an answer through the chat template, or a text that goes on."""

    def __call__(self, text: str) -> dict[str, Any]:
        from famc.work.generate import greedy
        from famc.work.likelihood import document_start, encode_prompt

        if self.chat:
            ids = encode_prompt(self.tokenizer, [{"role": "user", "content": text}])
        else:
            start = document_start(self.tokenizer)
            ids = [start, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        self.fits(len(ids), 1)
        limit = min(self.limit, self.context - len(ids))
        made = self.said(greedy(self.model, [ids], limit, self.ends)[0])
        return made | ({} if self.chat else {"continues": True})


class Converter(_Model):
    """An encoder and decoder: one text in, another out. One that only learnt to fill gaps says what stands in each."""

    def __call__(self, text: str) -> dict[str, Any]:
        import torch

        from famc.work.seq2seq import encode_source
        from famc.work.seq2seq_eval import greedy

        ids = encode_source(self.tokenizer, text, 2**31)
        self.fits(len(ids))
        row = torch.tensor(ids)
        (new,) = greedy(self.model, [row], self.limit, sorted(self.ends), lambda share: None)
        return self.said(new, special=MASK in text)


class Filler(_Model):
    """A masked language model: the most likely tokens at each gap."""

    def __call__(self, text: str) -> dict[str, Any]:
        import torch

        mask = str(self.tokenizer.mask_token or MASK)
        text = text.replace(MASK, mask)
        made = self.tokenizer(text, return_tensors="pt")
        ids = made["input_ids"][0]
        gaps = torch.nonzero(ids == self.tokenizer.convert_tokens_to_ids(mask))[:, 0].tolist()
        if not gaps:
            raise UsageError(
                f"the text has no gap to fill: write {MASK} where a word is missing",
                f"e.g. 'the lock is {MASK} by the thread'",
            )
        self.fits(len(ids))
        with torch.inference_mode():
            logits = self.model(**made.to(self.model.device)).logits[0]
        results = []
        for gap, at in enumerate(gaps, 1):
            shares = torch.softmax(logits[at].float(), -1)
            # rows of the table beyond the tokenizer's words are padding, and name nothing
            best = torch.topk(shares[: len(self.tokenizer)], min(self.k, len(self.tokenizer)))
            for rank, (share, token) in enumerate(
                zip(best.values.tolist(), best.indices.tolist(), strict=True), 1
            ):
                word = self.tokenizer.decode([token])
                results.append({"gap": gap, "rank": rank, "score": round(share, 6), "text": word})
        return {"results": results}


SUBJECTS: dict[str, Callable[[Request, Tell], Subject]] = {
    VECTORS: Search, RANKING: Rerank, TEXT: Speaker, CONVERTING: Converter, FILLING: Filler,
}  # fmt: skip


# --- process ------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Load what the request file names, then answer line by line until stdin ends."""
    if len(argv) != 1:
        print("usage: python -m famc.work.attempt REQUEST.json", file=sys.stderr)
        return 2
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command line ends this process
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer

    def say(value: Mapping[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    request = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    limit_threads(int(request["threads"]))
    subject: list[Subject] = []

    def load() -> dict[str, Any]:
        subject.append(SUBJECTS[request["task"]](request, lambda text: say({"doing": text})))
        return {"ready": True}

    say(_told(load))
    if not subject:
        return 1
    for line in sys.stdin:
        text = json.loads(line)["text"]
        say(_told(lambda text=text: _ask(subject[0], text)))  # type: ignore[misc]
    return 0


def _ask(subject: Subject, text: str) -> dict[str, Any]:
    if not text.strip():
        raise UsageError("the text is empty", "write what to ask")
    return subject(text)


def _told(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What work gives, or what went wrong: a user's mistake, a step's, or a bug, whose traceback is in the log."""
    try:
        return work()
    except UsageError as error:
        return {"refused": error.message, "hint": error.hint}
    except FamcError as error:
        return {"failed": error.message, "hint": error.hint}
    except ModuleNotFoundError as error:
        name = (error.name or str(error)).partition(".")[0]
        package = PACKAGES.get(name, name)
        return {"failed": f"{package} is not installed", "hint": f"pip install {package}"}
    except MemoryError:
        return {"failed": "not enough memory", "hint": "try a smaller size"}
    except Exception as error:
        traceback.print_exc()
        lines = f"{type(error).__name__}: {error}".strip().splitlines()
        return {"failed": lines[0], "hint": "a bug of famc, or a damaged artifact: famc verify tells which"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
