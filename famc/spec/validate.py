"""Plain values -> Family, and all mistakes in them: what is wrong is told and left out, and the rest read
again.

In: a Document. Out: Reading: the family that is left, the problems, and the paths that were left out
(`dropped`), so that nothing that follows names complains about what stood there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from famc.errors import Problem, did_you_mean
from famc.spec.family import Family, StageSpec
from famc.spec.text import Document, Path
from famc.spec.words import Fault, faults, label, word

Kinds = Mapping[str, type[StageSpec]]
ROUNDS = 12  # each leaves out one level more: the deepest section has seven

# What stands in for a section, or a member of a list, that had to be left out. `lost` is never seen: its
# paths are dropped.
_STAND_IN: dict[str, Any] = {
    "famc": 1,
    "family": {"name": "lost"},
    "arch": {"type": "llama"},
    "sizes": {"lost": {"layers": 2, "hidden": 64, "heads": 2, "ffn": 64}},
    "stages": {"lost": {"kind": "adopt", "path": "lost"}},
    "variants": {"lost": {"stage": "lost"}},
}
_MEMBER: dict[str, dict[str, Any]] = {
    "exports": {"variants": (), "format": "safetensors"},
    "gates": {"match": "lost"},
    "evals": {"task": "bits_per_byte"},
}


@dataclass(frozen=True)
class Reading:
    """What a validation found."""

    family: Family | None
    problems: list[Problem]
    dropped: frozenset[Path]


def validate(document: Document, kinds: Kinds) -> Reading:
    """The family, its stages by their kinds; without what is wrong."""
    raw = _tuples(document.data)
    problems: list[Problem] = []
    dropped: set[Path] = set()
    for path in sorted(document.lost, key=str):
        _drop(raw, path, dropped)
    for _ in range(ROUNDS):
        family, found = _attempt(raw, kinds)
        if not found:
            return Reading(family, problems, frozenset(dropped))
        for fault in found:
            if fault.meant is not None and not _has(document.at(fault.path[:-1]), fault.meant):
                dropped.add((*fault.path[:-1], fault.meant))  # misspelt: one mistake, not also a missing key
        for fault in found:
            if not _covered(fault, dropped):
                problems.append(document.problem(fault.path, fault.message, fault.hint, key=fault.key))
        for fault in found:
            path = fault.path[:-1] if fault.missing and len(fault.path) > 1 else fault.path
            _drop(raw, path, dropped)
    return Reading(None, problems, frozenset(dropped))


def merge(base: dict[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """`override` laid over `base`: mappings are merged, all else is replaced."""
    result = dict(base)
    for key, value in override.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, Mapping)
        result[key] = merge(old, value) if both and old is not None else copy.deepcopy(value)
    return result


def _attempt(raw: dict[str, Any], kinds: Kinds) -> tuple[Family | None, list[Fault]]:
    """One validation of everything: the family, or its faults."""
    found: list[Fault] = []
    plain = dict(raw)
    stages = raw.get("stages")
    if isinstance(stages, dict):
        plain["stages"] = {}
        for name, value in stages.items():
            stage, wrong = _stage(name, value, kinds)
            found += wrong
            plain["stages"][name] = stage or StageSpec(kind="?")
    sizes = raw.get("sizes")
    if isinstance(sizes, dict):
        plain["sizes"] = {n: {"preset": v} if isinstance(v, str) else v for n, v in sizes.items()}
    try:
        family = Family.model_validate(plain)
    except ValidationError as error:
        return None, found + faults(error, Family, ())
    return (None if found else family), found


def _stage(name: str, value: Any, kinds: Kinds) -> tuple[StageSpec | None, list[Fault]]:
    path: Path = ("stages", name)
    if value is None:
        return None, [Fault(path, f"{label(path)} is empty", "write at least its 'kind'", key=True)]
    if not isinstance(value, dict):
        return None, [Fault(path, f"{label(path)}: expected a mapping with a 'kind'")]
    kind = value.get("kind")
    if kind is None:
        hint = did_you_mean("", kinds)
        return None, [Fault((*path, "kind"), f"{label(path)} needs 'kind'", hint, key=True, missing=True)]
    if not isinstance(kind, str) or kind not in kinds:
        hint = did_you_mean(str(kind), kinds)
        return None, [Fault((*path, "kind"), f"unknown kind '{word(kind)}' in {label(path)}", hint)]
    model = kinds[kind]
    try:
        stage = model.model_validate(value)
    except ValidationError as error:
        return None, faults(error, model, path)
    return stage, list(_overrides(model, value, path))


def _overrides(model: type[StageSpec], value: dict[str, Any], path: Path) -> Iterator[Fault]:
    """What is wrong in `by`: each group's values, laid over the stage's own."""
    for group, override in (value.get("by") or {}).items():
        where: Path = (*path, "by", group)
        fixed = sorted({"kind", "from", "by"} & set(override))
        for key in fixed:
            yield Fault(
                (*where, key),
                f"{label(where)}: '{key}' can't differ by group",
                "make it a stage of its own",
                key=True,
            )
        try:
            model.model_validate(merge(value, {k: v for k, v in override.items() if k not in fixed}))
        except ValidationError as error:
            for fault in faults(error, model, where):
                here = fault.path[len(where) :]
                if _reaches(override, here[:-1] if fault.missing else here):
                    yield fault


def _reaches(value: Any, path: Path) -> bool:
    for part in path:
        if not _has(value, part):
            return False
        value = value[part]
    return True


def _has(value: Any, part: str | int) -> bool:
    if isinstance(part, int) and isinstance(value, tuple):
        return part < len(value)
    return isinstance(value, Mapping) and part in value


def _covered(fault: Fault, dropped: set[Path]) -> bool:
    """Whether a fault only follows from what was told before: its place was left out, or all that it held."""
    above = any(fault.path[: len(path)] == path for path in dropped)
    emptied = fault.message.endswith(" is empty") and any(
        path[: len(fault.path)] == fault.path for path in dropped
    )
    return above or emptied


def _drop(raw: dict[str, Any], path: Path, dropped: set[Path]) -> None:
    """Leave out what stands at a path; a list keeps its length, and a section that must be there gets a
    stand-in.
    """
    inner = any(known[: len(path)] == path and len(known) > len(path) for known in dropped)
    if not _reaches(raw, path[:-1]):
        dropped.add(path)
        return
    parent: Any = raw
    for part in path[:-1]:
        parent = parent[part]
    section, last = str(path[0]), path[-1]
    if isinstance(parent, tuple):
        if section in _MEMBER and isinstance(last, int) and len(path) == (3 if section == "evals" else 2):
            _replace(
                raw, path[:-1], tuple(_MEMBER[section] if i == last else v for i, v in enumerate(parent))
            )
            dropped.add(path)
        else:
            _drop(raw, path[:-1], dropped)
        return
    if isinstance(parent, dict):
        parent.pop(last, None)
    if len(path) == 1 and section in _STAND_IN:
        raw[section] = copy.deepcopy(_STAND_IN[section])
        if inner and section in ("sizes", "stages", "variants"):
            dropped.add((section, "lost"))  # its members were told one by one
            return
    dropped.add(path)


def _replace(raw: dict[str, Any], path: Path, value: Any) -> None:
    parent: Any = raw
    for part in path[:-1]:
        parent = parent[part]
    parent[path[-1]] = value


def _tuples(value: Any) -> Any:
    """A copy whose lists are tuples: what the strict models expect."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_tuples(item) for item in value)
    return value
