"""The text of the `pydoc` family: what Python's standard library says about itself.

`entries` keeps every documented public object once; `source_documents` and `doc_documents` are what a base
model reads. `pystdlib_scan` reads the modules, `pystdlib_chat` makes the chat and preference products,
`pystdlib_pairs` what is searched for and found.

A document names its `group`, the unit of the train/held-out split: modules that copy each other share it.
"""

import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from famc.work.pystdlib_scan import (
    LESS_PUBLIC,
    Found,
    is_public,
    namespace,
    public_modules,
    read,
    scan_or_inspect,
    sources,
)

Document = dict[str, Any]

# Modules that copy each other's documentation or code. A module not named here is its own group; what the
# table misses, `without_copies` removes.
_GROUPS = {
    "bytes": "_compression bz2 gzip lzma zlib tarfile zipapp zipfile",
    "code": "ast compileall dis inspect opcode py_compile pyclbr symtable token tokenize",
    "codecs": "codecs encodings",
    "concurrency": "_thread _threading_local asyncio concurrent multiprocessing queue sched threading",
    "containers": "_collections_abc _py_abc _sitebuiltins _weakrefset abc array binascii bisect builtins "
    "collections heapq types typing weakref",
    "debuggers": "bdb cProfile cmd code codeop linecache pdb profile pstats rlcompleter trace traceback "
    "tracemalloc",
    "files": "_pyio fileinput io",
    "imports": "imp importlib modulefinder pkgutil runpy zipimport",
    "mail": "base64 email mailbox mailcap mimetypes quopri uu wsgiref",
    "markup": "_markupbase html pyexpat xml",
    "numbers": "_pydecimal cmath decimal fractions math numbers random secrets statistics",
    "options": "argparse getopt optparse",
    "paths": "filecmp fnmatch genericpath glob nt ntpath nturl2path os pathlib posix posixpath shutil stat "
    "tempfile",
    "pickle": "_compat_pickle copyreg dbm marshal pickle pickletools shelve",
    "protocols": "ftplib imaplib nntplib poplib smtpd smtplib telnetlib",
    "regex": "re sre_compile sre_constants sre_parse",
    "sockets": "asynchat asyncore select selectors socket socketserver ssl",
    "sound": "aifc audioop chunk sndhdr sunau wave",
    "sysconfig": "_aix_support _bootsubprocess _osx_support sysconfig",
    "time": "_strptime calendar datetime time zoneinfo",
    "web": "cgi cgitb http urllib xmlrpc",
}
_GROUP_OF = {module: group for group, modules in _GROUPS.items() for module in modules.split()}

_RENAMED = {"posixpath": "os.path", "builtins": "", "xml.etree.cElementTree": "xml.etree.ElementTree"}

_MIN_DOC, _MIN_SUMMARY, _MAX_SUMMARY, _MAX_SIGNATURE = 40, 20, 240, 120  # characters
_NEAR = 0.25


@dataclass(frozen=True, slots=True)
class Entry:
    """One documented object."""

    name: str  # public dotted name: `os.path.join`, `json.JSONDecoder.decode`
    kind: str  # function | class | method | module
    signature: str  # `(a, *p)`, or empty where it is unknown
    doc: str  # the whole docstring, cleaned
    summary: str  # its first sentence on one line, with its full stop
    module: str  # top module: `os`, `json`

    @property
    def home(self) -> str:
        """The module one imports to reach it: `os.path` for `os.path.join`."""
        if self.module == "builtins" or self.kind == "module":
            return self.module if self.module == "builtins" else self.name
        return self.name.rsplit(".", 2 if self.kind == "method" else 1)[0]

    @property
    def owner(self) -> str:
        """The class of a method; the module of anything else."""
        return self.name.rsplit(".", 1)[0] if self.kind == "method" else self.home

    @property
    def group(self) -> str:
        """The unit of the train/held-out split."""
        return group_of(self.module)


@cache
def group_of(module: str) -> str:
    """The split group of a module: `os.path` and `shutil` are both in `paths`."""
    top = module.partition(".")[0]
    public = re.sub(r"^_(?:py)?", "", top)
    return (
        _GROUP_OF.get(top) or _GROUP_OF.get(public) or (public if public in sys.stdlib_module_names else top)
    )


# ---------------------------------------------------------------- entries


