"""Steps and graphs as text for a terminal. In: Planned, Node, Graph. Out: lines; the caller prints them. The page of a whole
plan is plan_page.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from famc.graph import Node
from famc.plan import Plan, Planned
from famc.planning import layout_text
from famc.spec.quantity import show_bytes, show_seconds


def columns(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Rows of text as aligned columns; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numbers = set(right)
    return [
        "  ".join(
            cell.rjust(w) if i in numbers else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def nothing_line(plan: Plan) -> str:
    """What a plan without a step to run comes to."""
    return f"{len(plan.steps)} steps: {len(plan.steps)} cached. Nothing to do."


def show_lines(node: Node, step: Planned | None) -> list[str]:
    """A step with every value and where it came from."""
    rows = [["value", "is", "from"]]
    for name, value in _flat(node.params):
        rows.append(
            [name, _short(value), node.origins.get(name) or node.origins.get(name.partition(".")[0], "")]
        )
    for name, value in _flat(node.runtime):
        rows.append([name, _short(value), (node.origins.get(name) or "") + " (not in the key)"])
    lines = [f"{node.name}  ({node.kind})", "", *columns(rows)]
    if node.inputs:
        lines += ["", "reads:", *(f"  {role:<12} {need}" for role, need in node.inputs.items())]
    if node.after:
        lines += ["", "after:", *(f"  {need}" for need in node.after)]
    if step is not None:
        lines += [
            "",
            f"key: {step.key}",
            f"status: {step.status}",
            *(f"  {reason}" for reason in step.because),
        ]
        lines += [
            "",
            f"runs on {step.hardware.name}: {layout_text(step)}, {show_bytes(step.memory.total)}, "
            f"{show_seconds(step.seconds)} ({step.basis})",
        ]
        lines += [f"  {why}" for why in (*step.layout.why, step.precision_why) if why]
    return lines


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, Mapping) and item:
            rows += _flat(item, f"{name}.")
        else:
            rows.append((name, item))
    return rows


def _short(value: Any) -> str:
    text = "-" if value is None else str(value)
    text = text.replace("\n", "\\n")
    return text if len(text) <= 64 else text[:61] + "..."


def mermaid(graph: Any, names: Iterable[str]) -> list[str]:
    """The graph as a Mermaid flowchart, a box a size."""
    wanted = list(names)
    ids = {name: f"n{i}" for i, name in enumerate(wanted)}
    groups: dict[str, list[str]] = {}
    for name in wanted:
        groups.setdefault(graph.nodes[name].size or "data", []).append(name)
    lines = ["flowchart LR"]
    for group, members in groups.items():
        lines.append(f'  subgraph "{group}"')
        lines += [f'    {ids[n]}["{n}"]' for n in members]
        lines.append("  end")
    for name in wanted:
        node = graph.nodes[name]
        read = dict.fromkeys(node.inputs.values())  # a step may read another in several roles
        lines += [f"  {ids[need]} --> {ids[name]}" for need in read if need in ids]
        lines += [
            f"  {ids[need]} -.-> {ids[name]}" for need in node.after if need in ids and need not in read
        ]
    return lines


def dot(graph: Any, names: Iterable[str]) -> list[str]:
    """The graph in Graphviz's language."""
    wanted = list(names)
    shown = set(wanted)
    lines = ["digraph family {", "  rankdir=LR; node [shape=box];"]
    lines += [f'  "{n}" [label="{n}\\n{graph.nodes[n].kind}"];' for n in wanted]
    for name in wanted:
        node = graph.nodes[name]
        read = dict.fromkeys(node.inputs.values())
        lines += [f'  "{need}" -> "{name}";' for need in read if need in shown]
        order = (need for need in node.after if need in shown and need not in read)
        lines += [f'  "{need}" -> "{name}" [style=dashed];' for need in order]
    return [*lines, "}"]
