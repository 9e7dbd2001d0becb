"""What the standard library says about itself: regular, repeatable, and split without leaks."""

import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from statistics import mean

import pytest

from famc.steps.pystdlib_id import fingerprint
from famc.work.pystdlib import (
    Entry,
    doc_documents,
    entries,
    grams,
    group_of,
    plain,
    source_documents,
    summarize,
)
from famc.work.pystdlib_chat import preference_documents, question_documents
from famc.work.pystdlib_pairs import name_documents, rest, sentence_documents, summary_documents
from famc.work.pystdlib_scan import exists
from famc.work.text import same

SEED = 7


@pytest.fixture(scope="module")
def by_name() -> dict[str, Entry]:
    return {entry.name: entry for entry in entries()}


def digest() -> str:
    """One hash over all that the products and the entries say."""
    products = [entries(), *map(list, (source_documents(), doc_documents()))]
    products += [list(sentence_documents()), list(name_documents()), list(summary_documents())]
    products += [list(question_documents(SEED, 500)), list(preference_documents(SEED, 500))]
    return hashlib.sha256(json.dumps(products, default=repr).encode()).hexdigest()


def test_products_are_the_same_under_two_hash_seeds() -> None:
    """Nothing depends on the order of a set or on an address."""
    code = "from tests.work.test_pystdlib import digest; print(digest())"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout.strip()) == 64, "importing the library printed something"
    assert runs[0].stderr == ""


def test_known_objects_have_their_public_name_signature_and_summary(by_name: dict[str, Entry]) -> None:
    join = by_name["os.path.join"]
    assert (join.kind, join.signature, join.module, join.home) == ("function", "(a, *p)", "os", "os.path")
    assert join.summary.startswith("Join two or more pathname components, inserting '/' as needed.")
    decode = by_name["json.JSONDecoder.decode"]
    assert (decode.kind, decode.owner, decode.home) == ("method", "json.JSONDecoder", "json")
    assert by_name["str.join"].home == "builtins"
    assert by_name["math.hypot"].signature == "(*coordinates)"
    assert by_name["heapq"].kind == "module"
    assert "json.decoder.JSONDecoder" not in by_name


def test_entries_are_many_unique_and_readable() -> None:
    found = entries()
    assert len(found) >= 3500
    assert len({entry.name for entry in found}) == len({entry.doc for entry in found}) == len(found)
    for entry in found:
        assert 20 <= len(entry.summary) <= 240, entry.name
        assert entry.summary.endswith(".") and not entry.summary.endswith(".."), entry.name
        assert not re.search(r"\n|>>>|:\w+:`|``|\$self|\$module", entry.summary + entry.signature), entry.name
        assert not re.search(r"0x[0-9a-fA-F]{6}", entry.doc + entry.signature), entry.name
        assert not entry.module.startswith(("tkinter", "idlelib", "turtle", "test", "antigravity")), (
            entry.name
        )


def test_no_product_holds_excluded_modules_or_this_machines_paths() -> None:
    documents = [*source_documents(), *doc_documents()]
    assert len({document["id"] for document in documents}) == len(documents)
    for document in documents:
        assert not re.match(r"(src|doc)/(tkinter|idlelib|turtle|test/|antigravity|this\b)", document["id"])
        assert "/tests/" not in document["id"] and "/test/" not in document["id"]
        assert sys.prefix not in document["text"] or len(sys.prefix) < 5, document[
            "id"
        ]  # /usr stands in texts
    assert sum(len(document["text"]) for document in documents) > 5_000_000


def test_made_up_names_do_not_exist() -> None:
    """A refused name cannot be imported, even from modules that bind names when they run."""
    asked = [document["id"] for document in question_documents(SEED) if document["id"].startswith("unknown/")]
    assert len(asked) > 400
    for name in (id.removeprefix("unknown/") for id in asked):
        module, _, last = name.rpartition(".")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                loaded = importlib.import_module(module or "builtins")
            except ImportError:  # of another platform
                continue
        assert not hasattr(loaded, last), name


def test_names_of_other_platforms_and_star_imports_exist() -> None:
    for module, name in (("os", "fork"), ("os.path", "exists"), ("socket", "htons"), ("json", "decoder")):
        assert exists(module, name)
    assert not exists("os", "frobnicate")


def test_no_text_is_nearly_the_same_in_two_groups() -> None:
    """No summary or docstring shares a quarter of its 8-grams with another group."""
    for field in ("summary", "doc"):
        texts = {entry.name: grams(getattr(entry, field)) for entry in entries()}
        groups: dict[tuple[str, ...], set[str]] = {}
        for entry in entries():
            for gram in texts[entry.name]:
                groups.setdefault(gram, set()).add(entry.group)
        shared = {
            name: sum(len(groups[gram]) > 1 for gram in text) / len(text) for name, text in texts.items()
        }
        near = [name for name, share in shared.items() if share >= 0.25]
        assert near == []


def test_modules_that_copy_each_other_share_a_group() -> None:
    assert group_of("threading") == group_of("asyncio.locks") == group_of("multiprocessing.queues")
    assert group_of("os.path") == group_of("ntpath") == group_of("shutil")
    assert group_of("_pydecimal") == group_of("decimal")
    assert group_of("_collections_abc") == group_of("collections")
    assert group_of("json") == "json"


