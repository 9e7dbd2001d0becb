"""YAML text -> Spec: the family, its stages validated by kind, and the place of every value.

In: a file, the table of kinds, a profile's name, `--set` values. Out: Spec, or SpecError with all mistakes at once.
The only file (with text.py) that knows lines and columns.
"""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from famc.errors import Problem, SpecError, UsageError, Where, did_you_mean
from famc.spec.family import Family, StageSpec
from famc.spec.text import Document, Path, assign, parse, scalar

Kinds = Mapping[str, type[StageSpec]]


@dataclass(frozen=True)
class Spec:
    """A family with the places of its values; `origins` says who set a path: the file, a profile, or --set."""

    family: Family
    document: Document
    folder: pathlib.Path
    origins: Mapping[Path, str]
    profile: str | None = None
    smoke: bool = False

    def problem(self, path: Path, message: str, hint: str = "", *, key: bool = False) -> Problem:
        """A problem at a path of the spec."""
        return self.document.problem(path, message, hint, key=key)

    def origin(self, path: Path) -> str | None:
        """Who set the value at a path: `pydoc.yaml:12`, `profile quick`, `--set …`; None where it is a default."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.origins:
                return self.origins[path[:end]]
        place = self.document.values.get(path) or self.document.keys.get(path)
        return f"{pathlib.Path(place.file).name}:{place.line}" if place else None


def load(
    file: pathlib.Path,
    kinds: Kinds,
    *,
    profile: str | None = None,
    sets: Sequence[str] = (),
    smoke: bool = False,
) -> Spec:
    """Read a spec. Raises SpecError with every problem that can be found before names are followed."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{file}: no such file", "famc init writes a first spec") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: can't be read: {error}") from None
    return loads(text, kinds, file=str(file), folder=file.parent, profile=profile, sets=sets, smoke=smoke)


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
    document = parse(text, file)
    problems, origins = _override(document, profile, sets)
    if smoke:
        from famc.spec.smoke import shrink

        for path, value in shrink(document.data):
            _put(document.data, path, value)
            origins[path] = "--smoke"
    family, more = validate(document, kinds)
    problems += more
    if problems or family is None:
        raise SpecError(problems)
    return Spec(family, document, folder, origins, profile, smoke)


def validate(document: Document, kinds: Kinds) -> tuple[Family | None, list[Problem]]:
    """Plain values -> Family, or its problems: the shared sections and each stage by its kind."""
    problems: list[Problem] = []
    raw = dict(document.data)
    stages = raw.get("stages")
    if isinstance(stages, dict):
        raw["stages"] = {}
        for name, value in stages.items():
            stage, wrong = _stage(name, value, document, kinds)
            problems += wrong
            raw["stages"][name] = stage if stage is not None else StageSpec(kind="?")
    for name, value in (raw.get("sizes") or {}).items() if isinstance(raw.get("sizes"), dict) else ():
        if isinstance(value, str):
            raw["sizes"] = {**raw["sizes"], name: {"preset": value}}
    family = None
    try:
        family = Family.model_validate(raw)
    except ValidationError as error:
        problems += _translate(error, Family, (), document)
    return family, problems


def _stage(name: str, value: Any, document: Document, kinds: Kinds) -> tuple[StageSpec | None, list[Problem]]:
    path: Path = ("stages", name)
    if not isinstance(value, dict):
        return None, [document.problem(path, f"stages.{name} must be a mapping with a 'kind'")]
    kind = value.get("kind")
    if kind is None:
        return None, [document.problem(path, f"stages.{name} has no 'kind'", did_you_mean("", kinds), key=True)]
    if not isinstance(kind, str) or kind not in kinds:
        return None, [document.problem((*path, "kind"), f"unknown kind {kind!r} in stages.{name}", did_you_mean(str(kind), kinds))]
    model = kinds[kind]
    problems: list[Problem] = []
    stage: StageSpec | None = None
    try:
        stage = model.model_validate(value)
    except ValidationError as error:
        problems += _translate(error, model, path, document)
    by = value.get("by")
    for group, override in by.items() if isinstance(by, dict) and stage is not None else ():
        where: Path = (*path, "by", group)
        if not isinstance(override, dict):
            continue  # the model says so itself
        for fixed in {"kind", "from", "by"} & set(override):
            problems.append(document.problem((*where, fixed), f"'{fixed}' can't differ by group", key=True))
        try:
            model.model_validate(merge(value, override))
        except ValidationError as error:
            problems += _translate(error, model, where, document, only=set(override))
    return stage, problems


