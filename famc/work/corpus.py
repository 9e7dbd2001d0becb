"""`corpus`: a source becomes clean documents, split once into train and held-out.

In: what `sources` reads. Out: `train.parquet`, `heldout.parquet` (id, group and the columns of the format)
and `stats.json`.

The split is a pure function of seed and group: a group is held out if its draw is below `fraction`. So all
sources of a family that name the same group agree on it, and a larger fraction holds out a superset. A
document without a group, or split `by: document`, is drawn by its content, so copies agree too. Only where
that leaves one side empty are documents drawn instead of groups, and at least one goes to each side;
stats.json then says `fallback`.

Pairs: the same passage on both sides would let training see what evaluation looks for, so such a source is
refused, with the records that hold it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from heapq import nsmallest
from pathlib import Path
from typing import Any

import numpy as np

from famc.errors import StepFailed
from famc.job import Job
from famc.work import sources
from famc.work.filters import FILTERS, Filter
from famc.work.text import (
    COLUMNS,
    Body,
    Pair,
    Record,
    Writer,
    contents,
    digest,
    draw,
    from_columns,
    joined,
    read_rows,
    same,
    size,
    to_columns,
    write_json,
)

_SAMPLES, _SAMPLE_CHARACTERS = 3, 120
_SHOWN = 3  # leaks that a message names


@dataclass
class Count:
    """What one filter saw, let through and dropped."""

    name: str
    seen: int = 0
    dropped: int = 0
    dropped_bytes: int = 0
    samples: list[dict[str, str]] = field(default_factory=list)

    def drop(self, record: Record) -> None:
        self.dropped += 1
        self.dropped_bytes += size(record.body)
        if len(self.samples) < _SAMPLES:
            self.samples.append({"id": record.id, "text": joined(record.body)[:_SAMPLE_CHARACTERS]})

    def stats(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "in": self.seen,
            "out": self.seen - self.dropped,
            "dropped_documents": self.dropped,
            "dropped_bytes": self.dropped_bytes,
            "samples": self.samples,
        }


class Dedup:
    """Exact duplicates. The first copy stays, under the name of a held-out copy where there is one."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self.kept: dict[bytes, tuple[int, bool]] = {}
        self.renamed: dict[int, tuple[str, str]] = {}

    def is_new(self, number: int, record: Record) -> bool:
        key = digest(record.body)[:16]
        held = bool(record.group) and self.split.holds(record.group)
        if key not in self.kept:
            self.kept[key] = (number, held)
            return True
        first, first_held = self.kept[key]
        if held and not first_held:
            self.kept[key] = (first, True)
            self.renamed[first] = (record.id, record.group)
        return False


@dataclass(frozen=True)
class Split:
    """Who is held out."""

    seed: int
    by: str
    fraction: float

    def holds(self, group: str) -> bool:
        """Does a group belong to the held-out side?"""
        return draw(self.seed, group) < self.fraction * 2.0**64

    def unit(self, group: str, body: Body) -> int:
        """The draw of a document: of its group, or of its content."""
        return draw(self.seed, group if self.by == "group" and group else digest(body).hex())

    def sides(self, units: array[int], contents_drawn: array[int]) -> tuple[Any, str | None]:
        """(held-out or not by document, which fallback was needed)."""
        threshold = self.fraction * 2.0**64
        held = np.frombuffer(units, np.uint64).astype(np.float64) < threshold
        if self.fraction == 0 or len(held) < 2 or 0 < held.sum() < len(held):
            return held, None
        drawn = np.frombuffer(contents_drawn, np.uint64)
        held = drawn.astype(np.float64) < threshold
        fallback = "documents drawn instead of groups: one side was empty"
        if held.all():
            held[drawn.argmax()] = False
            fallback = "one document for training: all were held out"
        elif not held.any():
            held[drawn.argmin()] = True
            fallback = "one document held out: there was none"
        return held, fallback


