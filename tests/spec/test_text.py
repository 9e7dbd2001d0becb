"""What YAML text may and may not do, before anything in it is understood."""

from __future__ import annotations

import time

import pytest

from famc.errors import SpecError
from famc.spec.text import MAX_BYTES, parse


def told(text: str) -> list[str]:
    try:
        return [str(p) for p in parse(text, "f")[1]]
    except SpecError as error:
        return [str(p) for p in error.problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("1_000", 1000), ("0x1F", 31), ("0o17", 15), ("017", 17), ("-2", -2), (".5", 0.5), ("~", None),
        ("no", "no"), ("on", "on"), ("yes", "yes"), ("true", True), ("False", False), ("2024-01-01", "2024-01-01"),
        ("12:30", "12:30"), ("1e99999", "1e99999"), ("9" * 400, "9" * 400), ("'3'", "3"), ("30T", "30T"), ('""', ""),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    document, problems = parse(f"a: {text}", "f")
    assert (document.data["a"], problems) == (value, [])
    assert type(document.data["a"]) is type(value)


def test_every_value_has_its_place() -> None:
    document, _ = parse("a: 1\nb:\n  - x\n  - {c: [y, z]}\n", "f")
    assert str(document.where(("a",))) == "f:1:4"
    assert str(document.where(("b", 1, "c", 1))) == "f:4:13"
    assert str(document.where(("b", 1, "c"), key=True)) == "f:4:6"
    assert str(document.where(("b", 1, "none"))) == "f:4:5", "the nearest thing above what is not there"


@pytest.mark.parametrize(
    "text",
    ["a: &x {b: 1}\nc: *x", "a: &x {b: 1}\nc: {<<: *x}", "a: &x {b: 2, d: 3}\ny: &y {b: 1}\nc: {<<: [*y, *x]}", "x: &x {b: {q: 1}}\nc: {<<: *x, b: 1}"],
)  # fmt: skip
def test_anchors_and_merges(text: str) -> None:
    document, problems = parse(text, "f")
    assert problems == []
    assert document.data["c"]["b"] == 1


def test_override_of_a_merged_value_has_its_own_place() -> None:
    document, _ = parse("x: &x {b: {q: 1}, d: 2}\nc: {<<: *x, b: 3}\n", "f")
    assert str(document.where(("c", "b"))) == "f:2:16"
    assert ("c", "b", "q") not in document.keys
    assert str(document.where(("c", "d"))) == "f:1:22"


def test_all_duplicates_are_told() -> None:
    assert told("a: 1\nb: {c: 1, c: 2}\na: 3\n") == [
        "f:2:11: 'c' stands here a second time; the first is in line 2: keep one",
        "f:3:1: 'a' stands here a second time; the first is in line 1: keep one",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f:1:1: the spec is empty; it starts with 'famc: 1'; famc init writes a first one"),
        ("# nothing\n", "f:1:1: the spec is empty; it starts with 'famc: 1'; famc init writes a first one"),
        ("- a", "f:1:1: the spec is no mapping; it starts with 'famc: 1'; famc init writes a first one"),
        ("plain", "f:1:1: the spec is no mapping; it starts with 'famc: 1'; famc init writes a first one"),
        ("a: !!python/name:os.system x", "f:1:4: the tag '!!python/name:os.system' can't stand in a spec; write plain text, numbers, lists and mappings"),
        ("a: !!binary aGk=", "f:1:4: the tag '!!binary' can't stand in a spec; write plain text, numbers, lists and mappings"),
        ("a: !!set {b, c}", "f:1:4: the tag '!!set' can't stand in a spec; write plain text, numbers, lists and mappings"),
        ("1: a", 'f:1:1: the key 1 is not text; quote it: "1"'),
        ("null: a", 'f:1:1: the key null is not text; quote it: "null"'),
        ("? [a]\n: 1", "f:1:3: a key can't be a list or a mapping; keys are text"),
        ("a: &a {b: *a}", "f:1:4: the spec is too deep once its anchors are followed"),
        ("a: &a {<<: *a}", "f:1:4: '<<' merges a mapping into itself"),
        ("a: {<<: 1}", "f:1:9: '<<' merges mappings only"),
        ("a: *b", "f:1:4: no anchor is called 'b'; define it before it is used, or quote text that starts with *"),
        ("a:\n\tb: 1", "f:2:1: a tab can't indent YAML; use spaces"),
        ("a: b: c", "f:1:5: a ':' can't stand here; quote text that holds ': ', and give each key a line of its own"),
        ("a: [1", "f:1:6: the file ends inside brackets or quotes; close what is open"),
        ("a: 1\n---\nb: 2", "f:2:1: a second document starts here; a file holds one spec: remove '---'"),
        ("%YAML 1.1\n---\na: no", "f:1:1: YAML 1.1 is not read here: a spec is YAML 1.2; remove the line"),
        ("x: 1\na: \x01", "f:2:4: not valid YAML: the character U+0001 can't stand in a spec"),
        ('a: "\\ud800"', "f:1:4: '\\ud800' holds a character that is not text"),
        ("[" * 5000, "f:1:1: nested too deeply"),
        ("a: " * 1, "no problem"),
    ],
    ids=lambda value: ascii(value)[:20],
)  # fmt: skip
def test_text_that_is_no_spec(text: str, message: str) -> None:
    assert told(text) == ([] if message == "no problem" else [message])


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(f"{c}: &{c} [{', '.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)),
        "a: " + "x" * (MAX_BYTES + 1),
        "a: [" + "x," * (MAX_BYTES // 2 - 10) + "]",
        "- " * 20_000, "? " * 20_000, "{a: " * 3000,
    ],
    ids=["alias bomb", "long", "wide", "deep lists", "deep keys", "deep mappings"],
)  # fmt: skip
def test_hostile_text_is_refused_soon(text: str) -> None:
    start = time.perf_counter()
    assert len(told(text)) == 1
    assert time.perf_counter() - start < 5, "2 s on an idle core"
