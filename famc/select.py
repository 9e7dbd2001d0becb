"""Selectors: which steps a command is about. In: text such as `+0.6b/instruct`, and a graph. Out: names of
steps.

0.6b/sft            a step; also a glob: */sft, data/*
0.6b/instruct       a variant at a size: the stage behind it and all that scores, exports and releases it
kind:export         by kind;  size:0.6b, variant:instruct, backend:h100,
                    state:changed (new, changed, cached, blocked; modified: new or changed)
+X  X+  +X+         with all that X needs, with all that needs X
A B                 union (several arguments, or a space);  A,B  intersection
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping

from famc.errors import UsageError, did_you_mean
from famc.graph import Graph

_FIELDS = ("kind", "size", "variant", "backend", "state")
_STATES = ("new", "changed", "cached", "blocked", "modified")  # modified: new or changed


def select(graph: Graph, texts: Iterable[str], states: Mapping[str, str] | None = None) -> list[str]:
    """The steps that any of the texts means, in graph order. Raises UsageError for one that means nothing.

    `states`: status by step, for `state:`; without it `state:` is refused.
    """
    chosen: set[str] = set()
    for text in texts:
        for part in text.split():
            sets = [_one(graph, term, states) for term in part.split(",") if term]
            if sets:
                chosen |= set.intersection(*sets)
    return [name for name in graph.nodes if name in chosen]


def _one(graph: Graph, term: str, states: Mapping[str, str] | None) -> set[str]:
    up, down = term.startswith("+"), term.endswith("+")
    core = term.strip("+")
    names = _core(graph, core, states)
    result = set(names)
    if up:
        result |= graph.closure(names, up=True)
    if down:
        result |= graph.closure(names, up=False)
    return result


def _core(graph: Graph, core: str, states: Mapping[str, str] | None) -> set[str]:
    field, colon, value = core.partition(":")
    if not colon:
        return _by_name(graph, core)
    if field == "state":
        return _by_state(graph, core, value, states)
    if field not in _FIELDS:
        raise UsageError(f"`{core}`: unknown selector", did_you_mean(field, _FIELDS))
    values = {name: str(v) for name, n in graph.nodes.items() if (v := getattr(n, field)) is not None}
    found = {name for name, v in values.items() if fnmatch.fnmatchcase(v, value)}
    if not found:
        raise UsageError(f"`{core}` selects no step", did_you_mean(value, values.values()))
    return found


def _by_state(graph: Graph, core: str, value: str, states: Mapping[str, str] | None) -> set[str]:
    if value not in _STATES:
        raise UsageError(f"`{core}`: unknown state", did_you_mean(value, _STATES))
    if states is None:
        raise UsageError(f"`{core}` needs a store to compare with", "use it with famc plan, build or status")
    wanted = ("new", "changed") if value == "modified" else (value,)
    return {name for name in graph.nodes if states.get(name) in wanted}


def _by_name(graph: Graph, core: str) -> set[str]:
    found = {name for name in graph.nodes if fnmatch.fnmatchcase(name, core)}
    published: dict[str, set[str]] = {}  # size/variant -> the stage behind it, and all that is made of it
    for size in graph.spec.family.sizes:
        for variant in graph.spec.family.variants:
            stage = graph.spec.family.stage_of(variant, size)
            if stage is not None:
                made = {n.name for n in graph.nodes.values() if (n.size, n.variant) == (size, variant)}
                published[f"{size}/{variant}"] = {f"{size}/{stage}"} | made
    for address, steps in published.items():
        if fnmatch.fnmatchcase(address, core):
            found |= steps
    if not found:
        raise UsageError(f"`{core}` selects no step", did_you_mean(core, {*graph.nodes, *published}))
    return found