@cache
def entries() -> tuple[Entry, ...]:
    """Every documented public object once, sorted by name. Equal texts stay with their most public name."""
    found: list[Entry] = []
    for module in public_modules():
        shown = _RENAMED.get(module, module)
        top = module.partition(".")[0] if shown == module else shown.partition(".")[0] or "builtins"
        for inner, value in (
            {"": Found("module", "", scan_or_inspect(module).doc)} | namespace(module)
        ).items():
            name = f"{shown}.{inner}".strip(".") or "builtins"
            if value.kind != "property" and is_public(inner) and (entry := _entry(name, value, top)):
                found.append(entry)
    found.sort(
        key=lambda entry: (entry.module in LESS_PUBLIC, entry.name.count("."), len(entry.name), entry.name)
    )
    kept: dict[str, Entry] = {}
    names: set[str] = set()
    for entry in found:
        if entry.name not in names and entry.doc not in kept:
            kept[entry.doc] = entry
            names.add(entry.name)
    alone = without_copies(kept.values(), lambda entry: (entry.summary, entry.doc))
    return tuple(sorted(alone, key=lambda entry: entry.name))


def grams(text: str, size: int = 8) -> set[tuple[str, ...]]:
    """The word 8-grams of a text; all of it where it is shorter."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[at : at + size]) for at in range(max(1, len(words) - size + 1))}


def without_copies(found: Iterable[Entry], texts_of: Callable[[Entry], Sequence[str]]) -> Iterator[Entry]:
    """Drop what has a text that shares `_NEAR` of its 8-grams with another group: a split by group must leak
    nothing."""
    groups: dict[tuple[str, ...], str] = {}
    for entry in found:
        texts = [grams(text) for text in texts_of(entry)]
        near = [
            sum(groups.get(gram, entry.group) != entry.group for gram in text) / len(text) for text in texts
        ]
        if max(near) < _NEAR:
            yield entry
            for gram in set[tuple[str, ...]]().union(*texts):
                groups.setdefault(gram, entry.group)


def _entry(name: str, value: Found, module: str) -> Entry | None:
    signature, doc = _split_signature(name, plain(value.doc))
    signature = value.signature or signature
    if len(signature) > _MAX_SIGNATURE or "\n" in signature or value.kind == "module":
        signature = ""
    if len(doc) < _MIN_DOC or not (summary := summarize(doc)) or last_name(name) == "test":
        return None
    if summary.startswith(f"{last_name(name)}("):  # a signature that `_split_signature` could not read
        return None
    return Entry(name, value.kind, signature, doc, summary, module)


_CALLED = re.compile(r"(?:[A-Za-z_]\w*\.)*([A-Za-z_]\w*)(\([^\n]*?\))(?![\w(.])")  # `D.pop(k[,d])`


def _split_signature(name: str, doc: str) -> tuple[str, str]:
    """Take a leading `D.pop(k[,d]) -> v, remove …` off a docstring."""
    last = last_name(name)
    signature = ""
    while (hit := _CALLED.match(doc)) and hit[1] == last:
        rest = doc[hit.end() :]
        line, _, after = rest.partition("\n")
        result = re.match(r"\s*->\s*(.*)", line)
        if result is None and line.strip() and not re.match(r"\s*(?:--|[-:=.\u2014]|\s)\s*\w", line):
            break  # the sentence goes on: `open(x) opens …`
        again = _CALLED.match(after.strip())
        if result and again and again[1] == last:
            rest = after  # `set() -> new empty set object`, and the next form on the next line
        elif result and (len(result[1].split()) > 3 or not after.strip()):
            words = re.sub(r"^[\w.]{1,12}\.\s+(?=[A-Z])", "", result[1])  # `None.  Update D from …`
            rest = (words if words != result[1] else f"Return {words}") + "\n" + after
        elif result:
            rest = after
        else:
            rest = re.sub(r"^[\s:=.\u2014-]+", "", rest)
        if not rest.strip():
            break
        signature, doc = signature or hit[2], rest.strip()
    return signature, doc


def last_name(name: str) -> str:
    """`join` of `os.path.join`."""
    return name.rpartition(".")[2]


# ---------------------------------------------------------------- cleaning text

_PLAIN: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r":(?:[a-z]+:)?[a-z]+:`[~!]?([^`<\n]+?)(?:\s*<[^>`]*>)?`"),
        r"`\1`",
    ),  # :class:`~json.JSONDecoder`
    (re.compile(r"``([^`]{1,120})``"), r"`\1`"),
    (re.compile(r"`([^`'\n]{1,40})'"), r"`\1`"),  # `quoted' as in TeX
    (re.compile(r"^ *[-=~*^#]{4,} *$\n?", re.MULTILINE), ""),  # underlined titles
    (re.compile(r"\b0x[0-9a-f]{6,}\b", re.IGNORECASE), "0x..."),
    (re.compile(r"[ \t]+$", re.MULTILINE), ""),
    (re.compile(r"\n{3,}"), "\n\n"),
)
_ABBREVIATIONS = re.compile(r"(?:\b(?:e\.g|i\.e|a\.k\.a|etc|vs|cf|resp|approx|Dr|Mr|No|St)|\b[A-Z])\.$")
_NO_PROSE = re.compile(
    r">>>|\.\. |::|[=-]>|\||@\w|\*\w|:param|__\w*$|\$Id|copyright|\b(?:as follows|the following|arguments)\.$"
    r"|^(?:usage|synopsis|args|xxx|deprecated|note|todo)\b|^[\W\d]|^\w\(",
    re.IGNORECASE,
)


def _upper(hit: re.Match[str]) -> str:
    return hit[1].upper()


_OPENINGS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"^This (?:is )?(an?|the) (?=\w)"), lambda hit: hit[1].capitalize() + " "),
    # `This method returns …`, but not `This class is …` or `… can …`
    (re.compile(r"^This (?:function|method|class|module|routine|exception) (\w)(?=\w\w+s )"), _upper),
    (re.compile(r"^(?:[A-Z]\w*\.)?[a-z_]\w*\(\) (?=[a-z]+s\b)"), lambda hit: ""),
    (re.compile(r"^([a-z])(?=[a-z]* )"), _upper),
)


def plain(doc: str) -> str:
    """A docstring without reStructuredText roles, doubled backticks, underlines and addresses."""
    for pattern, replacement in _PLAIN:
        doc = pattern.sub(replacement, doc)
    return doc.strip()


def sentences(doc: str) -> list[str]:
    """The sentences of the first paragraph, each on one line; lists and examples end it."""
    lines: list[str] = []
    for line in doc.split("\n\n")[0].splitlines():
        if lines and re.match(r"\s*(?:[-*+]|\d+[.)]|>>>)\s", line):
            break
        lines.append(line.strip())
    parts: list[str] = []
    for part in re.split(r"(?<=[.!?])\s+(?=[A-Z`'\"(]|[a-z_]+\()", " ".join(" ".join(lines).split())):
        if parts and _ABBREVIATIONS.search(parts[-1]):
            parts[-1] += " " + part
        else:
            parts.append(part)
    return parts


def opening(doc: str) -> str:
    """The first sentence as it stands, but on one line; with the second where it says too little."""
    parts = sentences(doc)
    return f"{parts[0]} {parts[1]}" if len(parts[0]) < _MIN_SUMMARY and len(parts) > 1 else parts[0]


def summarize(doc: str) -> str:
    """The first sentence that reads on its own, or nothing."""
    text = opening(doc)
    for pattern, better in _OPENINGS:
        text = pattern.sub(better, text)
    text = text.rstrip(" .:;,!?") + "."
    balanced = text.count("`") % 2 == 0 and all(
        text.count(left) == text.count(right) for left, right in ("()", "[]")
    )
    if not balanced or not _MIN_SUMMARY <= len(text) <= _MAX_SUMMARY or len(text.split()) < 3:
        return ""
    return "" if _NO_PROSE.search(text) else text


# ---------------------------------------------------------------- documents


def source_documents() -> Iterator[Document]:
    """Every source of the library, whole; public modules first."""
    for module, path in sorted(sources().items(), key=lambda item: (not is_public(item[0]), item)):
        text = read(path)
        if text.strip():
            yield {"id": f"src/{path}", "text": text, "group": group_of(module)}


def doc_documents() -> Iterator[Document]:
    """The reference text of every module, then the topics of `help()`."""
    by_module: dict[str, list[Entry]] = {}
    for entry in entries():
        by_module.setdefault(entry.home, []).append(entry)
    for module, members in sorted(by_module.items()):
        members.sort(key=lambda entry: (entry.kind != "module", entry.name))
        text = "\n\n".join(f"{entry.name}{entry.signature}\n{_indent(entry.doc)}" for entry in members)
        yield {"id": f"doc/{module}", "text": text + "\n", "group": group_of(module)}
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for topic, text in sorted(topics.items()):
        yield {"id": f"topic/{topic}", "text": plain(text) + "\n", "group": "topics"}


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.splitlines())
