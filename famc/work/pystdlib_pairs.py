"""Queries with the docstrings that answer them, and docstrings with their summaries, from the entries of `pystdlib`.

A natural question is stood for by a docstring's first sentence, and searched for in what follows it; a symbol by a
dotted name, searched for in the whole docstring, which may hold the name. A passage that two objects share answers
neither query alone, and one that nearly repeats another group's would leak over the split: both are left out.
Objects with the same first sentence (`Wait for the barrier.`) are one query with several passages.
"""

from collections import Counter
from collections.abc import Callable, Iterator

from famc.work.pystdlib import Document, Entry, entries, opening, without_copies
from famc.work.text import same

_MIN_PASSAGE, _MIN_TO_SUMMARIZE = 40, 60  # characters


def sentence_documents() -> Iterator[Document]:
    """First sentence -> the rest of its docstring."""
    return _pairs("sentence", lambda entry: entry.summary, rest)


def name_documents() -> Iterator[Document]:
    """Dotted name -> its docstring."""
    return _pairs("name", lambda entry: entry.name, lambda entry: entry.doc)


def summary_documents() -> Iterator[Document]:
    """A docstring without its first sentence -> the summary that it should get."""
    for entry, passage in _passages(rest):
        if len(passage) >= _MIN_TO_SUMMARIZE:
            turns = (("user", passage), ("assistant", entry.summary))
            messages = [{"role": role, "content": content} for role, content in turns]
            yield {"id": f"summary/{entry.name}", "group": entry.group, "messages": messages}


def rest(entry: Entry) -> str:
    """What a docstring says after its first sentence."""
    end = 0
    for word in opening(entry.doc).split():
        end = entry.doc.index(word, end) + len(word)
    return entry.doc[end:].strip()


def _pairs(
    what: str, query_of: Callable[[Entry], str], passage_of: Callable[[Entry], str]
) -> Iterator[Document]:
    found: dict[tuple[str, str], Document] = {}
    for entry, passage in _passages(passage_of):
        query = query_of(entry)
        new = {"id": f"{what}/{entry.name}", "group": entry.group, "query": query, "positives": []}
        found.setdefault((entry.group, query), new)["positives"].append(passage)
    return iter(found.values())


def _passages(passage_of: Callable[[Entry], str]) -> list[tuple[Entry, str]]:
    """Entries and their passages, by name: those that are long enough, in one entry only and near none of another
    group."""
    passages = {entry: passage_of(entry) for entry in entries()}
    times = Counter(map(same, passages.values()))
    alone = [e for e, text in passages.items() if len(text) >= _MIN_PASSAGE and times[same(text)] == 1]
    return [(entry, passages[entry]) for entry in without_copies(alone, lambda entry: (passages[entry],))]