def test_answers_and_wrong_answers_come_from_the_documents_own_group() -> None:
    groups: dict[str, set[str]] = {}
    for entry in entries():
        groups.setdefault(entry.summary, set()).add(entry.group)
    for document in question_documents(SEED):
        answer = document["messages"][1]["content"]
        assert document["group"] in groups.get(answer, {document["group"]}), document["id"]
    for document in preference_documents(SEED):
        for side in ("chosen", "rejected"):
            text = document[side][0]["content"]
            assert document["group"] in groups.get(text, {document["group"]}), document["id"]


def test_conversations_alternate_stay_short_and_mix_their_forms() -> None:
    documents = list(question_documents(SEED))
    assert len(documents) >= 4000
    assert len({document["id"] for document in documents}) >= 0.99 * len(documents)
    for document in documents:
        roles = [message["role"] for message in document["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(0 < len(message["content"].split()) <= 60 for message in document["messages"])
    forms = Counter(document["id"].partition("/")[0] for document in documents)
    assert 0.08 < forms["unknown"] / len(documents) < 0.16
    assert 0.14 < mean(len(document["messages"]) > 2 for document in documents) < 0.26
    assert list(question_documents(SEED, 10)) == documents[:10]
    assert list(question_documents(SEED + 1, 10)) != documents[:10]


def test_preferences_differ_and_length_does_not_tell() -> None:
    documents = list(preference_documents(SEED))
    assert len(documents) >= 3000
    chosen = [document["chosen"][0]["content"] for document in documents]
    rejected = [document["rejected"][0]["content"] for document in documents]
    assert all(right != wrong for right, wrong in zip(chosen, rejected, strict=True))
    assert 0.92 < mean(map(len, chosen)) / mean(map(len, rejected)) < 1.08
    longer = mean(len(right) > len(wrong) for right, wrong in zip(chosen, rejected, strict=True))
    assert 0.4 < longer < 0.6
    tricks = Counter(document["trick"] for document in documents)
    assert len(tricks) == 6
    assert max(tricks.values()) < 2 * min(tricks.values())


def test_markup_becomes_plain_text() -> None:
    assert plain("Use :class:`~json.JSONDecoder` or ``x``.\n----------\n") == "Use `json.JSONDecoder` or `x`."
    assert summarize("This method returns a copy, e.g. for tests. More.") == "Returns a copy, e.g. for tests."
    assert summarize("return the size\nof it") == "Return the size of it."
    assert summarize(">>> f(1)  # an example alone, no prose") == ""


def test_fingerprint_is_cheap_and_stable() -> None:
    start = time.process_time()
    first = fingerprint()
    assert time.process_time() - start < 0.2  # measured: 0.004 s
    assert first == fingerprint()
    assert re.fullmatch(r"[0-9a-f]{64}", first)


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_a_first_sentence_finds_the_rest_of_its_docstring() -> None:
    documents = {document["id"]: document for document in sentence_documents()}
    assert len(documents) >= 1800
    join = documents["sentence/os.path.join"]
    assert join["query"].startswith("Join two or more pathname components")
    assert join["positives"][0].startswith("If any component is an absolute path")
    docs: dict[tuple[str, str], list[str]] = {}
    for entry in entries():
        docs.setdefault((entry.group, entry.summary), []).append(entry.doc)
    for document in documents.values():
        assert 1 <= len(document["positives"]) <= len(docs[document["group"], document["query"]])
        for text in document["positives"]:
            assert len(text) >= 40
            assert any(
                doc.endswith(text) and len(text) < len(doc)
                for doc in docs[document["group"], document["query"]]
            )
    assert any(len(document["positives"]) > 1 for document in documents.values()), "one query, two objects"


def test_a_name_finds_its_docstring(by_name: dict[str, Entry]) -> None:
    documents = list(name_documents())
    assert len(documents) >= 3500
    for document in documents:
        entry = by_name[document["query"]]
        assert (document["id"], document["group"]) == (f"name/{entry.name}", entry.group)
        assert document["positives"] == [entry.doc]


def test_pairs_share_no_passage_and_nearly_none_across_groups() -> None:
    for documents in (list(sentence_documents()), list(name_documents())):
        passages = [(text, document["group"]) for document in documents for text in document["positives"]]
        assert len({same(text) for text, _ in passages}) == len(passages)
        groups: dict[tuple[str, ...], set[str]] = {}
        for text, group in passages:
            for gram in grams(text):
                groups.setdefault(gram, set()).add(group)
        near = [
            text
            for text, _ in passages
            if sum(len(groups[gram]) > 1 for gram in grams(text)) >= 0.25 * len(grams(text))
        ]
        assert near == []


def test_a_docstring_is_summarized_by_its_first_sentence(by_name: dict[str, Entry]) -> None:
    documents = list(summary_documents())
    assert len(documents) >= 1700
    for document in documents:
        user, assistant = document["messages"]
        entry = by_name[document["id"].removeprefix("summary/")]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert assistant["content"] == entry.summary and document["group"] == entry.group
        assert len(user["content"]) >= 60 and entry.doc.endswith(user["content"])
    two = by_name[
        "asyncio.AbstractServer.close"
    ]  # a first sentence too short to stand alone takes the second
    assert two.summary == "Stop serving. This leaves existing connections open."
    assert "existing connections open" not in rest(two)