class Leaks:
    """Passages of pairs that are on both sides of the split; copies differ in white space and case at most."""

    def __init__(self) -> None:
        self.first: dict[bytes, tuple[int, bool]] = {}  # passage -> the record that came first, and its side
        self.found: dict[bytes, tuple[int, int]] = {}  # passage -> a record in training, one held out

    def add(self, number: int, is_held: bool, body: Body) -> None:
        """See what a record holds; texts that are no pairs leave nothing."""
        for text in body.positives if isinstance(body, Pair) else ():
            key = hashlib.sha256(same(text).encode()).digest()[:16]
            other, other_held = self.first.setdefault(key, (number, is_held))
            if other_held != is_held:
                self.found.setdefault(key, (other, number) if is_held else (number, other))

    def refuse(self, spool: Path) -> None:
        """StepFailed where there are any: how many, the first of them, and what to do."""
        if not self.found:
            return
        shown = list(self.found.values())[:_SHOWN]
        wanted = {number for pair in shown for number in pair}
        where = {n: _at(row) for n, row in enumerate(read_rows(spool)) if n in wanted}
        examples = "; ".join(f"{where[train]} (train) and {where[held]} (held out)" for train, held in shown)
        more = ", …" if len(self.found) > _SHOWN else ""
        count = f"{len(self.found):,} passage{'s are' if len(self.found) > 1 else ' is'}"
        raise StepFailed(
            f"{count} both in training and held out: {examples}{more}",
            "give records of one passage the same group (group_field: a column that they share, such as the "
            "document, or 'positive' itself) with heldout: {by: group}; or drop the copies",
        )


def _at(row: Mapping[str, Any]) -> str:
    """Where a record stands, and its id where that says something else."""
    return str(row["where"]) if str(row["where"]).endswith(row["id"]) else f"{row['where']} ({row['id']})"


