"""YAML text -> plain values, and the place of each. In: text. Out: Document and problems. YAML 1.2, no tags,
no objects.

`3e-4` is a number, `no` is a string, duplicate keys are errors. Anchors work; a document that they blow up
is refused. The text is only composed (ruamel's node tree): nothing is constructed but str, int, float,
bool, None, dict and list.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from famc.errors import Problem, SpecError, Where, did_you_mean

Path = tuple[str | int, ...]
MAX_BYTES = 64_000  # a spec is a page or two, not a data set
MAX_NODES = 20_000  # ... and an alias bomb is no spec
MAX_DEPTH = 40
# sections of the whole spec, and those whose entries users name
SECTIONS = (
    "famc", "family", "arch", "sizes", "groups", "tokenizer", "data", "stages", "variants", "evals",
    "exports", "gates", "targets", "backends", "place", "release", "profiles",
)  # fmt: skip
NAMED: frozenset[Path] = frozenset(
    {(s,) for s in ("sizes", "groups", "stages", "variants", "evals", "targets", "backends", "profiles")}
    | {("data", "sources"), ("data", "mixes"), ("data", "clean")}
)
_TAG = "tag:yaml.org,2002:"


@dataclass
class Document:
    """Plain values with their places. `where(path)` is the value's own place, or its nearest ancestor's."""

    file: str
    data: dict[str, Any] = field(default_factory=dict)
    keys: dict[Path, Where] = field(default_factory=dict)
    values: dict[Path, Where] = field(default_factory=dict)
    lost: set[Path] = field(default_factory=set)  # what could not be read as a value: told already
    memo: dict[str, Any] = field(
        default_factory=dict
    )  # what others keep beside a spec, such as digests of files

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
        return Problem(self.where(path, key=key), _one_line(message), _one_line(hint))

    def at(self, path: Path) -> Any:
        """The value at a path; None where there is none."""
        value: Any = self.data
        for part in path:
            if isinstance(value, dict) and part in value:
                value = value[str(part)]
            elif isinstance(value, list | tuple) and isinstance(part, int) and 0 <= part < len(value):
                value = value[part]
            else:
                return None
        return value


def _one_line(text: str) -> str:
    """A user's words may hold line ends; a message may not."""
    return " ".join(text.splitlines()) if len(text.splitlines()) > 1 else text


def parse(text: str, file: str) -> tuple[Document, list[Problem]]:
    """YAML text -> Document, and what is wrong in it. Raises SpecError where nothing is left to read."""
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        raise _stop(
            file, f"{size:,} bytes long: a spec has at most {MAX_BYTES:,}", "data belongs in files of its own"
        )
    node = _compose(text, file)
    if not isinstance(node, MappingNode):
        what = "empty" if node is None else "no mapping"
        raise _stop(file, f"the spec is {what}", "it starts with 'famc: 1'; famc init writes a first one")
    reader = _Reader(Document(file))
    reader.document.data = reader.value(node, ())
    return reader.document, reader.problems


def _stop(file: str, message: str, hint: str = "", line: int = 1, column: int = 1) -> SpecError:
    return SpecError([Problem(Where(file, line, column), message, hint)])


def _compose(text: str, file: str) -> Node | None:
    """The node tree. A syntax error ends the reading: what follows it can't be told."""
    old = re.match(r"\ufeff?%YAML\s+(?!1\.2\b)(\S+)", text)
    if old:
        raise _stop(file, f"YAML {old[1]} is not read here: a spec is YAML 1.2", "remove the line")
    if _too_deep(text):
        raise _stop(file, "nested too deeply")
    try:
        return YAML(typ="rt", pure=True).compose(text)  # type: ignore[no-any-return]  # ruamel is untyped here
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = (error.problem or error.context or "not YAML").strip()
        line, column = (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)
        raise _stop(file, *_plain_words(problem), line=line, column=column) from None
    except (
        YAMLError,
        ValueError,
        RecursionError,
        TypeError,
        AttributeError,
        NotImplementedError,
        KeyError,
    ) as error:
        character = getattr(error, "character", None)
        if isinstance(error, RecursionError):
            raise _stop(file, "nested too deeply") from None
        if character is not None:
            position = int(getattr(error, "position", 0))
            line = text.count("\n", 0, position) + 1
            column = position - text.rfind("\n", 0, position)
            code = ord(character) if isinstance(character, str) else int(character)
            what = f"not valid YAML: the character U+{code:04X} can't stand in a spec"
            raise _stop(file, what, line=line, column=column) from None
        raise _stop(file, f"not valid YAML: {(str(error).splitlines() or ['?'])[0]}") from None


