"""Parts of the documentation that follow from the tables in the code; a test holds the README to them."""

from __future__ import annotations

from famc.steps import KINDS
from famc.steps.exports import CAPABILITIES


def kinds_table() -> str:
    """The kinds of step, as a Markdown table."""
    rows = ["| kind | what it makes | |", "|---|---|---|"]
    for name, kind in KINDS.items():
        note = "planned only" if kind.worker is None else ("stage" if kind.stage else "")
        rows.append(f"| `{name}` | {kind.about.rstrip('.')} | {note} |")
    return "\n".join(rows)


def exports_table() -> str:
    """What can be exported to what, as a Markdown table: the rows that this version makes, then what it only plans."""
    rows = ["| task | format | quantisation | architectures | loaded by | |", "|---|---|---|---|---|---|"]
    for cells in export_rows("yes"):
        rows.append("| " + " | ".join(cells) + " |")
    for task, fmt, quants, archs, _, _ in export_rows("later"):
        rows.append(f"| {task} | {fmt} | {quants} | {archs} | planned only | |")
    return "\n".join(rows)


def export_rows(status: str) -> list[tuple[str, str, str, str, str, str]]:
    """(task, format, quantisations, architectures, runtimes, note): rows that differ in quantisation alone are one."""
    merged: dict[tuple[str, str, str, str, str], list[str]] = {}
    for row in CAPABILITIES:
        if row.status == status:
            key = (row.task, row.format, ", ".join(row.archs), ", ".join(row.runtimes), row.note)
            merged.setdefault(key, []).append(row.quant)
    return [(key[0], key[1], ", ".join(quants), *key[2:]) for key, quants in merged.items()]
