"""Which files of an installed Python package are learnt from, and a cheap identity of them: name and version.

Packages are called as pip calls them (`scikit-learn`, not `sklearn`). All is read from what the installer
wrote down; nothing is imported and no source is opened, so that the planner stays light.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

# Not learnt from: tests, other people's packages, and what a generator wrote (the rest of it shows by its head).
_FOLDERS = re.compile(
    r"(?:^|/)(?:tests?|testing/_internal|_?vendor(?:ed)?|third_?party|_?externals?|extern|__pycache__)(?:/|$)"
)
_FILES = re.compile(r"(?:test_.*|.*_tests?|conftest|setup|_?version|.*_pb2(?:_grpc)?)\.py$")
# `path,sha256=…,bytes`; a path with a comma would be quoted, and no module has one. Not `../../bin/x.py`.
_RECORDED = re.compile(r"^([A-Za-z_]\w*+(?:/[^,\n]*+|\.py)(?<=\.py)),[^,\n]*,(\d*)\r?$", re.MULTILINE)
_LONGEST_LICENSE = 64  # characters; some packages put the whole text where its name belongs


def canonical(name: str) -> str:
    """The one spelling of a package's name: `Scikit_Learn` -> `scikit-learn` (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def about(name: str) -> metadata.PackageMetadata | None:
    """What a package says of itself; None where it is not installed."""
    try:
        return metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return None


def version(name: str) -> str | None:
    """The installed version, or None."""
    found = about(name)
    return found["Version"] if found is not None else None


def absent(name: str) -> str:
    """Why nothing can be read from a package here; empty where it can."""
    if version(name) is None:
        owners = _owners(name)
        return f"package '{name}' is not installed" + (
            f"; module {name} is part of {', '.join(owners)}" if owners else ""
        )
    if not python_files(name):
        return f"package '{name}' has no Python sources among its installed files"
    return ""


def _owners(module: str) -> list[str]:
    """The packages that bring a module, where somebody took its name for the package's."""
    if not module.isidentifier() or find_spec(module) is None:
        return []
    return sorted(set(metadata.packages_distributions().get(module, [])))


@cache
def python_files(name: str) -> tuple[tuple[str, int], ...]:
    """`(path, bytes)` of every Python source that is learnt from, sorted; paths are relative to `root`."""
    record = metadata.distribution(name).read_text("RECORD")
    found = _recorded(record) if record else _walked(name)
    skipped = {folder for folder in {path.rpartition("/")[0] for path in found} if _FOLDERS.search(folder)}
    kept = (
        (path, size)
        for path, size in found.items()
        if path.rpartition("/")[0] not in skipped and not _FILES.match(path, path.rfind("/") + 1)
    )
    return tuple(sorted(kept))


def root(name: str) -> Path:
    """The folder that a package's paths are relative to."""
    return Path(str(metadata.distribution(name).locate_file("")))


def _recorded(record: str) -> dict[str, int]:
    return {path: int(size or 0) for path, size in _RECORDED.findall(record)}


def _walked(name: str) -> dict[str, int]:
    """The files of a package whose installer kept no record: those below its modules."""
    listed = (metadata.distribution(name).read_text("top_level.txt") or "").split()
    base = root(name)
    found: dict[str, int] = {}
    for module in listed or [canonical(name).replace("-", "_")]:
        if (single := base / f"{module}.py").is_file():
            found[single.name] = single.stat().st_size
        for folder, _, files in os.walk(base / module):
            for path in (Path(folder, file) for file in files if file.endswith(".py")):
                found[path.relative_to(base).as_posix()] = path.stat().st_size
    return found


@cache
def python_bytes(name: str) -> int:
    """Bytes of the sources that are learnt from; 0 where the package is not installed."""
    return sum(size for _, size in python_files(name)) if version(name) is not None else 0


def license_of(names: Sequence[str]) -> str:
    """The licences of installed packages, each once; `unknown` for one that tells none."""
    known = [found for name in names if (found := about(name)) is not None]
    return ", ".join(dict.fromkeys(map(_license, known))) or "unknown"


def _license(found: metadata.PackageMetadata) -> str:
    expressions = found.get_all("License-Expression") or []
    named = [text for text in found.get_all("License") or [] if len(text) <= _LONGEST_LICENSE]
    for text in map(str.strip, [*expressions, *named]):
        if text and text.upper() != "UNKNOWN" and "\n" not in text:
            return text
    lines = found.get_all("Classifier") or []
    classes = [line.rpartition(" :: ")[2] for line in lines if line.startswith("License ::")]
    return " AND ".join(classes) or "unknown"
