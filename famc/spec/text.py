"""YAML text -> plain values, and the place of each. In: text. Out: Document. YAML 1.2, safe: no tags, no objects.

`3e-4` is a number, `no` is a string, duplicate keys are errors. Anchors work; a document that they blow up is refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.scalarbool import ScalarBoolean
from ruamel.yaml.scalarfloat import ScalarFloat
from ruamel.yaml.scalarint import ScalarInt

from famc.errors import Problem, SpecError, Where, did_you_mean

Path = tuple[str | int, ...]
MAX_NODES = 200_000  # a spec is short; an alias bomb is not
MAX_DEPTH = 40
MAX_BYTES = 4_000_000


@dataclass
class Document:
    """Plain values with their places. `where(path)` is the value's own place, or its nearest ancestor's."""

    file: str
    data: dict[str, Any]
    keys: dict[Path, Where] = field(default_factory=dict)
    values: dict[Path, Where] = field(default_factory=dict)

    def where(self, path: Path, *, key: bool = False) -> Where:
        """The place of the value (or key) at a path; of the nearest thing above it if it has none."""
        places = (self.keys, self.values) if key else (self.values, self.keys)
        for end in range(len(path), -1, -1):
            for table in places:
                if path[:end] in table:
                    return table[path[:end]]
        return Where(self.file, 1, 1)

    def problem(self, path: Path, message: str, hint: str = "", *, key: bool = False) -> Problem:
        """A problem at a path."""
        return Problem(self.where(path, key=key), message, hint)


def parse(text: str, file: str) -> Document:
    """YAML text -> Document. Raises SpecError with the place of each mistake of the syntax."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise SpecError([Problem(Where(file, 1, 1), f"longer than {MAX_BYTES:,} bytes: a spec is a page, not a data set")])
    reader = YAML(typ="rt")
    reader.allow_duplicate_keys = False
    try:
        tree = reader.load(text)
    except DuplicateKeyError as error:
        mark = error.problem_mark
        key = str(error.problem).partition('"')[2].partition('"')[0]
        raise SpecError([Problem(_mark(file, mark), f"key {key!r} stands here a second time", "keep one of them")]) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = (error.problem or error.context or "not YAML").strip()
        raise SpecError([Problem(_mark(file, mark), f"not valid YAML: {what}")]) from None
    except (YAMLError, ValueError, RecursionError, OverflowError, TypeError, AttributeError, NotImplementedError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else (str(error).splitlines() or ["?"])[0]
        raise SpecError([Problem(Where(file, 1, 1), f"not valid YAML: {what}")]) from None
    if not isinstance(tree, CommentedMap):
        raise SpecError([Problem(Where(file, 1, 1), "a spec is a mapping that starts with 'famc: 1'")])
    document = Document(file, {})
    problems: list[Problem] = []
    document.data = _plain(tree, (), document, problems, [0])
    if problems:
        raise SpecError(problems)
    return document


def _mark(file: str, mark: Any) -> Where:
    return Where(file, mark.line + 1, mark.column + 1) if mark is not None else Where(file, 1, 1)


def _plain(node: Any, path: Path, doc: Document, problems: list[Problem], seen: list[int]) -> Any:
    """Ruamel's tree -> dicts, lists, str, int, float, bool, None; places are noted on the way."""
    seen[0] += 1
    if seen[0] > MAX_NODES or len(path) > MAX_DEPTH:
        if seen[0] != -1:
            problems.append(doc.problem(path, "the document is too large or too deep once its anchors are followed"))
        raise SpecError(problems)
    if isinstance(node, CommentedMap):
        doc.values.setdefault(path, Where(doc.file, node.lc.line + 1, node.lc.col + 1))
        result: dict[str, Any] = {}
        for raw_key, value in node.items():
            place = _key_place(node, raw_key, doc.file)
            if not isinstance(raw_key, str):
                problems.append(Problem(place, f"key {raw_key!r} is not text", f'quote it: "{raw_key}"'))
                continue
            key = str(raw_key)
            doc.keys[(*path, key)] = place
            spot = _value_place(node, raw_key, doc.file)
            if spot and not isinstance(value, CommentedMap | CommentedSeq):
                doc.values[(*path, key)] = spot
            result[key] = _plain(value, (*path, key), doc, problems, seen)
        return result
    if isinstance(node, CommentedSeq):
        doc.values.setdefault(path, Where(doc.file, node.lc.line + 1, node.lc.col + 1))
        items = []
        for index, value in enumerate(node):
            if index in (node.lc.data or {}):
                line, column = node.lc.data[index][:2]
                doc.values[(*path, index)] = Where(doc.file, line + 1, column + 1)
            items.append(_plain(value, (*path, index), doc, problems, seen))
        return items
    if isinstance(node, bool | ScalarBoolean):
        return bool(node)
    if isinstance(node, ScalarInt):
        return int(node)
    if isinstance(node, ScalarFloat):
        return float(node)
    if isinstance(node, str):
        return str(node)
    if node is None or isinstance(node, int | float):
        return node
    kind = type(node).__name__
    problems.append(doc.problem(path, f"a value of type {kind} can't stand in a spec", "write text, a number, a list or a mapping"))
    return None


def _key_place(node: CommentedMap, key: Any, file: str) -> Where:
    data = (node.lc.data or {}).get(key)
    return Where(file, data[0] + 1, data[1] + 1) if data else Where(file, node.lc.line + 1, node.lc.col + 1)


def _value_place(node: CommentedMap, key: Any, file: str) -> Where | None:
    data = (node.lc.data or {}).get(key)
    return Where(file, data[2] + 1, data[3] + 1) if data and len(data) >= 4 else None


def scalar(text: str, file: str) -> Any:
    """The value of `--set path=VALUE`: YAML, so that 3e-4 is a number and [a, b] a list."""
    document = parse(f"value: {text}" if text.strip() else 'value: ""', file)
    return document.data["value"]


def assign(document: Document, path_text: str, value: Any, where: Where, removable: bool = True) -> Problem | None:
    """Put a value at `a.b.c` (names may hold dots; lists take an index). Returns the problem if the way is not there."""
    parts = path_text.split(".")
    current: Any = document.data
    path: Path = ()
    while parts:
        step, used = _match(current, parts)
        rest = parts[used:]
        if isinstance(current, list):
            if not isinstance(step, int) or not 0 <= step < len(current):
                return Problem(where, f"'{path_text}': no item {parts[0]!r} in a list of {len(current)}")
        elif rest and step not in current:
            if not path and step not in TOP_LEVEL:
                return Problem(where, f"'{path_text}': nothing called {step!r}", did_you_mean(str(step), TOP_LEVEL))
            if len(path) == 1 and path[0] in ("sizes", "stages", "variants", "backends") or path[-2:] in _NAMED:
                return Problem(where, f"'{path_text}': {'.'.join(map(str, path))} has no {step!r}", did_you_mean(str(step), current))
            current[step] = {}
        path = (*path, step)
        if not rest:
            for table in (document.keys, document.values):
                for known in [p for p in table if p[: len(path)] == path]:
                    del table[known]
            current[step] = value
            document.keys[path] = document.values[path] = where
            return None
        if not isinstance(current[step], dict | list):
            current[step] = {}
        current = current[step]
        parts = rest
    return None


TOP_LEVEL = (
    "family", "arch", "sizes", "groups", "tokenizer", "data", "stages", "variants", "evals", "exports", "gates",
    "targets", "backends", "place", "release", "profiles",
)  # fmt: skip
_NAMED = {("data", "sources"), ("data", "mixes"), ("data", "clean")}


def _match(current: Any, parts: list[str]) -> tuple[str | int, int]:
    """The longest run of parts that names something here: sizes are called 0.6b."""
    if isinstance(current, list):
        return (int(parts[0]) if parts[0].isdigit() else parts[0]), 1
    for used in range(len(parts), 0, -1):
        name = ".".join(parts[:used])
        if name in current:
            return name, used
    return parts[0], 1


def walk(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every value with its path, parents first."""
    yield path, value
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from walk(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from walk(item, (*path, index))


def nearest(word: str, known: list[str]) -> str | None:
    """The known word that a misspelt one most resembles."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.6)), None)