def _too_deep(text: str) -> bool:
    """Far more brackets open than any spec has: ruamel would take seconds to say so."""
    depth = 0
    for mark in re.finditer(r"[\[\]{}]", text):
        depth += 1 if mark[0] in "[{" else -1 if depth else 0
        if depth > 20 * MAX_DEPTH:
            return True
    return False


def _plain_words(problem: str) -> tuple[str, str]:
    """(message, hint) for what users really get wrong; else the parser's own words."""
    if "\\t" in problem:
        return "a tab can't indent YAML", "use spaces"
    if problem.startswith("mapping values are not allowed"):
        return "a ':' can't stand here", "quote text that holds ': ', and give each key a line of its own"
    if problem.startswith("found undefined alias"):
        name = problem.rpartition(" ")[2]
        return f"no anchor is called {name}", "define it before it is used, or quote text that starts with *"
    if problem.startswith("but found another document"):
        return "a second document starts here", "a file holds one spec: remove '---'"
    if problem.startswith("found character"):
        return (
            f"not valid YAML: text can't start with {problem.partition('character ')[2].partition(' ')[0]}",
            "quote it",
        )
    if "<stream end>" in problem or "end of stream" in problem:
        return "the file ends inside brackets or quotes", "close what is open"
    if "<block end>" in problem:
        return "this does not fit what stands above", "check the indentation, the commas and the quotes"
    return f"not valid YAML: {problem}", ""


