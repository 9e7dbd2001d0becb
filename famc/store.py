"""Artifact folders: `<root>/<address>-<key[:12]>/`, made in `.partial`, fsynced, renamed; the record is
written last.

In: a step's address and key. Out: a folder whose `famc.json` names every file with its hash, and signs
itself. A folder without a record is no artifact. Nothing here knows what a step does. Identity: the key;
and `output`, the digest of the files' content, which lets a rebuilt but byte-identical step keep what
follows it (early cut-off).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
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
SIGNATURE = "signature"  # in a record: the hash of the rest of it
_ARTIFACT = re.compile(r"-[0-9a-f]{12}$")


def canonical(value: Any) -> str:
    """JSON with one spelling a value. What has no stable spelling raises TypeError, naming its type."""
    _refuse_keys(value)
    try:
        return json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_refuse
        )
    except ValueError as error:  # inf, nan, or a value inside itself
        raise TypeError(f"a float such as inf or nan can't be part of a key: {error}") from None


def _refuse_keys(value: Any) -> None:
    """json.dumps would spell the keys 1 and "1" alike. Containers only: a plan hashes 10,000 of these."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"a {type(key).__name__} can't name a value in a key: use text")
            if isinstance(item, dict | list | tuple):
                _refuse_keys(item)
    elif isinstance(value, list | tuple):
        for item in value:
            if isinstance(item, dict | list | tuple):
                _refuse_keys(item)


def _refuse(value: Any) -> Any:
    raise TypeError(f"a {type(value).__name__} can't be part of a key: give it a stable form in graph/")


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
        """Whether a finished artifact is there. Its record is written last, so one look is enough."""
        return (self.path(name, key) / RECORD).is_file()

    def record(self, name: str, key: str) -> dict[str, Any]:
        """The record of an artifact. Raises StoreError if it is damaged."""
        return read_record(self.path(name, key))

    def scan(self) -> dict[str, list[Path]]:
        """All artifacts by address, the newest first. Reads directory entries only."""
        found: dict[str, list[tuple[float, str]]] = {}
        root = os.fspath(self.root)
        todo = [root]
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
                    with contextlib.suppress(FileNotFoundError):
                        when = os.stat(f"{entry.path}/{RECORD}").st_mtime  # noqa: PTH116 - ten thousand of them
                        address = entry.path[len(root) + 1 : -13].replace(os.sep, "/")
                        found.setdefault(address, []).append((when, entry.path))
                        continue
                todo.append(entry.path)  # part of an address, even where a size is called like an artifact
        return {
            name: [Path(p) for _, p in sorted(items, key=lambda i: (-i[0], i[1]))]
            for name, items in found.items()
        }

    def commit(self, name: str, key: str, record: Mapping[str, Any]) -> Path:
        """`.partial` folder -> artifact: hash and fsync every file, write the record, rename."""
        made = self.partial(name, key)
        for left in (RECORD, RECORD + ".tmp"):  # of a commit that was killed
            (made / left).unlink(missing_ok=True)
        files: dict[str, dict[str, Any]] = {}
        for path in sorted(made.rglob("*")):
            relative = path.relative_to(made).as_posix()
            if path.is_symlink():
                raise StoreError(f"{name}: {relative} is a link: an artifact holds its own files")
            if path.is_file():
                files[relative] = {"sha256": _hash_and_sync(path), "bytes": path.stat().st_size}
        _write_synced(made / RECORD, signed({**record, "files": files, "output": output_digest(files)}))
        for folder in sorted((p for p in made.rglob("*") if p.is_dir()), reverse=True):
            _sync_folder(folder)
        _sync_folder(made)
        final = self.path(name, key)
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():  # an artifact whose record was lost or damaged: this one replaces it
            (final / RECORD).unlink(missing_ok=True)
            shutil.rmtree(final)
        made.rename(final)
        _sync_folder(final.parent)
        return final

    def reuse(self, name: str, key: str, source: Path, record: Mapping[str, Any]) -> Path:
        """A new artifact whose files are those of another (hard links): early cut-off."""
        made = self.partial(name, key)
        if made.exists():
            shutil.rmtree(made)
        made.mkdir(parents=True)
        for relative in read_record(source)["files"]:
            link_or_copy(source / relative, made / relative)
        return self.commit(name, key, record)

    def twins(self, content: str, folders: Iterable[Path]) -> Iterator[Path]:
        """Those of some artifacts that were made from the same content and are whole."""
        for folder in folders:
            with contextlib.suppress(StoreError):
                if read_record(folder).get("content") == content and not self.verify(folder):
                    yield folder

    def verify(self, folder: Path) -> list[Fault]:
        """Re-hash every file of an artifact, and its record."""
        name = folder.relative_to(self.root).as_posix()
        try:
            record = read_record(folder)
        except StoreError as error:
            return [Fault(name, RECORD, error.message.removeprefix(f"{folder.name}: "))]
        faults = [Fault(name, file, what) for file, what in _faults(folder, record["files"])]
        listed = {RECORD, *record["files"]}
        present = (p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
        extra = sorted({p.relative_to(folder).as_posix() for p in present} - listed)
        faults += [Fault(name, file, "is not in the record") for file in extra]
        if signed(record) != (folder / RECORD).read_text(encoding="utf-8"):
            faults.append(Fault(name, RECORD, "is not as it was signed"))
        elif output_digest(record["files"]) != record.get("output"):
            faults.append(Fault(name, RECORD, "its digest is not that of its files"))
        return faults

    def remove(self, folder: Path) -> int:
        """Delete an artifact, its record first: a half-deleted folder is no artifact. Returns its bytes."""
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        (folder / RECORD).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        for parent in folder.parents:
            if parent == self.root:
                break
            try:
                parent.rmdir()
            except OSError:  # it holds other artifacts
                break
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
        raise StoreError(
            f"{folder.name}: its record can't be read: {error}", "famc build makes it again"
        ) from None
    files = record.get("files") if isinstance(record, dict) else None
    entries = files.values() if isinstance(files, dict) else [None]
    if not all(isinstance(entry, dict) and {"sha256", "bytes"} <= entry.keys() for entry in entries):
        raise StoreError(f"{folder.name}: its record is damaged", "famc build makes it again")
    return dict(record)


def signed(record: Mapping[str, Any]) -> str:
    """A record's text: its last word is the hash of all the others."""
    plain = {key: value for key, value in finite(record).items() if key != SIGNATURE}
    signature = hashlib.sha256(_text(plain).encode()).hexdigest()
    return _text({**plain, SIGNATURE: signature}) + "\n"


def _text(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)


def finite(value: Any) -> Any:
    """The value with null for nan and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _faults(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for relative, expected in files.items():
        path = folder / relative
        if not path.is_file():
            yield relative, "is missing"
        elif path.stat().st_size != expected["bytes"]:
            yield relative, f"has {path.stat().st_size} bytes, the record says {expected['bytes']}"
        elif hash_file(path) != expected["sha256"]:
            yield relative, "has other content than the record says"


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
    temporary.replace(path)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
