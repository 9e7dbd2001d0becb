"""Local files that a spec names: which they are, how large, and a digest of their content.

The digest bears identity, so it is of bytes, never of times. Times and sizes only save reading a file
again: `Files` keeps digests by (path, size, mtime) in a cache file.
"""

from __future__ import annotations

import glob
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".arrow", ".txt", ".md", ".rst", ".py", ".txt.gz")


@dataclass(frozen=True, slots=True)
class Listing:
    """Files below a path, sorted, with one digest over names and contents."""

    paths: tuple[Path, ...]
    digest: str
    bytes: int

    @property
    def count(self) -> int:
        return len(self.paths)


MOST = 20_000  # files of one source: more is a mistake such as `path: /`


def expand(pattern: Path) -> tuple[Path, ...]:
    """A file, the files below a folder, or those that a glob matches; sorted. Too many: ValueError."""
    if pattern.is_file():
        return (pattern,)
    found: list[Path] = []
    folder = pattern.is_dir()
    below = pattern.rglob("*") if folder else map(Path, glob.iglob(str(pattern), recursive=True))  # noqa: PTH207
    for seen, path in enumerate(below):
        if seen > 5 * MOST or len(found) > MOST:
            raise ValueError(f"more than {MOST:,} files are there: name a smaller folder")
        hidden = folder and any(part.startswith(".") for part in path.relative_to(pattern).parts)
        if not hidden and path.is_file():
            found.append(path)
    return tuple(sorted(found))


class Files:
    """Digests of local files, each read once; `save` writes what was learnt to the cache file."""

    def __init__(self, cache: Path | None = None) -> None:
        self.cache = cache
        self.known: dict[str, list[object]] = {}
        self.changed = False
        if cache is not None and cache.is_file():
            try:
                self.known = json.loads(cache.read_text())
            except (OSError, ValueError):
                self.known = {}  # a cache: worth nothing if damaged

    def listing(self, pattern: Path) -> Listing:
        """The files that a path, folder or glob means."""
        paths = expand(pattern)
        base = pattern if pattern.is_dir() else pattern.parent
        total = hashlib.sha256()
        size = 0
        for path in paths:
            name = path.relative_to(base).as_posix() if path.is_relative_to(base) else path.name
            total.update(f"{name}\0{self._digest(path)}\n".encode())
            size += path.stat().st_size
        return Listing(paths, total.hexdigest(), size)

    def _digest(self, path: Path) -> str:
        stat = path.stat()
        mark = [stat.st_size, stat.st_mtime_ns]
        entry = self.known.get(str(path))
        if entry is not None and entry[:2] == mark:
            return str(entry[2])
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.known[str(path)] = [*mark, digest]
        self.changed = True
        return digest

    def save(self) -> None:
        """Write the cache file, if there is one and something was learnt."""
        if self.cache is not None and self.changed:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.cache.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.known))
            temporary.replace(self.cache)
