"""Pairs are read whole or not at all, cleaned and mixed like the rest, and never on both sides of a split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_corpus import CLEAN, lines, make
from test_mix import run, tokenizer  # noqa: F401 - a fixture
from transformers import AutoTokenizer

from famc.errors import StepFailed
from famc.work.text import Pair, Writer, contents, digest, dumps, from_columns, joined, mapped, to_columns

LONG = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron"


def read(tmp_path: Path, *rows: Any, **more: Any) -> tuple[Any, ...]:
    name = f"c{len(list(tmp_path.iterdir()))}"
    path = lines(tmp_path / f"{name}.jsonl", list(rows))
    return make(tmp_path / name, path, format="pairs", **more)


def bodies(side: list[dict[str, Any]]) -> list[Any]:
    return [from_columns(row) for row in side]


def test_one_positive_or_several_with_and_without_negatives(tmp_path: Path) -> None:
    rows = [
        {"query": "a", "positive": "first"},
        {"query": "b", "positives": ["second", "third", "second "], "negatives": ["fourth"]},
        {"id": "mine", "query": "c", "positive": "fifth", "negative": "sixth", "note": 7},
    ]
    _, sides, stats = read(tmp_path, *rows, fraction=0)
    assert list(sides["train"][0]) == ["id", "group", "query", "positives", "negatives"]
    assert sides["train"][1]["positives"] == '["second","third"]', "copies within a record count once"
    assert bodies(sides["train"]) == [
        Pair("a", ("first",)),
        Pair("b", ("second", "third"), ("fourth",)),
        Pair("c", ("fifth",), ("sixth",)),
    ]
    assert [row["id"] for row in sides["train"]] == ["c0.jsonl:1", "c0.jsonl:2", "mine"]
    assert stats["train"]["characters"] == len("afirstbsecondthirdfourthcfifthsixth")


def test_parquet_holds_lists_and_nulls(tmp_path: Path) -> None:
    """As datasets of the hub are stored: a column that some records leave empty is null there."""
    table = pa.table(
        {
            "query": ["a", "b"],
            "positive": ["first", None],
            "positives": [None, ["second", "third"]],
            "negatives": [None, ["fourth"]],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    _, sides, _ = make(tmp_path / "out", tmp_path / "x.parquet", format="pairs", fraction=0)
    assert bodies(sides["train"]) == [Pair("a", ("first",)), Pair("b", ("second", "third"), ("fourth",))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "a"}, "a pair without positives"),
        ({"query": "a", "positives": []}, "a pair without positives"),
        ({"query": "a", "positive": None}, "a pair without positives"),
        ({"positive": "x"}, "no field 'query'"),
        ({"query": " ", "positive": "x"}, "an empty query"),
        ({"query": 3, "positive": "x"}, "'query' is a number instead of text"),
        ({"query": "a", "positive": 3}, "'positive' is a number instead of text"),
        ({"query": "a", "positive": ["x"]}, "'positive' is a list instead of text"),
        ({"query": "a", "positives": "x"}, "'positives' is text instead of a list of texts"),
        ({"query": "a", "positives": ["x", None]}, "positives[1] is null instead of text"),
        ({"query": "a", "positives": ["x", " "]}, "positives[1] is empty"),
        ({"query": "a", "positive": "x", "positives": ["y"]}, "both 'positive' and 'positives'"),
        ({"query": "a b", "positive": "a  b\n"}, "a positive equal to the query"),
        ({"query": "a", "positive": "x", "negatives": ["y", "x "]}, "negatives[1] is also a positive"),
        ({"query": "a", "positive": "x", "negatives": [{}]}, "negatives[0] is an object instead of text"),
        ("text", "text instead of an object"),
    ],
)
def test_a_malformed_record_stops_the_step_with_its_line(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(StepFailed) as error:
        read(tmp_path, {"query": "fine", "positive": "passage"}, row)
    assert f"c0.jsonl:2: {message}" in error.value.message


def test_a_misspelt_field_is_named(tmp_path: Path) -> None:
    with pytest.raises(StepFailed) as error:
        read(tmp_path, {"query": "a", "postive": "x"})
    assert "did you mean 'postive'" in error.value.hint and "'positives' a list" in error.value.hint


def test_the_recipes_filters_see_every_text(tmp_path: Path) -> None:
    """normalize repairs all of them, length counts all of them, dedup compares query and positives."""
    rows = [
        {"query": "cafe\u0301", "positive": "e\u0301", "negatives": ["o\u0308"]},
        {"query": "same", "positive": "passage", "negatives": ["first"]},
        {"query": "same", "positive": "passage", "negatives": ["second"]},
        {"query": "same", "positives": ["passage", "another"]},
        {"query": "x", "positive": "y" * 20_000},
    ]
    metrics, sides, _ = read(tmp_path, *rows, filters=CLEAN, fraction=0)
    assert (metrics["dropped_length"], metrics["dropped_dedup"]) == (1, 1)
    assert bodies(sides["train"]) == [
        Pair("caf\u00e9", ("\u00e9",), ("\u00f6",)),
        Pair("same", ("passage",), ("first",)),
        Pair("same", ("passage", "another")),
    ]


def test_a_body_survives_disk_and_change() -> None:
    body = Pair("q", ("a", "b"), ("c",))
    assert from_columns(to_columns(body)) == body
    assert mapped(body, str.upper) == Pair("Q", ("A", "B"), ("C",))
    assert contents(body) == ["q", "a", "b", "c"] and joined(body) == "q\na\nb\nc"
    assert digest(body) == digest(Pair("q", ("a", "b"))) != digest(Pair("q", ("a",), ("b",)))


# --- leaks --------------------------------------------------------------------------------------------------


def leaking(count: int) -> list[dict[str, Any]]:
    """Each passage twice, with other words, under other queries; every record is a group of its own."""
    return [
        {"query": f"q{i}", "positive": f"Passage {i // 2}" if i % 2 else f"passage\n{i // 2} "}
        for i in range(count)
    ]


def test_a_passage_on_both_sides_is_refused_with_both_places(tmp_path: Path) -> None:
    with pytest.raises(StepFailed) as error:
        read(tmp_path, *leaking(200), fraction=0.3)
    message = error.value.message
    count = int(message.split()[0])
    assert 20 < count < 70 and "passages are both in training and held out" in message
    assert message.count("(train)") == message.count("(held out)") == 3, "the first three, not all"
    assert message.endswith(", …") and message.count("c0.jsonl:") == 6
    assert "group_field" in error.value.hint and "heldout" in error.value.hint
    first = [int(part.split()[0]) - 1 for part in message.split("c0.jsonl:")[1:3]]
    assert first[0] // 2 == first[1] // 2, "both places hold the same passage"


def test_own_ids_are_named_beside_the_line(tmp_path: Path) -> None:
    rows = [{"id": f"doc-{i}", "query": f"q{i}", "positive": "the only passage"} for i in range(30)]
    with pytest.raises(StepFailed, match=r"1 passage is both .*c0.jsonl:\d+ \(doc-\d+\) \(train\) and "):
        read(tmp_path, *rows, fraction=0.3)


def test_a_shared_group_cures_it(tmp_path: Path) -> None:
    """The document that both come from, or the passage itself; and nothing leaks where nothing is held out."""
    rows = [{**row, "document": f"d{i // 2}"} for i, row in enumerate(leaking(200))]
    _, sides, stats = read(tmp_path, *rows, fraction=0.3, group_field="document")
    assert len(sides["train"]) + len(sides["heldout"]) == 200 and stats["fallback"] is None
    equal = [{"query": f"q{i}", "positive": f"passage {i // 2}"} for i in range(200)]
    read(tmp_path, *equal, fraction=0.3, group_field="positive")
    read(tmp_path, *leaking(200), fraction=0)
    with pytest.raises(StepFailed, match="both in training and held out"):  # a group that is not used
        read(tmp_path, *rows, fraction=0.3, group_field="document", by="document")


# --- mixes --------------------------------------------------------------------------------------------------


def corpus(folder: Path, train: list[Pair], heldout: list[Pair] | None = None) -> Path:
    folder.mkdir(parents=True)
    for name, found in (("train", train), ("heldout", heldout or [])):
        with Writer(folder / f"{name}.parquet", ("id", "group", "query", "positives", "negatives")) as writer:
            for index, body in enumerate(found):
                writer.add((f"{folder.name}{name}{index}", f"g{index}", *to_columns(body).values()))
    return folder


def test_a_mix_of_pairs_holds_each_once_with_its_source(tmp_path: Path) -> None:
    a = [Pair(f"query {i}", (f"passage {i}",), (f"other {i}",)) for i in range(9)]
    b = [Pair(f"name {i}", (f"text {i}", f"more {i}")) for i in range(3)]
    sources = {"a": corpus(tmp_path / "a", a), "b": corpus(tmp_path / "b", b)}
    metrics, _ = run(tmp_path / "m", None, sources, {"a": 3.0, "b": 1.0}, format="pairs")
    rows = pq.read_table(tmp_path / "m/examples.parquet").to_pylist()
    assert list(rows[0]) == ["id", "group", "source", "query", "positives", "negatives"]
    assert metrics["documents_by_source"] == {"a": 9, "b": 3}
    found = {row["id"]: (row["source"], from_columns(row)) for row in rows}
    assert found["atrain4"] == ("a", a[4]) and found["btrain2"] == ("b", b[2])


def test_tokens_of_pairs_count_query_and_passages(tmp_path: Path, tokenizer: Path) -> None:  # noqa: F811
    bodies = [Pair(f"query {i}", (f"a passage {i}",), ("no",)) for i in range(40)]
    source = corpus(tmp_path / "a", bodies)
    metrics, _ = run(tmp_path / "m", tokenizer, {"a": source}, format="pairs", tokens=300)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    rows = pq.read_table(tmp_path / "m/examples.parquet").to_pylist()
    lengths = [
        sum(len(loaded(text, add_special_tokens=False)["input_ids"]) for text in contents(from_columns(row)))
        for row in rows
    ]
    assert metrics["tokens"] == sum(lengths) and 300 <= sum(lengths) < 300 + max(lengths)


def test_held_out_pairs_are_taken_out_of_text_and_of_pairs(tmp_path: Path, tokenizer: Path) -> None:  # noqa: F811
    """By their query as well as by their passages."""
    question = "who has ever seen how many of these words stand in this very order now"
    held = corpus(
        tmp_path / "held", [Pair("x", ("y",))], [Pair(question, (LONG, "short")), Pair("z", ("ok",))]
    )
    text = tmp_path / "text"
    text.mkdir()
    documents = [f"before {LONG} after", f"so: {question}?", "nothing of it at all"]
    for name, rows in (("train", documents), ("heldout", ["unused"])):
        with Writer(text / f"{name}.parquet", ("id", "group", "text")) as writer:
            for index, body in enumerate(rows):
                writer.add((f"t{index}", f"g{index}", body))
    rule = {"ngram": 8, "against": ["held"]}
    metrics, stats = run(
        tmp_path / "m", tokenizer, {"text": text, "held": held}, {"text": 1.0}, decontaminate=rule
    )
    assert metrics["dropped_contaminated"] == 2 and metrics["documents"] == 1
    assert [e["id"] for e in stats["decontaminated"]["sources"]["text"]["examples"]] == ["t0", "t1"]
    other = corpus(tmp_path / "other", [Pair("a", (LONG,)), Pair("b", ("free",)), Pair("c", ("d",), (LONG,))])
    metrics, _ = run(
        tmp_path / "n",
        None,
        {"other": other, "held": held},
        {"other": 1.0},
        decontaminate=rule,
        format="pairs",
    )
    assert metrics["dropped_contaminated"] == 2
    short = corpus(tmp_path / "short", [Pair("another query", ("OK!",)), Pair("ok", ("fine",))])
    metrics, stats = run(
        tmp_path / "o",
        None,
        {"short": short, "held": held},
        {"short": 1.0},
        decontaminate=rule,
        format="pairs",
    )
    assert metrics["dropped_contaminated"] == 1, "an answer alone, however short, but no query"
    assert stats["decontaminated"]["sources"]["short"]["examples"] == [{"id": "shorttrain0", "shared": "ok"}]
    assert json.loads(pq.read_table(tmp_path / "n/examples.parquet").to_pylist()[0]["positives"]) == ["free"]


def test_the_standard_library_gives_pairs_that_split_without_leaks(tmp_path: Path) -> None:
    for product, fmt in (("sentences", "pairs"), ("names", "pairs"), ("summaries", "messages")):
        metrics, sides, stats = make(
            tmp_path / product, origin="pystdlib", pystdlib=product, format=fmt, fraction=0.1
        )
        assert stats["fallback"] is None and metrics["train_documents"] > 1500
        assert 0.02 < metrics["heldout_fraction"] < 0.2
        groups = [{row["group"] for row in sides[side]} for side in ("train", "heldout")]
        assert groups[1] and not groups[0] & groups[1]
        assert dumps(sides["heldout"][0]).count(product[:4]) >= 1