def merge(base: dict[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """`override` laid over `base`: mappings are merged, all else is replaced."""
    result = dict(base)
    for key, value in override.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else copy.deepcopy(value)
    return result


def _override(document: Document, profile: str | None, sets: Sequence[str]) -> tuple[list[Problem], dict[Path, str]]:
    """Lay the profile, then each --set, over the document."""
    problems: list[Problem] = []
    origins: dict[Path, str] = {}
    profiles = document.data.get("profiles")
    if profile is not None:
        if not isinstance(profiles, dict) or profile not in profiles:
            names = profiles if isinstance(profiles, dict) else ()
            raise UsageError(f"no profile {profile!r} in {document.file}", did_you_mean(profile, names))
        if isinstance(profiles[profile], dict):
            for target, value in profiles[profile].items():
                where = document.where(("profiles", profile, target), key=True)
                _apply(document, target, copy.deepcopy(value), where, f"profile {profile}", problems, origins)
    for text in sets:
        target, equals, value_text = text.partition("=")
        if not equals or not target.strip():
            raise UsageError(f"--set {text!r}: expected path=value", "for example --set stages.sft.lr=1e-4")
        where = Where(f"--set {text}")
        _apply(document, target.strip(), scalar(value_text, f"--set {text}"), where, f"--set {target.strip()}", problems, origins)
    return problems, origins


def _apply(
    document: Document, target: str, value: Any, where: Where, by: str, problems: list[Problem], origins: dict[Path, str]
) -> None:
    before = set(document.keys)
    problem = assign(document, target, value, where)
    if problem:
        problems.append(problem)
        return
    for path in set(document.keys) - before | {p for p, w in document.keys.items() if w is where}:
        if document.keys[path] is where:
            origins[path] = by


def _put(data: Any, path: Path, value: Any) -> None:
    for part in path[:-1]:
        data = data[part] if isinstance(data, list) else data.setdefault(part, {})
    data[path[-1]] = value


def _translate(
    error: ValidationError, model: type[BaseModel], prefix: Path, document: Document, only: set[str] | None = None
) -> list[Problem]:
    """Pydantic's errors -> problems with places, in famc's words."""
    problems = []
    for item in error.errors(include_url=False):
        loc = tuple(part for part in item["loc"] if part != "[key]")
        if only is not None and (not loc or loc[0] not in only):
            continue
        path, clean = _follow((*prefix, *loc), document)
        name = ".".join(str(part) for part in clean) or "the spec"
        parent = ".".join(str(part) for part in clean[:-1]) or "the spec"
        kind = item["type"]
        if kind == "extra_forbidden":
            known = _known_keys(model, loc[:-1])
            problems.append(document.problem(path, f"unknown key '{loc[-1]}' in {parent}", did_you_mean(str(loc[-1]), known), key=True))
        elif kind == "missing":
            problems.append(document.problem(path[:-1], f"{parent} needs '{loc[-1]}'", _describe(model, loc), key=len(path) > 1))
        elif kind == "literal_error":
            options = [o.strip("'\" ") for o in item["ctx"]["expected"].replace(" or ", ", ").split(", ")]
            problems.append(document.problem(path, f"{name}: unknown value {_short(item['input'])}", did_you_mean(str(item["input"]), options)))
        elif kind == "string_pattern_mismatch":
            bad = loc[-1] if item["loc"][-1] == "[key]" else item["input"]
            key = item["loc"][-1] == "[key]"
            problems.append(document.problem(path, f"{bad!r} can't be a name", "use letters, digits, and . _ - inside", key=key))
        elif kind == "too_short":
            problems.append(document.problem(path, f"{name} is empty: write at least one", key=True))
        else:
            message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
            if item["type"] != "value_error":
                message = f"{message}, not {_short(item['input'])}"
            problems.append(document.problem(path, f"{name}: {message}"))
    return problems


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _follow(path: Path, document: Document) -> tuple[Path, Path]:
    """The part of a pydantic location that is in the document: union members' tags are left out."""
    current: Any = document.data
    found: list[str | int] = []
    for index, part in enumerate(path):
        last = index == len(path) - 1
        if (isinstance(current, dict) and part in current) or (
            isinstance(current, list) and isinstance(part, int) and part < len(current)
        ):
            current = current[part]
            found.append(part)
        elif last and isinstance(current, dict):
            found.append(part)
    return tuple(found), tuple(found)


def _field_models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [m for arg in getattr(annotation, "__args__", ()) for m in _field_models(arg)]


def _descend(model: type[BaseModel], loc: tuple[Any, ...]) -> list[type[BaseModel]]:
    models = [model]
    for part in loc:
        step: list[type[BaseModel]] = []
        for one in models:
            for field_name, info in one.model_fields.items():
                if part in (field_name, info.alias):
                    step += _field_models(info.annotation)
        models = step or models  # a name, an index or a union's tag: stay
    return models


def _known_keys(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    return [info.alias or name for one in _descend(model, loc) for name, info in one.model_fields.items()]


def _describe(model: type[BaseModel], loc: tuple[Any, ...]) -> str:
    for one in _descend(model, loc[:-1]):
        for name, info in one.model_fields.items():
            if loc[-1] in (name, info.alias):
                return info.description or ""
    return ""
