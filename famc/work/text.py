"""What the data workers share: bodies of records, parquet files whose bytes repeat, draws that all agree on.

A body is text, a conversation, a preference (prompt, chosen, rejected: each a list of messages), or a query
with its passages. On disk every column is a string: text as it is, messages and lists of passages as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Pair:
    """A query, the passages that answer it, at least one, and passages that are known not to."""

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()


Body = str | list[Message] | dict[str, list[Message]] | Pair

# format -> the columns that hold its body
COLUMNS = {
    "text": ("text",),
    "messages": ("messages",),
    "preference": ("prompt", "chosen", "rejected"),
    "pairs": ("query", "positives", "negatives"),
}

_ROW_GROUP_BYTES, _ROW_GROUP_ROWS = 8_000_000, 4096


@dataclass(slots=True)
class Record:
    """One document or example. group: never split over train and held-out; empty: the document's own."""

    id: str
    group: str
    body: Body
    where: str  # file:line, for messages to the user


def contents(body: Body) -> list[str]:
    """Every text of a body, in order."""
    if isinstance(body, str):
        return [body]
    if isinstance(body, Pair):
        return [body.query, *body.positives, *body.negatives]
    messages = body if isinstance(body, list) else [m for part in body.values() for m in part]
    return [message["content"] for message in messages]


def joined(body: Body) -> str:
    """A body as plain text."""
    return "\n".join(contents(body))


def mapped(body: Body, change: Callable[[str], str]) -> Body:
    """A body with every text changed."""
    if isinstance(body, str):
        return change(body)
    if isinstance(body, Pair):
        return Pair(
            change(body.query), tuple(map(change, body.positives)), tuple(map(change, body.negatives))
        )
    if isinstance(body, list):
        return [{"role": m["role"], "content": change(m["content"])} for m in body]
    return {
        part: [{"role": m["role"], "content": change(m["content"])} for m in ms] for part, ms in body.items()
    }


def size(body: Body) -> int:
    """UTF-8 bytes of the texts of a body."""
    return sum(len(text) if text.isascii() else len(text.encode()) for text in contents(body))


def to_columns(body: Body) -> dict[str, str]:
    """A body as its columns on disk."""
    if isinstance(body, str):
        return {"text": body}
    if isinstance(body, Pair):
        sides = {"positives": dumps(body.positives), "negatives": dumps(body.negatives)}
        return {"query": body.query, **sides}
    return (
        {"messages": dumps(body)}
        if isinstance(body, list)
        else {part: dumps(ms) for part, ms in body.items()}
    )


def from_columns(row: dict[str, Any]) -> Body:
    """The body that a row on disk holds; its format is that of its columns."""
    if "text" in row:
        return str(row["text"])
    if "messages" in row:
        messages: list[Message] = json.loads(row["messages"])
        return messages
    if "query" in row:
        return Pair(
            str(row["query"]), tuple(json.loads(row["positives"])), tuple(json.loads(row["negatives"]))
        )
    return {part: json.loads(row[part]) for part in COLUMNS["preference"]}


def digest(body: Body) -> bytes:
    """sha256 of a body: of its text, or of its canonical JSON; of a pair without its negatives, which only
    accompany it."""
    if isinstance(body, Pair):
        text = dumps([body.query, body.positives])
    else:
        text = body if isinstance(body, str) else dumps(body)
    return hashlib.sha256(text.encode()).digest()


def same(text: str) -> str:
    """What is left of a text where white space and case do not count: equal for copies."""
    return " ".join(text.casefold().split())


def dumps(value: Any) -> str:
    """Compact JSON in which equal values have equal bytes (messages are always made role first)."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def write_json(path: Path, value: Any) -> None:
    """Readable JSON."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def draw(seed: int, key: str) -> int:
    """A number below 2**64 that depends on seed and key alone: no library's generator, no PYTHONHASHSEED."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big")


def limit_threads(threads: int) -> None:
    """Threads of the tokenizers library, before it makes its pool."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"


class Writer:
    """A parquet file of string columns, row group by row group; those in `numbers` hold float64."""

    def __init__(self, path: Path, columns: tuple[str, ...], numbers: tuple[str, ...] = ()) -> None:
        self.columns = columns
        types = {name: pa.float64() if name in numbers else pa.string() for name in columns}
        self.schema = pa.schema([pa.field(name, type_, nullable=False) for name, type_ in types.items()])
        self.writer = pq.ParquetWriter(
            path,
            self.schema,
            compression="zstd",
            compression_level=3,
            use_dictionary=False,
            store_schema=False,
        )
        self.rows: list[tuple[str | float, ...]] = []
        self.bytes = 0

    def add(self, row: tuple[str | float, ...]) -> None:
        """Append a row, given in the order of the columns."""
        self.rows.append(row)
        self.bytes += sum(len(value) if isinstance(value, str) else 8 for value in row)
        if self.bytes >= _ROW_GROUP_BYTES or len(self.rows) >= _ROW_GROUP_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting as one row group."""
        if self.rows:
            columns = zip(self.schema, zip(*self.rows, strict=True), strict=True)
            arrays = [pa.array(values, column.type) for column, values in columns]
            self.writer.write_table(pa.Table.from_arrays(arrays, schema=self.schema))
            self.rows, self.bytes = [], 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.flush()
        self.writer.close()


def read_rows(path: Path, columns: tuple[str, ...] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, a batch in memory at a time."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=512, columns=list(columns) if columns else None):
            yield from batch.to_pylist()
