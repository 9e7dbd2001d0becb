"""Each form of a selector means what the docstring of select.py says."""

from __future__ import annotations

import pytest
from fake_build import toy_plan

from famc.errors import UsageError
from famc.select import select


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    return toy_plan(tmp_path_factory.mktemp("select")).graph


def chosen(graph, *texts, states=None):
    return set(select(graph, texts, states))


def test_a_step_is_itself(graph):
    assert chosen(graph, "s/sft") == {"s/sft"}


def test_a_glob_is_every_step_that_it_matches(graph):
    assert chosen(graph, "*/sft") == {"s/sft", "m/sft"}
    assert chosen(graph, "data/*") == {"data/code", "data/qa"}
    assert chosen(graph, "*") == set(graph.nodes)


def test_a_variant_is_the_stage_behind_it_and_all_that_is_made_of_it(graph):
    own = {n.name for n in graph.nodes.values() if (n.size, n.variant) == ("s", "instruct")}
    assert {
        "s/instruct/release",
        "s/instruct/eval.chat",
        "s/instruct/export.onnx-int4",
        "s/instruct/gate.onnx-int4",
    } <= own
    assert chosen(graph, "s/instruct") == own | {"s/sft"}
    assert chosen(graph, "*/instruct") == chosen(graph, "s/instruct", "m/instruct")


@pytest.mark.parametrize(
    ("text", "attribute", "value"),
    [("kind:export", "kind", "export"), ("size:s", "size", "s"), ("variant:instruct", "variant", "instruct")],
)
def test_a_field_selects_by_its_value(graph, text, attribute, value):
    assert chosen(graph, text) == {n.name for n in graph.nodes.values() if getattr(n, attribute) == value}


def test_a_field_may_be_a_glob(graph):
    assert chosen(graph, "kind:p*") == chosen(graph, "kind:pretrain", "kind:parity")


def test_backend_selects_by_placement(tmp_path):
    one = "backends: {laptop: {cpu: 2, ram: 8GB}"
    two = ", big: {cpu: 8, ram: 8GB}}\nplace: {default: laptop, '*/sft': big}"
    graph = toy_plan(tmp_path, (one + "}", one + two)).graph
    assert chosen(graph, "backend:big") == {"s/sft", "m/sft"}


def test_plus_before_adds_all_that_is_needed(graph):
    assert chosen(graph, "+s/pretrain") == {"s/pretrain", "mix/text", "tokenizer", "data/code", "data/qa"}


def test_plus_after_adds_all_that_needs_it(graph):
    found = chosen(graph, "s/sft+")
    assert {"s/sft", "s/instruct/release", "s/instruct/eval.chat"} <= found
    assert not found & {"s/pretrain", "m/sft", "m/instruct/release"}


def test_plus_on_both_sides_adds_both(graph):
    assert chosen(graph, "+s/sft+") == chosen(graph, "+s/sft") | chosen(graph, "s/sft+")


def test_a_space_or_several_texts_mean_any(graph):
    assert chosen(graph, "s/sft m/sft") == chosen(graph, "s/sft", "m/sft") == {"s/sft", "m/sft"}


def test_a_comma_means_all(graph):
    assert chosen(graph, "kind:sft,size:s") == {"s/sft"}
    assert chosen(graph, "kind:sft,size:s m/pretrain") == {"s/sft", "m/pretrain"}
    assert chosen(graph, "+s/sft,kind:corpus") == {"data/code", "data/qa"}
    assert chosen(graph, "kind:sft,kind:corpus") == set()


@pytest.mark.parametrize(
    ("state", "names"),
    [("new", {"s/sft"}), ("changed", {"m/sft"}), ("modified", {"s/sft", "m/sft"}), ("blocked", set())],
)
def test_a_state_is_that_of_the_plan(graph, state, names):
    states = dict.fromkeys(graph.nodes, "cached") | {"s/sft": "new", "m/sft": "changed"}
    assert chosen(graph, f"state:{state}", states=states) == names


def test_the_order_is_the_graphs(graph):
    names = list(graph.nodes)
    assert select(graph, reversed(names)) == names


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("s/sfd", "`s/sfd` selects no step", "did you mean 's/sft'?"),
        ("s/instrct", "`s/instrct` selects no step", "did you mean 's/instruct'?"),
        ("kind:exprt", "`kind:exprt` selects no step", "did you mean 'export'?"),
        ("knd:export", "`knd:export`: unknown selector", "did you mean 'kind'?"),
        ("state:new", "`state:new` needs a store to compare with", "use it with famc plan, build or status"),
        ("state:nwe", "`state:nwe`: unknown state", "did you mean 'new'?"),
        ("+", "`` selects no step", "known: "),
        ("x/[", "`x/[` selects no step", "known: "),
    ],
)
def test_a_selector_that_means_nothing_is_refused_with_a_suggestion(graph, text, message, hint):
    with pytest.raises(UsageError) as caught:
        select(graph, [text])
    assert caught.value.message == message
    assert caught.value.hint.startswith(hint)
    assert caught.value.exit_code == 2
