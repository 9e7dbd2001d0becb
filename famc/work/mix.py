"""`mix`: sources by weight, to an exact number of tokens, without what evaluations are made of.

In: `source.NAME` (corpus), `eval.NAME` (corpus, its held-out side), `tokenizer`. Out, text: `tokens.npy`, one
flat stream in which every document ends with <|endoftext|>; messages, preferences and pairs:
`examples.parquet`. Both: `stats.json`.

Documents are shuffled by seed, source and epoch, and interleaved: next is always the source furthest behind
its share.

Text. `tokens` given: exactly so many; the last document of each source is cut. Else: every document once.
Examples. `tokens` given: by weight until each share of tokens (conversation as rendered) is reached, whole
examples. Else: one source: every example once; several: in the weights' proportions, the scale such that
every example is read at least once, or as near to that as no source's `max_epochs` allows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from famc.errors import StepFailed
from famc.job import Job
from famc.work.decontaminate import HeldOut, dropped
from famc.work.text import (
    COLUMNS,
    Body,
    Pair,
    Writer,
    contents,
    from_columns,
    limit_threads,
    size,
    write_json,
)
from famc.work.tokenizer import END_OF_TEXT, load

Array = np.ndarray[Any, np.dtype[Any]]
Lengths = Callable[[Sequence[int]], list[int]]

_CHUNK = 1_000_000  # characters that are encoded at once
_EXAMPLES = 3  # of dropped documents, in stats.json


def run(job: Job, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Read, decontaminate, draw, interleave, write."""
    limit_threads(job.threads)
    params = job.params
    fmt, weights = params["format"], dict(params["weights"])
    if fmt not in COLUMNS:
        raise StepFailed(f"no worker mixes data of format '{fmt}' yet", f"formats: {', '.join(COLUMNS)}")
    tiered = [key for key in weights if "." in key]
    if tiered:
        raise StepFailed(
            f"no worker makes tiers yet: weight '{tiered[0]}'", f"write {tiered[0].partition('.')[0]}"
        )
    if params.get("lengths"):
        raise StepFailed("no worker mixes by length yet", "leave lengths out")
    weights = {name: weight for name, weight in weights.items() if weight > 0}
    if not weights:
        raise StepFailed("the mix has no source with a weight above 0")
    sources = [Source(name, inputs[f"source.{name}"], fmt, params["seed"]) for name in weights]
    stats: dict[str, Any] = {"decontaminated": _decontaminate(params, sources, inputs)}
    for source in sources:
        if not source.kept:
            raise StepFailed(
                f"source '{source.name}' has no training {'document' if fmt == 'text' else 'example'} left",
                f"{len(source.dropped)} share text with evaluations; see its filters and held-out share",
            )
    if fmt == "text":
        metrics = _text(job, sources, weights, inputs["tokenizer"], out)
    else:
        metrics = _examples(job, sources, weights, inputs.get("tokenizer"), out)
    write_json(out / "stats.json", stats | metrics)
    lost = sum(len(source.dropped) for source in sources)
    seen = sum(len(source) for source in sources)
    return metrics | {"dropped_contaminated": lost, "dropped_share": round(lost / max(1, seen), 4)}


class Source:
    """The training side of a source: rows by number, which are used, and their order in each epoch."""

    def __init__(self, name: str, folder: Path, fmt: str, seed: int) -> None:
        self.name, self.fmt, self.seed = name, fmt, seed
        self.table = pq.read_table(folder / "train.parquet")
        missing = [column for column in COLUMNS[fmt] if column not in self.table.column_names]
        if missing:
            raise StepFailed(f"source '{name}' has no column '{missing[0]}': it is not of format {fmt}")
        self.columns = {c: self.table.column(c) for c in self.table.column_names}
        self.kept = list(range(len(self)))
        self.dropped: list[tuple[int, str]] = []  # number, the words it shares
        self.dropped_bytes = 0

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def value(self, column: str, number: int) -> str:
        return str(self.columns[column][number].as_py())

    def body(self, number: int) -> Body:
        return from_columns({column: self.value(column, number) for column in COLUMNS[self.fmt]})

    def rows(self) -> Iterator[tuple[str, Body]]:
        """(group, body) of every row, in order."""
        for number in range(len(self)):
            yield self.value("group", number), self.body(number)

    def order(self, epoch: int) -> list[int]:
        """The rows that are used, shuffled by seed, source and epoch alone."""
        entropy = hashlib.sha256(f"{self.seed}:{self.name}:{epoch}".encode()).digest()
        generator = np.random.Generator(np.random.PCG64(int.from_bytes(entropy[:16], "big")))
        return [self.kept[i] for i in generator.permutation(len(self.kept))]


