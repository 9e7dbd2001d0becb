"""A file -> Spec: the family, the place of every value, who set it, and all that is wrong so far.

In: a file, the table of kinds, a profile's name, `--set` values. Out: Spec. `draft` goes on past mistakes
and keeps them in `Spec.problems`, so that those which following names brings to light (famc.checks) are
told together; `load` raises.
"""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from famc.errors import Problem, SpecError, UsageError, Where, did_you_mean
from famc.spec.family import Family
from famc.spec.smoke import shrink
from famc.spec.text import Document, Path, assign, parse, scalar
from famc.spec.validate import Kinds, merge, validate

__all__ = ["Spec", "draft", "drafts", "load", "loads", "merge", "rehearsal"]


@dataclass(frozen=True)
class Spec:
    """A family with the places of its values; `origins` says who set a path: file, profile, --set."""

    family: Family
    document: Document
    folder: pathlib.Path
    origins: dict[Path, str] = field(default_factory=dict)
    profile: str | None = None
    smoke: bool = False
    problems: tuple[Problem, ...] = ()
    dropped: frozenset[Path] = frozenset()  # paths left out because of a problem
    full: Family | None = None  # of a rehearsal: the family at its own sizes

    def problem(self, path: Path, message: str, hint: str = "", *, key: bool = False) -> Problem:
        """A problem at a path of the spec."""
        return self.document.problem(path, message, hint, key=key)

    def origin(self, path: Path) -> str | None:
        """Who set the value at a path: `pydoc.yaml:12`, `profile quick`, `--set …`; None where it is a
        default.
        """
        for end in range(len(path), 0, -1):
            if path[:end] in self.origins:
                return self.origins[path[:end]]
        at = self.document
        places = (at.values.get(path[:end]) or at.keys.get(path[:end]) for end in range(len(path), 2, -1))
        place = next((p for p in places if p), None) or at.values.get(path) or at.keys.get(path)
        return f"{pathlib.Path(place.file).name}:{place.line}" if place else None

    def touched(self, *path: str | int) -> bool:
        """Whether something at, below or around a path was left out: what is there now is not what was
        written.
        """
        return any(path[: len(known)] == known or known[: len(path)] == path for known in self.dropped)


def load(
    file: pathlib.Path,
    kinds: Kinds,
    *,
    profile: str | None = None,
    sets: Sequence[str] = (),
    smoke: bool = False,
) -> Spec:
    """Read a spec. Raises SpecError with every problem that can be found before names are followed."""
    return _sound(draft(file, kinds, profile=profile, sets=sets, smoke=smoke))


def loads(
    text: str,
    kinds: Kinds,
    *,
    file: str = "family.yaml",
    folder: pathlib.Path = pathlib.Path(),
    profile: str | None = None,
    sets: Sequence[str] = (),
    smoke: bool = False,
) -> Spec:
    """`load` on text; relative paths of the spec are taken from `folder`."""
    return _sound(drafts(text, kinds, file=file, folder=folder, profile=profile, sets=sets, smoke=smoke))


def _sound(spec: Spec) -> Spec:
    if spec.problems:
        raise SpecError(spec.problems)
    return spec


