"""Plans, steps and builds as text for a terminal. In: Plan, Planned, Node. Out: lines; the caller prints
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from famc.graph import Node
from famc.plan import Plan, Planned
from famc.spec.quantity import show_bytes, show_count

STYLES = {"cached": "dim", "new": "green", "changed": "yellow", "blocked": "red"}


def show_seconds(seconds: float) -> str:
    """75 -> `1m 15s`."""
    if seconds < 0.95:
        return f"{seconds:.1f}s"
    if seconds < 60:
        return f"{seconds:.0f}s"
    if seconds < 3600:
        return f"{seconds // 60:.0f}m {seconds % 60:02.0f}s"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f}h"
    return f"{seconds / 86400:.1f}d"


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


def memory_bar(step: Planned, width: int = 8) -> str:
    """Planned memory against the limit."""
    share = step.memory.total / step.limit if step.limit else 0.0
    filled = min(width, max(1, round(share * width)))
    return f"{'█' * filled}{'░' * (width - filled)} {show_bytes(step.memory.total)}"


def layout_text(step: Planned) -> str:
    """A layout in a few words."""
    layout = step.layout
    if step.hardware.accelerator.kind == "cpu":
        text = f"{step.threads} thread{'s' if step.threads > 1 else ''}"
    else:
        parts = [
            f"{n}{v}"
            for n, v in (
                ("dp", layout.dp_replicate),
                ("fsdp", layout.dp_shard),
                ("tp", layout.tp),
                ("cp", layout.cp),
                ("pp", layout.pp),
            )
            if v > 1
        ]
        text = f"{layout.nodes}x{layout.devices // layout.nodes} {' '.join(parts)}".strip()
    if step.node.work.mode == "train":
        text += f" mb{layout.micro_batch}x{layout.grad_accum} {layout.precision}"
        if layout.recompute != "none":
            text += f" recompute {layout.recompute}"
    return text


def plan_lines(plan: Plan, *, everything: bool = False) -> list[str]:
    """The table of a plan, its reasons, its totals. Cached steps are counted; listed if asked for."""
    steps = [s for s in plan.steps.values() if everything or s.status != "cached"]
    lines: list[str] = []
    if steps:
        rows = [["step", "status", "backend", "layout", "memory", "tokens", "time", "cost"]]
        for s in steps:
            rows.append(
                [
                    s.name,
                    s.status,
                    s.hardware.name,
                    layout_text(s),
                    memory_bar(s),
                    show_count(s.node.work.tokens) if s.node.work.tokens else "",
                    show_seconds(s.seconds),
                    f"${s.cost_usd:,.2f}" if s.cost_usd >= 0.005 else "-",
                ]
            )
        lines += columns(rows, right=(5, 6, 7))
        lines.append("")
        reasons = [f"  {s.name}: {'; '.join(s.because)}" for s in steps if s.because and not _inherited(s)]
        if reasons:
            lines += [
                "why:",
                *reasons[:40],
                *([f"  … and {len(reasons) - 40} more (famc why STEP)"] if len(reasons) > 40 else []),
                "",
            ]
    lines += total_lines(plan)
    return lines


def _inherited(step: Planned) -> bool:
    return all(reason.startswith("needs ") for reason in step.because)


def total_lines(plan: Plan) -> list[str]:
    """What the plan comes to."""
    totals = plan.totals()
    status = totals["status"]
    counted = ", ".join(f"{count} {name}" for name, count in status.items())
    todo = plan.to_run
    if not todo:
        return [f"{totals['steps']} steps: {counted}. Nothing to do."]
    bases = sorted({s.basis for s in todo})
    hardware = {s.hardware.name: s.hardware for s in todo}
    price = "; ".join(
        f"{name}: ${h.usd_per_device_hour:g} a device-hour ({h.price_basis})" for name, h in hardware.items()
    )
    return [
        f"{totals['steps']} steps: {counted}",
        f"to run: {show_seconds(plan.makespan_seconds)} of wall time, "
        f"{totals['device_hours']:,.2f} device-hours, ${totals['cost_usd']:,.2f}, "
        f"{totals['energy_kwh']:,.3g} kWh, {totals['co2e_kg']:,.3g} kg CO2e ({' and '.join(bases)})",
        f"prices: {price}",
    ]


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