class _Reader:
    """Nodes -> values, with places and problems noted on the way."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.problems: list[Problem] = []
        self.seen = 0
        self.merging: set[int] = set()

    def place(self, node: Node) -> Where:
        mark = node.start_mark
        return Where(self.document.file, mark.line + 1, mark.column + 1)

    def wrong(self, node: Node, message: str, hint: str = "") -> None:
        self.problems.append(Problem(self.place(node), message, hint))

    def value(self, node: Node, path: Path) -> Any:
        self.seen += 1
        if self.seen > MAX_NODES or len(path) > MAX_DEPTH:
            what = "too deep" if len(path) > MAX_DEPTH else "too large"
            self.wrong(node, f"the spec is {what} once its anchors are followed")
            raise SpecError(self.problems)
        self.document.values[path] = self.place(node)
        tag = str(node.tag or "")
        if isinstance(node, MappingNode) and tag == f"{_TAG}map":
            return self.mapping(node, path)
        if isinstance(node, SequenceNode) and tag == f"{_TAG}seq":
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, ScalarNode):
            known, value = self.scalar(node, tag.removeprefix(_TAG))
            if known:
                return value
        hint = "write plain text, numbers, lists and mappings"
        self.wrong(node, f"the tag {tag.replace(_TAG, '!!')!r} can't stand in a spec", hint)
        self.document.lost.add(path)
        return None

    def mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        result = self.merged(node, path)
        own: set[str] = set()
        for key_node, value_node in node.value:
            tag = str(key_node.tag or "")
            if tag == f"{_TAG}merge":
                continue
            if not isinstance(key_node, ScalarNode):
                self.wrong(key_node, "a key can't be a list or a mapping", "keys are text")
                continue
            key = str(key_node.value)
            if tag not in (f"{_TAG}str", f"{_TAG}timestamp"):
                self.wrong(key_node, f"the key {key or 'null'} is not text", f'quote it: "{key}"')
                self.document.lost.add((*path, key))
            elif key in own:
                first = self.document.keys[(*path, key)].line
                self.wrong(
                    key_node, f"'{key}' stands here a second time", f"the first is in line {first}: keep one"
                )
            elif _unprintable(key):
                self.wrong(key_node, f"the key {key!r} holds a character that is not text")
            else:
                own.add(key)
                self.forget((*path, key))
                self.document.keys[(*path, key)] = self.place(key_node)
                result[key] = self.value(value_node, (*path, key))
        return result

    def merged(self, node: MappingNode, path: Path) -> dict[str, Any]:
        """What `<<` brings in; of several mappings the first wins."""
        result: dict[str, Any] = {}
        others: list[Node] = []
        for key_node, value_node in node.value:
            if str(key_node.tag or "") == f"{_TAG}merge":
                others += value_node.value if isinstance(value_node, SequenceNode) else [value_node]
        if others and id(node) in self.merging:
            self.wrong(node, "'<<' merges a mapping into itself")
            return result
        self.merging.add(id(node))
        for other in reversed(others):
            if isinstance(other, MappingNode):
                for key in (more := self.mapping(other, path)):
                    result[key] = more[key]
            else:
                self.wrong(other, "'<<' merges mappings only")
        self.merging.discard(id(node))
        return result

    def forget(self, path: Path) -> None:
        """Drop the places of a merged value that is overridden."""
        if path in self.document.keys:
            for table in (self.document.keys, self.document.values):
                for known in [p for p in table if p[: len(path)] == path]:
                    del table[known]

    def scalar(self, node: ScalarNode, tag: str) -> tuple[bool, Any]:
        """(whether the tag is one of a spec's, the value)."""
        text = str(node.value)
        if tag in ("str", "timestamp", "value"):  # YAML 1.2 has no dates: 2024-01-01 is text
            if _unprintable(text):
                self.wrong(node, f"{text[:40]!r} holds a character that is not text")
                return True, "?"
            return True, text
        if tag == "null":
            return True, None
        if tag == "bool" and text.lower() in ("true", "false"):
            return True, text.lower() == "true"
        digits = text.replace("_", "")
        if tag == "int" and (
            match := re.fullmatch(r"([-+]?)(0o[0-7]+|0x[0-9a-fA-F]+|0b[01]+|[0-9]{1,300})", digits)
        ):
            base = {"0o": 8, "0x": 16, "0b": 2}.get(match[2][:2], 10)
            return True, int(
                match[1] + match[2].removeprefix("0o").removeprefix("0x").removeprefix("0b"), base
            )
        if tag == "int" and digits.lstrip("+-").isdecimal():
            return True, text  # hundreds of digits: no number of a spec
        if tag == "float":
            try:
                value = float(digits.lower().replace(".inf", "inf").replace(".nan", "nan"))
            except ValueError:
                return False, None
            overflown = math.isinf(value) and "inf" not in text.lower()
            return True, text if overflown else value
        return False, None


def _unprintable(text: str) -> bool:
    return any(
        (ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 for c in text
    )


def scalar(text: str, where: Where) -> Any:
    """The value of `--set path=VALUE`: YAML, so that 3e-4 is a number and [a, b] a list. Raises SpecError."""
    try:
        document, problems = parse(f"value: {text}" if text.strip() else 'value: ""', str(where))
    except SpecError as error:
        problems, document = error.problems, Document(str(where))
    if not problems and set(document.data) != {"value"}:
        problems = [Problem(where, "expected one value")]
    if problems:
        raise SpecError(Problem(where, p.message, p.hint) for p in problems)
    return document.data["value"]


def assign(document: Document, target: str, value: Any, where: Where) -> Path | Problem:
    """Put a value at `a.b.c` (names may hold dots; lists take an index, and the one after the last adds an item).
    Returns the path, or why there is no way there.
    """
    parts = target.split(".")
    current: Any = document.data
    path: Path = ()
    while True:
        step, used = _match(current, parts)
        parts = parts[used:]
        if isinstance(current, list):
            if not parts and step == len(current):
                current.append(None)
            if not isinstance(step, int) or step >= len(current):
                return Problem(where, f"'{target}': no item {step!r} in a list of {len(current)}")
        elif step not in current:
            if not path and step not in SECTIONS:
                return Problem(
                    where, f"'{target}': nothing is called '{step}'", did_you_mean(str(step), SECTIONS)
                )
            if parts and path in NAMED and current:
                label = ".".join(map(str, path))
                return Problem(
                    where, f"'{target}': {label} has no '{step}'", did_you_mean(str(step), current)
                )
        path = (*path, step)
        if not parts:
            break
        if isinstance(current, dict) and not isinstance(current.get(step), dict | list):
            current[step] = {}
        current = current[step]
        if not isinstance(current, dict | list):
            return Problem(where, f"'{target}': {'.'.join(map(str, path))} is no mapping")
    for table in (document.keys, document.values):
        for known in [p for p in table if p[: len(path)] == path]:
            del table[known]
    current[step] = value
    document.keys[path] = document.values[path] = where
    return path


def _match(current: Any, parts: list[str]) -> tuple[str | int, int]:
    """The longest run of parts that names something here: sizes are called 0.6b."""
    if isinstance(current, list):
        return (int(parts[0]) if re.fullmatch(r"[0-9]{1,6}", parts[0]) else parts[0]), 1
    for used in range(len(parts), 0, -1):
        name = ".".join(parts[:used])
        if name in current:
            return name, used
    return parts[0], 1
