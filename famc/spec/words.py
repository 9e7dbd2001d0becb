"""Pydantic's errors -> faults: a place in the spec, a sentence in famc's words, and what to leave out to go
on.

The models of family.py say what may stand where; a union's members are told together (`expected text or a
list`).
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Union

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from famc.errors import did_you_mean
from famc.spec.text import Path


@dataclass(frozen=True, slots=True)
class Fault:
    """A mistake at `path`. `missing`: the path is not there; what stands above it goes. `meant`: the key it
    should be.
    """

    path: Path
    message: str
    hint: str = ""
    key: bool = False
    missing: bool = False
    meant: str | None = None


# what each type of error expected
_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number of this world",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_LIMITS = {
    "greater_than_equal": ("at least", "ge"),
    "less_than_equal": ("at most", "le"),
    "greater_than": ("more than", "gt"),
    "less_than": ("less than", "lt"),
}


def faults(error: ValidationError, model: type[BaseModel], prefix: Path) -> list[Fault]:
    """Every mistake of a validation, each told once."""
    found: list[Fault] = []
    unions: dict[Path, list[tuple[Path, ErrorDetails, type[BaseModel]]]] = {}
    for item in error.errors(include_url=False):
        path, union, owner, is_key = _locate(model, item["loc"])
        if union is not None:
            unions.setdefault(union, []).append((path, item, owner))
        else:
            found.append(_tell(prefix, path, item, owner, is_key))
    for at, members in unions.items():
        found += _tell_union(prefix, at, members)
    return found


def _locate(model: type[BaseModel], loc: tuple[Any, ...]) -> tuple[Path, Path | None, type[BaseModel], bool]:
    """A location of pydantic's -> (path in the spec, the first union on the way, the model that holds it, is
    it a key).
    """
    if loc and loc[-1] == "[key]":
        return (*_locate(model, loc[:-1])[:3], True)
    annotation: Any = model
    owner = model
    path: Path = ()
    union: Path | None = None
    rest = list(loc)
    while rest:
        members = _members(annotation)
        if len(members) > 1:
            union = path if union is None else union
            tag = rest.pop(0)
            annotation = next((m for m in members if _tag(m) == tag), members[-1])
            continue
        annotation = members[0] if members else Any
        part = rest.pop(0)
        path = (*path, part)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            owner = annotation
            fields = {info.alias or name: info.annotation for name, info in annotation.model_fields.items()}
            annotation = fields.get(str(part), Any)
        else:
            arguments = typing.get_args(annotation) or (Any,)
            position = (
                part if isinstance(part, int) and part < len(arguments) and Ellipsis not in arguments else -1
            )
            annotation = arguments[0] if Ellipsis in arguments else arguments[position]
    if union is None and len(_members(annotation)) > 1:
        union = path
    return path, union, owner, False


def _members(annotation: Any) -> list[Any]:
    """The choices of a type: those of a union without None; else the type itself, without its trimmings."""
    while hasattr(annotation, "__metadata__"):  # Annotated
        annotation = annotation.__origin__
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [m for m in typing.get_args(annotation) if m is not type(None)]
    return [annotation]


def _tag(member: Any) -> str:
    """What pydantic calls a member of a union in locations."""
    plain = _members(member)[0]
    if typing.get_origin(plain) is typing.Literal:
        return "literal[" + ",".join(repr(a) for a in typing.get_args(plain)) + "]"
    if isinstance(plain, type) and not typing.get_args(plain):
        bounded = bool(getattr(member, "__metadata__", ())) and plain in (float, int)
        return f"constrained-{plain.__name__}" if bounded else plain.__name__
    return str(plain).replace("typing.", "").replace(" ", "").replace("ellipsis", "...")


def _tell(prefix: Path, path: Path, item: ErrorDetails, owner: type[BaseModel], is_key: bool) -> Fault:
    """One error in famc's words."""
    full = (*prefix, *path)
    name, parent = label(full), label(full[:-1])
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    if is_key:
        return Fault(
            full, f"{_short(full[-1])} can't be a name", "use letters, digits, and . _ - inside", key=True
        )
    if kind == "extra_forbidden":
        written = str(full[-1])[:200]
        near = next(iter(difflib.get_close_matches(written, _keys(owner), n=1)), None)
        hint = did_you_mean(written, _keys(owner))
        return Fault(full, f"unknown key '{word(full[-1])}' in {parent}", hint, key=True, meant=near)
    if kind == "missing":
        info = next(i for n, i in owner.model_fields.items() if full[-1] in (n, i.alias))
        return Fault(full, f"{parent} needs '{full[-1]}'", info.description or "", key=True, missing=True)
    if kind == "too_short":
        return Fault(full, f"{name} is empty", "write at least one", key=True)
    if value is None:
        return Fault(full, f"{name} is empty", "give it a value, or remove the key", key=True)
    if kind == "literal_error":
        options = _options(context)
        if isinstance(value, str):
            return Fault(full, f"{name}: unknown value {_short(value)}", did_you_mean(value, options))
        return Fault(full, f"{name}: expected {' or '.join(options)}, not {_short(value)}")
    if kind == "string_pattern_mismatch":
        return Fault(
            full, f"{name}: {_short(value)} can't be a name", "use letters, digits, and . _ - inside"
        )
    if kind in _LIMITS:
        words, key = _LIMITS[kind]
        return Fault(full, f"{name}: must be {words} {_number(context[key])}, not {_short(value)}")
    if kind in _EXPECTED:
        quote = kind == "string_type" and isinstance(value, int | float)
        hint = "quote it" if quote else ""
        return Fault(full, f"{name}: expected {_EXPECTED[kind]}, not {_short(value)}", hint)
    if kind == "too_long":
        return Fault(full, f"{name}: more items than the {context['max_length']} that belong here")
    if kind == "value_error":
        return Fault(full, f"{name}: {context['error']}")
    if kind == "none_required":  # what other kinds may say; the field says why this one may not
        about = owner.model_fields.get(str(full[-1]))
        why, _, hint = (about.description or "" if about else "").partition(": ")
        return Fault(full, f"{name}: {why}", hint, key=True)
    return Fault(full, f"{name}: {_short(value)} can't stand here")


