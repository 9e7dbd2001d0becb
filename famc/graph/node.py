"""What a graph is made of: steps with every concrete value, and edges by name. Pure data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from famc.cost.shape import Shape
from famc.spec.load import Spec
from famc.steps.base import Work
from famc.steps.others import SMALL


@dataclass(frozen=True)
class Node:
    """One step. `params` bear identity; `runtime` moves work around; `origins` say where values came from."""

    name: str
    kind: str
    size: str | None = None
    variant: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    runtime: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    shape: Shape | None = None
    work: Work = SMALL
    backend: str | None = None
    missing: tuple[str, ...] = ()  # what is needed to run and is not on this machine

    @property
    def needs(self) -> tuple[str, ...]:
        """All steps that must be done before, in a stable order."""
        return tuple(dict.fromkeys((*self.inputs.values(), *self.after)))


@dataclass(frozen=True)
class Graph:
    """Steps in an order in which each stands after what it needs."""

    nodes: Mapping[str, Node]
    spec: Spec

    @cached_property
    def followers(self) -> dict[str, list[str]]:
        """For each step, those that need it."""
        result: dict[str, list[str]] = {name: [] for name in self.nodes}
        for node in self.nodes.values():
            for need in node.needs:
                result[need].append(node.name)
        return result

    def networkx(self) -> Any:
        """The graph as networkx.DiGraph: kinds and sizes on nodes, roles on edges. Imported here: it takes
        0.15 s.
        """
        import networkx

        graph = networkx.DiGraph()
        for node in self.nodes.values():
            graph.add_node(node.name, kind=node.kind, size=node.size, variant=node.variant)
        for node in self.nodes.values():
            for role, need in node.inputs.items():
                graph.add_edge(need, node.name, role=role, identity=True)
            for need in node.after:
                if not graph.has_edge(need, node.name):
                    graph.add_edge(need, node.name, role="after", identity=False)
        return graph

    def closure(self, names: Iterable[str], *, up: bool) -> set[str]:
        """The steps named and all that they need (up) or that needs them (down)."""
        todo, seen = list(names), set()
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo.extend(self.nodes[name].needs if up else self.followers[name])
        return seen


def ordered(nodes: Mapping[str, Node]) -> dict[str, Node]:
    """Needs first; among the ready, the order in which they were found."""
    done: dict[str, Node] = {}
    for start in nodes:
        stack: list[tuple[str, int]] = [(start, 0)]
        while stack:
            name, position = stack.pop()
            if name in done:
                continue
            needs = nodes[name].needs
            while position < len(needs) and needs[position] in done:
                position += 1
            if position == len(needs):
                done[name] = nodes[name]
            else:
                stack += [(name, position + 1), (needs[position], 0)]
    return done