# --- what evaluations are made of ---------------------------------------------------------------------------


def _decontaminate(
    params: Mapping[str, Any], sources: list[Source], inputs: Mapping[str, Path]
) -> dict[str, Any]:
    """Take contaminated rows out of the sources; what happened."""
    rule = params.get("decontaminate")
    if not rule or not rule["against"]:
        return {"against": []}
    held = HeldOut(rule["ngram"])
    for name in rule["against"]:
        held.add(inputs[f"eval.{name}"] / "heldout.parquet")
    found, common = dropped(held, [source.rows() for source in sources])
    report: dict[str, Any] = {
        "against": list(rule["against"]),
        "ngram": rule["ngram"],
        "heldout_texts": held.texts,
        "common_ngrams": common,  # boilerplate: no evidence
        "sources": {},
    }
    for source, hits in zip(sources, found, strict=True):
        source.dropped = sorted(hits.items())
        source.kept = [number for number in source.kept if number not in hits]
        source.dropped_bytes = sum(size(source.body(number)) for number in hits)
        report["sources"][source.name] = {
            "documents": len(source),
            "dropped": len(hits),
            "dropped_bytes": source.dropped_bytes,
            "examples": [
                {"id": source.value("id", number), "shared": words}
                for number, words in source.dropped[:_EXAMPLES]
            ],
        }
    return report


# --- drawing ------------------------------------------------------------------------------------------------


@dataclass
class Drawn:
    """Rows of one source in the order in which they are read, and how long each is."""

    source: Source
    order: list[int] = field(default_factory=list)
    tokens: int = 0
    once: int | None = None  # tokens of one epoch, once all of it has been measured

    @property
    def epochs(self) -> float:
        """How often the source is read."""
        return round(self.tokens / self.once if self.once else len(self.order) / len(self.source.kept), 4)


def _draw(source: Source, quota: int, lengths: Lengths, max_epochs: float) -> Drawn:
    """Shuffled epochs of a source until `quota` tokens are reached; stops where `max_epochs` forbids that."""
    drawn = Drawn(source)
    measured: dict[int, int] = {}
    epoch = 0
    if max_epochs < 1:  # all of it has to be known: too much can be asked for before it is read once
        for chunk in _chunks(source, source.order(0)):
            measured.update(zip(chunk, lengths(chunk), strict=True))
    while drawn.tokens < quota:
        order = source.order(epoch)
        for chunk in _chunks(source, order) if epoch == 0 else [order]:
            if chunk[0] not in measured:
                measured.update(zip(chunk, lengths(chunk), strict=True))
            for number in chunk:
                drawn.order.append(number)
                drawn.tokens += measured[number]
                if drawn.tokens >= quota:
                    break
            if drawn.tokens >= quota:
                break
        if len(measured) == len(source.kept):
            drawn.once = sum(measured.values())
            if quota > max_epochs * drawn.once:
                break
        epoch += 1
    return drawn


def _draw_all(
    sources: list[Source],
    weights: Mapping[str, float],
    tokens: int,
    lengths: Callable[[Source], Lengths],
    max_epochs: float,
) -> tuple[list[Drawn], dict[str, int]]:
    """Every source to its share of `tokens`. Raises StepFailed naming the sources that are too small."""
    shares = split_exactly(tokens, weights)
    drawn = [_draw(source, shares[source.name], lengths(source), max_epochs) for source in sources]
    short = [d for d in drawn if d.once is not None and shares[d.source.name] > max_epochs * d.once]
    if short:
        once = {d.source.name: d.once or 0 for d in short}
        worst = min(once, key=lambda name: once[name] / weights[name])
        works = int(min(max_epochs * n * sum(weights.values()) / weights[name] for name, n in once.items()))
        while works and any(split_exactly(works, weights)[name] > max_epochs * n for name, n in once.items()):
            works -= 1
        raise StepFailed(
            f"source '{worst}' has {once[worst]:,} tokens, {shares[worst]:,} are asked for: it would be read"
            f" {shares[worst] / once[worst]:.2f} times, max_epochs is {max_epochs:g}",
            f"tokens: {works} works with these weights; or lower its weight, raise max_epochs, or add data",
        )
    return drawn, shares


