"""Artifact folders: `<root>/<address>-<key[:12]>/`, made in `.partial`, fsynced, renamed; the record is written last.

In: a step's address and key. Out: a folder whose `famc.json` names every file with its hash. A folder without a record
is no artifact. Nothing here knows what a step does. Identity: the key; and `output`, the digest of the files' content,
which lets a rebuilt but byte-identical step keep what follows it (early cut-off).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from famc.errors import StoreError

RECORD = "famc.json"
PARTIAL = ".partial"
_ARTIFACT = re.compile(r"-[0-9a-f]{12}$")


def canonical(value: Any) -> str:
    """JSON with one spelling a value. A type that has no stable spelling raises TypeError, naming it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_refuse)


def _refuse(value: Any) -> Any:
    raise TypeError(f"a {type(value).__name__} can't be part of a key: give it a stable form in graph.py")


def digest(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Fault:
    """One file that is not what its record says."""

    artifact: str
    file: str
    what: str


class Store:
    """The artifacts below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str, key: str) -> Path:
        """Where an artifact lies, or would."""
        return self.root / f"{name}-{key[:12]}"

    def partial(self, name: str, key: str) -> Path:
        """Where it is made. Checkpoints live here, so that a killed job resumes."""
        return self.root / PARTIAL / f"{name.replace('/', '.')}-{key[:12]}"

    def has(self, name: str, key: str) -> bool:
        """Whether a finished artifact is there. Its record is the last thing written, so one look is enough."""
        return (self.path(name, key) / RECORD).is_file()

    def record(self, name: str, key: str) -> dict[str, Any]:
        """The record of an artifact. Raises StoreError if it is damaged."""
        return read_record(self.path(name, key))

    def scan(self) -> dict[str, list[Path]]:
        """All artifacts by address, the newest first. Reads directory entries only."""
        found: dict[str, list[tuple[float, Path]]] = {}
        todo = [self.root]
        while todo:
            folder = todo.pop()
            try:
                entries = list(os.scandir(folder))
            except FileNotFoundError:
                continue
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False) or entry.name == PARTIAL:
                    continue
                if _ARTIFACT.search(entry.name):
                    record = Path(entry.path) / RECORD
                    with contextlib.suppress(FileNotFoundError):
                        when = record.stat().st_mtime
                        address = os.path.relpath(entry.path, self.root)[:-13].replace(os.sep, "/")
                        found.setdefault(address, []).append((when, Path(entry.path)))
                else:
                    todo.append(Path(entry.path))
        return {name: [p for _, p in sorted(items, key=lambda i: (-i[0], str(i[1])))] for name, items in found.items()}

    def commit(self, name: str, key: str, record: Mapping[str, Any]) -> Path:
        """`.partial` folder -> artifact: hash and fsync every file, write the record, rename."""
        made = self.partial(name, key)
        files: dict[str, dict[str, Any]] = {}
        for path in sorted(p for p in made.rglob("*") if p.is_file()):
            relative = path.relative_to(made).as_posix()
            if relative == RECORD:
                continue
            files[relative] = {"sha256": _hash_and_sync(path), "bytes": path.stat().st_size}
        full = {**record, "files": files, "output": output_digest(files)}
        _write_synced(made / RECORD, json.dumps(full, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        for folder in sorted((p for p in made.rglob("*") if p.is_dir()), reverse=True):
            _sync_folder(folder)
        _sync_folder(made)
        final = self.path(name, key)
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():  # an artifact whose record was lost or damaged: this one replaces it
            shutil.rmtree(final)
        made.rename(final)
        _sync_folder(final.parent)
        return final

    def reuse(self, name: str, key: str, source: Path, record: Mapping[str, Any]) -> Path:
        """A new artifact whose files are those of another (hard links): early cut-off."""
        made = self.partial(name, key)
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        for relative in read_record(source)["files"]:
            link_or_copy(source / relative, made / relative)
        return self.commit(name, key, record)

    def twin(self, content: str, folders: Iterable[Path]) -> Path | None:
        """The first of some artifacts that was made from the same content."""
        for folder in folders:
            with contextlib.suppress(StoreError):
                if read_record(folder).get("content") == content:
                    return folder
        return None

    def verify(self, folder: Path) -> list[Fault]:
        """Re-hash every file of an artifact."""
        name = os.path.relpath(folder, self.root)
        try:
            record = read_record(folder)
        except StoreError as error:
            return [Fault(name, RECORD, error.message)]
        faults = []
        for relative, expected in record["files"].items():
            path = folder / relative
            if not path.is_file():
                faults.append(Fault(name, relative, "is missing"))
            elif path.stat().st_size != expected["bytes"]:
                faults.append(Fault(name, relative, f"has {path.stat().st_size} bytes, the record says {expected['bytes']}"))
            elif hash_file(path) != expected["sha256"]:
                faults.append(Fault(name, relative, "has other content than the record says"))
        present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {RECORD}
        faults += [Fault(name, extra, "is not in the record") for extra in sorted(present - set(record["files"]))]
        if output_digest(record["files"]) != record.get("output"):
            faults.append(Fault(name, RECORD, "its digest is not that of its files"))
        return faults

    def remove(self, folder: Path) -> int:
        """Delete an artifact, its record first, so that a half-deleted folder is no artifact. Returns its bytes."""
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        (folder / RECORD).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        parent = folder.parent
        while parent != self.root and parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()
            parent = parent.parent
        return size

    def partials(self) -> Iterator[Path]:
        """Folders of unfinished jobs."""
        folder = self.root / PARTIAL
        if folder.is_dir():
            yield from sorted(p for p in folder.iterdir() if p.is_dir())


def read_record(folder: Path) -> dict[str, Any]:
    """A folder's record. Raises StoreError if it can't be read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{folder.name}: its record can't be read: {error}", "famc build makes it again") from None
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        raise StoreError(f"{folder.name}: its record is damaged", "famc build makes it again")
    return record


def output_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """One digest over names and contents."""
    return digest({name: entry["sha256"] for name, entry in files.items()})


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system has them, else a copy. Artifacts are never written to again."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _hash_and_sync(path: Path) -> str:
    with path.open("rb") as file:
        value = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return value


def _write_synced(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
