"""What a variant answered, as text for a terminal. In: an answer of famc.attempt. Out: lines; the caller prints them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

FIRST_LINES = 3  # of a passage


def answer_lines(answer: Mapping[str, Any], width: int = 100) -> list[str]:
    """Results with the first lines of each, or the answer as it is."""
    if "results" not in answer:
        lines = shown(answer["answer"]).splitlines() or ["(nothing)"]
        if not answer.get("ended", True):
            lines.append(f"… cut after {answer['tokens']} tokens: --max-new-tokens N lets it say more")
        return lines
    results = answer["results"]
    if not results:
        return [f"nothing found in {answer['passages']:,} passages: none shares a word with it"]
    return list(_gaps(results) if "gap" in results[0] else _passages(results, width))


def _passages(results: list[Mapping[str, Any]], width: int) -> Iterator[str]:
    ranks = [f"{r['before']} -> {r['rank']}" if "before" in r else str(r["rank"]) for r in results]
    wide = max(map(len, ranks))
    for rank, result in zip(ranks, results, strict=True):
        yield f"{rank.rjust(wide)}  {result['score']:.4f}  {shown(result['source'])}  {shown(result['id'])}"
        lines = [line for line in shown(result["text"]).splitlines() if line.strip()]
        for line in textwrap.dedent("\n".join(lines[:FIRST_LINES])).splitlines():
            yield " " * (wide + 2) + _cut(line.rstrip(), width - wide - 2)


def _gaps(results: list[Mapping[str, Any]]) -> Iterator[str]:
    many = results[-1]["gap"] > 1
    for result in results:
        gap = f"gap {result['gap']}  " if many else ""
        yield f"{gap}{result['rank']}  {result['score']:.4f}  {shown(result['text'])!r}"


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: max(width - 1, 0)] + "…"


def shown(text: str) -> str:
    """Text that can't move a terminal's cursor or change its colours: what data holds is not for it to obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(text).replace("\r\n", "\n"))
