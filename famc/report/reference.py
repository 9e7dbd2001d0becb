"""Parts of the documentation that follow from the tables in the code; a test holds the README to them."""

from __future__ import annotations

from famc.steps import KINDS, others


def kinds_table() -> str:
    """The kinds of step, as a Markdown table."""
    rows = ["| kind | what it makes | |", "|---|---|---|"]
    for name, kind in KINDS.items():
        note = "planned only" if kind.worker is None else ("stage" if kind.stage else "")
        rows.append(f"| `{name}` | {kind.about.rstrip('.')} | {note} |")
    return "\n".join(rows)


def exports_table() -> str:
    """Which architecture can be exported to what, as a Markdown table."""
    rows = ["| format | quantisation | architectures |", "|---|---|---|"]
    for (form, quant), archs in others.EXPORTS.items():
        rows.append(f"| {form} | {quant} | {', '.join(sorted(archs)) or 'planned only'} |")
    return "\n".join(rows)