def _tell_union(
    prefix: Path, at: Path, members: list[tuple[Path, ErrorDetails, type[BaseModel]]]
) -> list[Fault]:
    """What is wrong with a value that may be several things: the one that was meant, else all of them."""
    meant = [m for m in members if m[0] != at or m[1]["type"] not in (*_EXPECTED, "literal_error")]
    if meant:
        return [_tell(prefix, path, item, owner, False) for path, item, owner in meant]
    full = (*prefix, *at)
    value = members[0][1]["input"]
    if value is None:
        return [Fault(full, f"{label(full)} is empty", "give it a value, or remove the key", key=True)]
    expected: list[str] = []
    for _, item, _ in members:
        literal = item["type"] == "literal_error"
        expected += _options(item.get("ctx", {})) if literal else [_EXPECTED[item["type"]]]
    return [
        Fault(full, f"{label(full)}: expected {' or '.join(dict.fromkeys(expected))}, not {_short(value)}")
    ]


def label(path: Path) -> str:
    """`stages.sft.lr`, as messages write it."""
    return ".".join(word(part) for part in path) or "the spec"


def word(text: object) -> str:
    """A word of the user's inside a sentence: short, on one line."""
    plain = " ".join(str(text).split())
    return plain if len(plain) <= 64 else plain[:61] + "..."


def _keys(model: type[BaseModel]) -> list[str]:
    return [info.alias or name for name, info in model.model_fields.items()]


def _options(context: Mapping[str, Any]) -> list[str]:
    return [o.strip("'\" ") for o in str(context["expected"]).replace(" or ", ", ").split(", ")]


def _number(value: Any) -> str:
    return str(int(value)) if float(value).is_integer() else str(value)


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
