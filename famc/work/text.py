"""What the data workers share: bodies of records, parquet files whose bytes repeat, draws that all agree on.

A body is text, a conversation, or a preference (prompt, chosen, rejected: each a list of messages). On disk
every column is a string: text as it is, messages as JSON.
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
Body = str | list[Message] | dict[str, list[Message]]

# format -> the columns that hold its body
COLUMNS = {"text": ("text",), "messages": ("messages",), "preference": ("prompt", "chosen", "rejected")}

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
    messages = body if isinstance(body, list) else [m for part in body.values() for m in part]
    return [message["content"] for message in messages]


def joined(body: Body) -> str:
    """A body as plain text."""
    return "\n".join(contents(body))


def mapped(body: Body, change: Callable[[str], str]) -> Body:
    """A body with every text changed."""
    if isinstance(body, str):
        return change(body)
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
    return {part: json.loads(row[part]) for part in COLUMNS["preference"]}


def digest(body: Body) -> bytes:
    """sha256 of a body: of its text, or of its canonical JSON."""
    return hashlib.sha256((body if isinstance(body, str) else dumps(body)).encode()).digest()


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
    """A parquet file of string columns, row group by row group."""

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.columns = columns
        self.schema = pa.schema([pa.field(name, pa.string(), nullable=False) for name in columns])
        self.writer = pq.ParquetWriter(
            path,
            self.schema,
            compression="zstd",
            compression_level=3,
            use_dictionary=False,
            store_schema=False,
        )
        self.rows: list[tuple[str, ...]] = []
        self.bytes = 0

    def add(self, row: tuple[str, ...]) -> None:
        """Append a row, given in the order of the columns."""
        self.rows.append(row)
        self.bytes += sum(map(len, row))
        if self.bytes >= _ROW_GROUP_BYTES or len(self.rows) >= _ROW_GROUP_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting as one row group."""
        if self.rows:
            arrays = [pa.array(column, pa.string()) for column in zip(*self.rows, strict=True)]
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