def split_exactly(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Whole shares that add up to `total`: rounded down, what is left to the largest remainders."""
    scale = total / sum(weights.values())
    shares = {name: int(weight * scale) for name, weight in weights.items()}
    left = total - sum(shares.values())
    by_remainder = sorted(weights, key=lambda name: shares[name] - weights[name] * scale)
    for name in by_remainder[:left]:
        shares[name] += 1
    return shares


def interleave(lengths: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """(source, position): next is the source furthest behind its share; among equals the first."""
    totals = [sum(each) for each in lengths]
    whole = sum(totals)
    at, given, done = [0] * len(lengths), [0] * len(lengths), 0
    for _ in range(sum(map(len, lengths))):
        source = max(
            (s for s in range(len(lengths)) if at[s] < len(lengths[s])),
            key=lambda s: (totals[s] * done - given[s] * whole, -s),
        )
        yield source, at[source]
        length = lengths[source][at[source]]
        at[source] += 1
        given[source] += length
        done += length


def _chunks(source: Source, order: list[int]) -> Iterator[list[int]]:
    """Rows in runs of about _CHUNK characters."""
    chunk: list[int] = []
    waiting = 0
    for number in order:
        chunk.append(number)
        waiting += sum(len(source.value(column, number)) for column in COLUMNS[source.fmt])
        if waiting >= _CHUNK:
            yield chunk
            chunk, waiting = [], 0
    if chunk:
        yield chunk


# --- text ---------------------------------------------------------------------------------------------------


class Encoder:
    """Documents as ids, each encoded once and kept."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.encode_special_tokens = True  # <|endoftext|> inside a document is text, not its end
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        end = self.tokenizer.token_to_id(END_OF_TEXT)
        self.end = int(
            load(folder).eos_token_id if end is None else end
        )  # adopted: another token may end text
        highest = max(self.tokenizer.get_vocab(with_added_tokens=True).values())
        self.dtype = np.dtype(np.uint16 if highest < 2**16 else np.uint32)
        self.documents: dict[tuple[str, int], Array] = {}
        self.bytes: dict[tuple[str, int], int] = {}

    def lengths(self, source: Source) -> Lengths:
        """Encodes rows of a source; how many tokens each has, its end included."""

        def measure(numbers: Sequence[int]) -> list[int]:
            texts = [source.value("text", number) for number in numbers]
            encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            result = []
            for number, text, encoding in zip(numbers, texts, encoded, strict=True):
                ids = np.array([*encoding.ids, self.end], self.dtype)
                self.documents[source.name, number] = ids
                self.bytes[source.name, number] = size(text)
                result.append(len(ids))
            return result

        return measure


def _text(
    job: Job, sources: list[Source], weights: Mapping[str, float], folder: Path, out: Path
) -> dict[str, Any]:
    encoder = Encoder(folder)
    tokens = job.params["tokens"]
    if tokens:
        drawn, shares = _draw_all(sources, weights, tokens, encoder.lengths, job.params["max_epochs"])
    else:
        drawn = []
        for source in sources:
            measured = {
                n: size
                for c in _chunks(source, source.order(0))
                for n, size in zip(c, encoder.lengths(source)(c), strict=True)
            }
            once = sum(measured.values())
            drawn.append(Drawn(source, list(measured), once, once))
        shares = {d.source.name: d.tokens for d in drawn}
        tokens = sum(shares.values())
    job.progress(0.5 * tokens, tokens)
    lengths = []
    for d in drawn:
        each = [len(encoder.documents[d.source.name, number]) for number in d.order]
        if each:  # a source's share may be no token at all
            each[-1] -= d.tokens - shares[d.source.name]
        d.tokens = shares[d.source.name]
        lengths.append(each)
    stream = np.lib.format.open_memmap(out / "tokens.npy", mode="w+", dtype=encoder.dtype, shape=(tokens,))
    at, text_bytes = 0, 0.0
    for which, position in interleave(lengths):
        d, length = drawn[which], lengths[which][position]
        key = d.source.name, d.order[position]
        ids = encoder.documents[key]
        stream[at : at + length] = ids[:length]
        stream[at + length - 1] = encoder.end  # also of a document that was cut
        text_bytes += encoder.bytes[key] * length / len(ids)
        at += length
    stream.flush()
    job.progress(tokens, tokens)
    documents = sum(len(d.order) for d in drawn)
    return {
        "tokens": tokens,
        "documents": documents,
        "bytes": round(text_bytes),
        "bytes_per_token": round(text_bytes / tokens, 4),
        "tokens_by_source": shares,
        "documents_by_source": {d.source.name: len(d.order) for d in drawn},
        "epochs": {d.source.name: d.epochs for d in drawn},
        "end_id": encoder.end,
        "dtype": str(encoder.dtype),
    }


# --- examples -----------------------------------------------------------------------------------------------


def _examples(
    job: Job, sources: list[Source], weights: Mapping[str, float], folder: Path | None, out: Path
) -> dict[str, Any]:
    tokens, max_epochs = job.params["tokens"], job.params["max_epochs"]
    measured: dict[tuple[str, int], int] = {}
    if tokens:
        assert folder is not None  # the graph gives a mix with `tokens` the tokenizer
        drawn, _ = _draw_all(sources, weights, tokens, _rendered_lengths(folder, measured), max_epochs)
        lengths = [[measured[d.source.name, number] for number in d.order] for d in drawn]
    else:
        counts = proportional({s.name: len(s.kept) for s in sources}, weights, max_epochs)
        drawn = [
            _draw(s, counts[s.name], lambda numbers: [1] * len(numbers), max_epochs + 1) for s in sources
        ]
        lengths = [[1] * len(d.order) for d in drawn]
    columns = COLUMNS[job.params["format"]]
    text_bytes = 0
    with Writer(out / "examples.parquet", ("id", "group", "source", *columns)) as writer:
        for which, position in interleave(lengths):
            source, number = drawn[which].source, drawn[which].order[position]
            text_bytes += size(source.body(number))
            values = (source.value(column, number) for column in columns)
            writer.add((source.value("id", number), source.value("group", number), source.name, *values))
    metrics: dict[str, Any] = {
        "documents": sum(len(d.order) for d in drawn),
        "bytes": text_bytes,
        "documents_by_source": {d.source.name: len(d.order) for d in drawn},
        "epochs": {d.source.name: d.epochs for d in drawn},
    }
    if tokens:
        total = sum(map(sum, lengths))
        metrics |= {"tokens": total, "bytes_per_token": round(text_bytes / max(1, total), 4)}
    return metrics


def proportional(sizes: Mapping[str, int], weights: Mapping[str, float], max_epochs: float) -> dict[str, int]:
    """Examples by source: all of each where proportions and `max_epochs` allow it, else what they do."""
    whole = max(n / weights[name] for name, n in sizes.items())
    most = min(max_epochs * n / weights[name] for name, n in sizes.items())
    # 1e-9: a product like 0.1 * (7 / 0.1) may fall just short of the whole number that it means
    return {name: max(1, int(min(whole, most) * weights[name] + 1e-9)) for name in sizes}


def _rendered_lengths(folder: Path, measured: dict[tuple[str, int], int]) -> Callable[[Source], Lengths]:
    """Tokens of conversations as the chat template renders them; of a preference, with the chosen answer; of a
    pair, of its query and all its passages."""
    tokenizer = load(folder)

    def rendered(body: Body) -> int:
        assert not isinstance(body, str)
        if isinstance(body, Pair):
            encoded = tokenizer(contents(body), add_special_tokens=False, return_attention_mask=False)
            return sum(map(len, encoded["input_ids"]))
        messages = body if isinstance(body, list) else [*body["prompt"], *body["chosen"]]
        return len(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])

    def of(source: Source) -> Lengths:
        def measure(numbers: Sequence[int]) -> list[int]:
            result = []
            for number in numbers:
                measured[source.name, number] = tokens = rendered(source.body(number))
                result.append(tokens)
            return result

        return measure

    return of
