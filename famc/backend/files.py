"""Where the files of backends are found: beside the spec, among the user's own, among famc's.

In: a name. Out: Accelerator. Raises UnknownAccelerator with the nearest names.
"""

from __future__ import annotations

import difflib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from famc.backend.accelerator import Accelerator


class UnknownAccelerator(LookupError):
    """No backends/*.yaml has this name or alias. `candidates` are the nearest ones, else all."""

    def __init__(self, name: str, candidates: tuple[str, ...]) -> None:
        self.name = name
        self.candidates = candidates
        super().__init__(f"no accelerator `{name}`; there are: {', '.join(candidates)}")


def packaged_dir() -> Path:
    """The backends that come with famc: package data of a wheel, or the repository's folder."""
    package = Path(__file__).parents[1]
    installed = package / "_backends"
    return installed if installed.is_dir() else package.parent / "backends"


def user_dir() -> Path:
    """The user's own backends on this machine: `famc/backends` below $XDG_CONFIG_HOME, else ~/.config.

    As the XDG Base Directory Specification asks, a value that is no absolute path counts as not set.
    """
    base = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    return (base if base.is_absolute() else Path("~/.config").expanduser()) / "famc" / "backends"


def folders_of(beside: Path | None) -> list[Path]:
    """Where to look, nearest first: `backends/` in or beside `beside` (a spec or its folder), the user's, famc's."""
    folders = [user_dir(), packaged_dir()]
    if beside is not None:
        folders.insert(0, (beside.parent if beside.is_file() else beside) / "backends")
    return folders


def load_accelerator(name: str, beside: Path | None = None) -> Accelerator:
    """The accelerator called `name`, from `backends/` in or beside `beside`, else the user's, else famc's own."""
    folders = folders_of(beside)
    plain = Path(name).name == name
    for folder in folders:
        if plain and (path := folder / f"{name}.yaml").is_file():
            return read_accelerator(path)
    files = [path for folder in folders for path in sorted(folder.glob("*.yaml"))]
    for path in files:  # nearest first: the user's names win
        if name in path.read_text(encoding="utf-8"):  # parsing all of them takes longer than a plan
            accelerator = read_accelerator(path)
            if name in (accelerator.name, *accelerator.aliases):
                return accelerator
    known = [read_accelerator(path) for path in files]
    names = [name for accelerator in known for name in (accelerator.name, *accelerator.aliases)]
    near = difflib.get_close_matches(name.lower(), names, n=5, cutoff=0.5)
    raise UnknownAccelerator(name, tuple(near) or tuple(sorted({a.name for a in known})))


def read_accelerator(path: Path) -> Accelerator:
    """One file. Raises OSError, and ValueError where it is no backend or its name is not the file's."""
    return _read(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _read(path: Path, mtime_ns: int) -> Accelerator:
    from ruamel.yaml import YAML  # here, so that importing famc.backend stays cheap
    from ruamel.yaml.error import YAMLError

    try:
        data: Any = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        raise ValueError(f"{path}: {error}") from error
    accelerator = Accelerator.model_validate(data)
    if accelerator.name != path.stem:
        raise ValueError(f"{path}: its name is `{accelerator.name}`; name and file must agree")
    return accelerator
