"""Selectors: which steps a command is about. In: text such as `+0.6b/instruct`, and a graph. Out: names of steps.

    0.6b/sft            a step; also a glob: */sft, data/*
    0.6b/instruct       a variant at a size: the stage behind it and all that scores, exports and releases it
    kind:export         by kind;  size:0.6b, variant:instruct, backend:h100, state:changed (new, cached, blocked, changed)
    +X  X+  +X+         with all that X needs, with all that needs X
    A B                 union (several arguments, or a space);  A,B  intersection
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping

from famc.errors import UsageError, did_you_mean
from famc.graph import Graph

_FIELDS = ("kind", "size", "variant", "backend", "state")


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
    if colon and field in _FIELDS:
        if field == "state":
            if states is None:
                raise UsageError(f"`{core}` needs a store to compare with", "use it with famc plan, build or status")
            found = {n for n in graph.nodes if states.get(n) == value or (value == "modified" and states.get(n) in ("changed", "new"))}
            if value not in ("new", "changed", "cached", "blocked", "modified"):
                raise UsageError(f"`{core}`: unknown state", did_you_mean(value, ("new", "changed", "cached", "blocked", "modified")))
            return found
        found = {n.name for n in graph.nodes.values() if getattr(n, field) is not None and fnmatch.fnmatchcase(str(getattr(n, field)), value)}
        if not found:
            known = {str(getattr(n, field)) for n in graph.nodes.values() if getattr(n, field) is not None}
            raise UsageError(f"`{core}` selects no step", did_you_mean(value, known))
        return found
    if colon:
        raise UsageError(f"`{core}`: unknown selector", did_you_mean(field, _FIELDS))
    found = {name for name in graph.nodes if fnmatch.fnmatchcase(name, core)}
    size, slash, variant = core.partition("/")
    if slash:
        family = graph.spec.family
        for one_size in family.sizes:
            for one_variant in family.variants:
                stage = family.stage_of(one_variant, one_size)
                if stage and fnmatch.fnmatchcase(one_size, size) and fnmatch.fnmatchcase(one_variant, variant):
                    found.add(f"{one_size}/{stage}")
                    found |= {n.name for n in graph.nodes.values() if n.size == one_size and n.variant == one_variant}
    if not found:
        raise UsageError(f"`{core}` selects no step", did_you_mean(core, graph.nodes))
    return found