def draft(
    file: pathlib.Path,
    kinds: Kinds,
    *,
    profile: str | None = None,
    sets: Sequence[str] = (),
    smoke: bool = False,
) -> Spec:
    """Read a spec, mistakes and all. Raises only where nothing is left to go on with."""
    try:
        text = file.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UsageError(f"{file}: no such file", "famc init writes a first spec") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        raise SpecError(
            [Problem(Where(str(file), line, 1), f"byte 0x{byte:02x} is not UTF-8", "save the file as UTF-8")]
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: can't be read: {getattr(error, 'strerror', None) or error}") from None
    return drafts(text, kinds, file=str(file), folder=file.parent, profile=profile, sets=sets, smoke=smoke)


def drafts(
    text: str,
    kinds: Kinds,
    *,
    file: str = "family.yaml",
    folder: pathlib.Path = pathlib.Path(),
    profile: str | None = None,
    sets: Sequence[str] = (),
    smoke: bool = False,
) -> Spec:
    """`draft` on text."""
    document, problems = parse(text, file)
    problems += _profiles(document, kinds, profile)
    more, origins = _override(document, profile, sets)
    reading = validate(document, kinds)
    problems += more + reading.problems
    if reading.family is None:
        raise SpecError(problems)
    return Spec(reading.family, document, folder, origins, profile, smoke, tuple(problems), reading.dropped)


def rehearsal(spec: Spec, kinds: Kinds) -> Spec:
    """A sound spec -> the same graph with small numbers (`--smoke`). `full` keeps the family as it was."""
    # digests of files hold for both; stages with their overrides are the whole family's
    kept = {name: found for name, found in spec.document.memo.items() if name != "stages"}
    document = replace(spec.document, data=copy.deepcopy(spec.document.data), memo=kept)
    origins = dict(spec.origins)
    for path, value in shrink(spec.family):
        _put(document.data, path, value)
        origins[path] = "--smoke"
    reading = validate(document, kinds)
    if reading.family is None or reading.problems:
        raise SpecError(reading.problems)
    return replace(
        spec, family=reading.family, document=document, origins=origins, smoke=True, full=spec.family
    )


def _put(data: Any, path: Path, value: Any) -> None:
    for part in path[:-1]:
        if isinstance(data, dict) and isinstance(data.get(part), str | None):
            data[part] = {}  # a preset's name, or nothing
        data = data[part]
    data[path[-1]] = value


def _override(
    document: Document, profile: str | None, sets: Sequence[str]
) -> tuple[list[Problem], dict[Path, str]]:
    """Lay the profile, then each --set, over the document."""
    problems: list[Problem] = []
    origins: dict[Path, str] = {}

    def put(target: str, value: Any, where: Where, by: str) -> None:
        result = assign(document, target, value, where)
        if isinstance(result, Problem):
            problems.append(result)
        else:
            for known in [p for p in origins if p[: len(result)] == result]:
                del origins[known]
            origins[result] = by

    if profile is not None:
        profiles = document.data.get("profiles")
        if not isinstance(profiles, dict) or profile not in profiles:
            names = profiles if isinstance(profiles, dict) else ()
            raise UsageError(f"no profile {profile!r} in {document.file}", did_you_mean(profile, names))
        for target, value, where in _targets(document, profile):
            put(target, value, where, f"profile {profile}")
    for text in sets:
        target, equals, value_text = text.partition("=")
        if not equals or not target.strip():
            raise UsageError(f"--set {text!r}: expected path=value", "for example --set stages.sft.lr=1e-4")
        where = Where(f"--set {text}")
        try:
            put(target.strip(), scalar(value_text, where), where, f"--set {target.strip()}")
        except SpecError as error:
            problems += error.problems
    return problems, origins


def _targets(document: Document, profile: str) -> list[tuple[str, Any, Where]]:
    """What a profile sets: (path, value, where it says so)."""
    values = document.at(("profiles", profile))
    if not isinstance(values, dict):
        return []  # validation says so
    places = {target: document.where(("profiles", profile, target), key=True) for target in values}
    return [(target, copy.deepcopy(value), places[target]) for target, value in values.items()]


def _profiles(document: Document, kinds: Kinds, used: str | None) -> list[Problem]:
    """Mistakes in profiles that are not in use: one should not come to light months later."""
    problems: list[Problem] = []
    profiles = document.data.get("profiles")
    for name in profiles if isinstance(profiles, dict) else ():
        if name == used or not (targets := _targets(document, name)):
            continue
        trial = copy.deepcopy(document)
        for target, value, where in targets:
            result = assign(trial, target, value, where)
            if isinstance(result, Problem):
                problems.append(result)
        places = {where for _, _, where in targets}
        problems += [p for p in validate(trial, kinds).problems if p.where in places]
    return problems