def run(job: Job, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Read, clean, split, write."""
    params = job.params
    split = Split(params["seed"], params["heldout"]["by"], params["heldout"]["fraction"])
    dedup = Dedup(split)
    counts = [Count(name) for name, _ in params["filters"]]
    chain = _chain(params["filters"], dedup)
    columns = COLUMNS.get(params["format"], ())
    spool = out / ".spool.parquet"
    units, drawn = array("Q"), array("Q")
    documents_in = characters_in = bytes_in = 0
    with Writer(spool, ("number", "id", "group", "where", *columns)) as writer:
        for number, record in enumerate(_sampled(params, job.runtime)):
            documents_in += 1
            bytes_in += size(record.body)
            characters_in += sum(map(len, contents(record.body)))
            if documents_in % 500 == 0:
                job.progress(bytes_in, max(bytes_in, params.get("bytes") or 0))
            if _clean(number, record, chain, counts):
                values = to_columns(record.body).values()
                writer.add((str(number), record.id, record.group, record.where, *values))
    rows = _named_rows(spool, dedup)
    for row in rows:
        body = from_columns(row)
        units.append(split.unit(row["group"], body))
        drawn.append(draw(split.seed, digest(body).hex()))
    if not units:
        spool.unlink()
        lost = ", ".join(f"{count.name} dropped {count.dropped}" for count in counts if count.dropped)
        raise StepFailed(f"no document is left of {documents_in}", lost or "the source is empty")
    held, fallback = split.sides(units, drawn)
    sides = {name: {"documents": 0, "bytes": 0, "characters": 0} for name in ("train", "heldout")}
    groups: dict[str, set[str]] = {"train": set(), "heldout": set()}
    leaks = Leaks()
    with (
        Writer(out / "train.parquet", ("id", "group", *columns)) as train,
        Writer(out / "heldout.parquet", ("id", "group", *columns)) as heldout,
    ):
        for index, (is_held, row) in enumerate(zip(held, _named_rows(spool, dedup), strict=True)):
            name, target = ("heldout", heldout) if is_held else ("train", train)
            body = from_columns(row)
            leaks.add(index, bool(is_held), body)
            group = row["group"] or digest(body).hex()[:16]
            target.add((row["id"], group, *(row[column] for column in columns)))
            sides[name]["documents"] += 1
            sides[name]["bytes"] += size(body)
            sides[name]["characters"] += sum(map(len, contents(body)))
            groups[name].add(group)
    leaks.refuse(spool)
    spool.unlink()
    documents_out = len(units)
    bytes_out = sides["train"]["bytes"] + sides["heldout"]["bytes"]
    stats = {
        "documents_in": documents_in,
        "characters_in": characters_in,
        "bytes_in": bytes_in,
        "skipped_files": sources.skipped(params, job.runtime),
        "filters": [count.stats() for count in counts],
        "documents_out": documents_out,
        "bytes_out": bytes_out,
        **{name: {**side, "groups": len(groups[name])} for name, side in sides.items()},
        "heldout_fraction": {
            "asked": split.fraction,
            "documents": round(sides["heldout"]["documents"] / documents_out, 4),
            "bytes": round(sides["heldout"]["bytes"] / max(1, bytes_out), 4),
        },
        "fallback": fallback,
    }
    write_json(out / "stats.json", stats)
    metrics: dict[str, Any] = {
        "documents_in": documents_in,
        "documents_out": documents_out,
        "bytes_in": bytes_in,
        "bytes_out": bytes_out,
        "train_documents": sides["train"]["documents"],
        "heldout_documents": sides["heldout"]["documents"],
        "heldout_fraction": round(sides["heldout"]["documents"] / documents_out, 4),
    }
    for count in counts:
        metrics[f"dropped_{count.name}"] = metrics.get(f"dropped_{count.name}", 0) + count.dropped
    if fallback:
        metrics["fallback"] = fallback
    return metrics


def _chain(filters: list[list[Any]], dedup: Dedup) -> list[Filter | Dedup | None]:
    """The recipe as functions; None lets everything through."""
    chain: list[Filter | Dedup | None] = []
    for name, values in filters:
        if name == "dedup":
            if values.get("minhash"):
                raise StepFailed("no worker removes near duplicates yet", "write {dedup: {exact: true}}")
            chain.append(dedup if values["exact"] else None)
        elif name in FILTERS:
            chain.append(FILTERS[name](values))
        else:
            raise StepFailed(
                f"no worker carries out filter '{name}' yet", f"filters: dedup, {', '.join(FILTERS)}"
            )
    return chain


def _clean(number: int, record: Record, chain: list[Filter | Dedup | None], counts: list[Count]) -> bool:
    """Does a record pass the recipe? Its body is changed on the way."""
    for step, count in zip(chain, counts, strict=True):
        count.seen += 1
        if step is None:
            continue
        if isinstance(step, Dedup):
            if not step.is_new(number, record):
                count.drop(record)
                return False
            continue
        body = step(record.body)
        if body is None:
            count.drop(record)
            return False
        record.body = body
    return True


def _sampled(params: Mapping[str, Any], runtime: Mapping[str, Any]) -> Iterator[Record]:
    """All records, or the `n` with the smallest draws, in the source's order. Reads twice, keeps numbers."""
    n = params.get("n")
    if not n:
        yield from sources.read(params, runtime)
        return
    draws = (
        (draw(params["seed"], record.id), number)
        for number, record in enumerate(sources.read(params, runtime))
    )
    wanted = {number for _, number in nsmallest(n, draws)}
    for number, record in enumerate(sources.read(params, runtime)):
        if number in wanted:
            yield record


def _named_rows(spool: Path, dedup: Dedup) -> Iterator[dict[str, Any]]:
    """What passed the recipe; a document with a held-out copy has that copy's id and group."""
    for row in read_rows(spool):
        number = int(row.pop("number"))
        if number in dedup.renamed:
            row["id"], row["group"] = dedup.renamed[number]
        yield row
