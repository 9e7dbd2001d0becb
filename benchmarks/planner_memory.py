"""Scores famc/cost/step_memory.py on published peaks: `python benchmarks/planner_memory.py [--rows]`.

Each source is predicted with the slack that the other sources' rows fit (leave one source out), and with the shipped one.
Rows that went out of memory are scored by whether the model says that they fit.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from famc.backend import load_accelerator
from famc.cost.cases.rows import Case, case
from famc.cost.device import GB, GIB, Device
from famc.cost.setup import Setup
from famc.cost.step_memory import SLACK, Slack, fits, limit, step_memory

DATA = Path(__file__).parent / "data" / "calibration.csv"
UNDER = -0.10
"""An error below this one is a run that a plan promised and that would have gone out of memory."""
GRID = ((0.0, 0.02, 0.04, 0.05, 0.06, 0.08, 0.10), (0.0, 0.25e9, 0.5e9, 1.0e9), (0.0, 0.1e9, 0.3e9, 0.5e9))
"""Values that are tried for Slack's fields, in order."""


@dataclass(frozen=True)
class Peak:
    """A row with its layout: `measured` in bytes, None where the run went out of memory."""

    case: Case
    setup: Setup
    measured: float | None

    def as_stranger(self) -> Peak:
        """The same row, of a stack that no table names."""
        return replace(self, setup=replace(self.setup, software=replace(self.setup.software, name="unknown")))


@dataclass(frozen=True)
class Score:
    """Of memory rows. Errors are predicted / measured - 1, each source's by the slack that the others fit.

    `mape`, `worst_under`, `worst_over`: macro-average over sources, and the extremes of all rows. `under`,
    `under_shipped`: rows below -10 %. `strangers`: (source, MAPE, bias) where the model knows nothing of the source's software.
    `oom_said_to_fit`, `ran_said_not_to_fit`: ids. `unplaced`: rows without a published layout.

    Only the slack is left out: what famc.cost.habits and case_facts say of a stack was written with all sources in view.
    """

    mape: float
    mape_shipped: float
    worst_under: float
    worst_over: float
    under: tuple[str, ...]
    under_shipped: tuple[str, ...]
    oom: int
    oom_said_to_fit: tuple[str, ...]
    ran: int
    ran_said_not_to_fit: tuple[str, ...]
    unplaced: tuple[str, ...]
    by_source: tuple[tuple[str, int, float, float, float, float], ...]
    strangers: tuple[tuple[str, float, float], ...]

    def text(self) -> str:
        lines = [
            f"{'source':12s} rows  MAPE %  bias %  lowest %  highest %   (each source left out of the fit)"
        ]
        lines += [
            f"{name:12s} {n:4d} {100 * mape:7.1f} {100 * bias:+7.1f} {100 * low:+9.1f} {100 * high:+10.1f}"
            for name, n, mape, bias, low, high in self.by_source
        ]
        lines += [
            f"macro-average MAPE {100 * self.mape:.1f} % left out, {100 * self.mape_shipped:.1f} % with the shipped slack",
            f"under by more than 10 %: {len(self.under)} of {self.ran} {' '.join(self.under)}".rstrip(),
            f"the same with the shipped slack: {len(self.under_shipped)} {' '.join(self.under_shipped)}".rstrip(),
            f"out-of-memory rows said to fit: {len(self.oom_said_to_fit)} of {self.oom} {' '.join(self.oom_said_to_fit)}".rstrip(),
            f"rows that ran said not to fit: {len(self.ran_said_not_to_fit)} of {self.ran}"
            f" {' '.join(self.ran_said_not_to_fit)}".rstrip(),
            f"without a published layout: {len(self.unplaced)}",
            "as a stack that the model does not know (MAPE %, bias %): "
            + ", ".join(f"{name} {100 * mape:.1f} {100 * bias:+.1f}" for name, mape, bias in self.strangers),
        ]
        return "\n".join(lines)


def device(name: str) -> Device:
    """The backend of that name, as arithmetic sees it."""
    return load_accelerator(name).device


def peaks(rows: Iterable[Mapping[str, str]], qualities: str = "AB") -> tuple[list[Peak], list[str]]:
    """The memory rows with their setups, and the ids of those whose layout is not published."""
    placed: list[Peak] = []
    unplaced: list[str] = []
    for row in rows:
        if row["kind"] != "memory" or row["quality"] not in qualities:
            continue
        made = case(row, device)
        if made.setup is None:
            unplaced.append(made.id)
            continue
        unit = GB if "GB=1e9" in row["note"] else GIB
        measured = None if row["unit"].startswith("OOM") or made.measured is None else made.measured * unit
        placed.append(Peak(made, made.setup, measured))
    return placed, unplaced


def errors(placed: Iterable[Peak], slack: Slack) -> dict[str, float]:
    """id -> predicted / measured - 1, of the rows that ran."""
    return {p.case.id: step_memory(p.setup, slack=slack).total / p.measured - 1 for p in placed if p.measured}


def fit(placed: list[Peak]) -> Slack:
    """The slack of the grid with the least macro-averaged error, where a row that is under by more than 10 % counts as wrong
    altogether."""

    def loss(slack: Slack) -> float:
        found = errors(placed, slack)
        each: dict[str, list[float]] = {}
        for p in placed:
            if p.case.id in found:
                e = found[p.case.id]
                each.setdefault(p.case.src, []).append(1.0 if e < UNDER else abs(e))
        return sum(sum(v) / len(v) for v in each.values()) / len(each)

    return min((Slack(*values) for values in product(*GRID)), key=loss)


def score(rows: Iterable[Mapping[str, str]]) -> Score:
    """Scores all memory rows of quality A and B among `rows`."""
    placed, unplaced = peaks(rows)
    shipped = errors(placed, SLACK)
    sources = sorted({p.case.src for p in placed})
    left: dict[str, float] = {}
    for src in sources:
        others = [p for p in placed if p.case.src != src]
        left |= errors([p for p in placed if p.case.src == src], fit(others) if len(sources) > 1 else SLACK)
    table = []
    for src in sources:
        own = [left[p.case.id] for p in placed if p.case.src == src and p.measured]
        table.append((src, len(own), _mean(map(abs, own)), _mean(own), min(own), max(own)))
    bare = errors([p.as_stranger() for p in placed], SLACK)
    strange = []
    for src in sources:
        own = [bare[p.case.id] for p in placed if p.case.src == src and p.measured]
        strange.append((src, _mean(map(abs, own)), _mean(own)))
    verdicts = [(p, fits(p.setup)) for p in placed]
    return Score(
        mape=_mean(row[2] for row in table),
        mape_shipped=_mean(
            _mean(abs(shipped[p.case.id]) for p in placed if p.case.src == src and p.measured)
            for src in sources
        ),
        worst_under=min(left.values()),
        worst_over=max(left.values()),
        under=tuple(k for k, e in left.items() if e < UNDER),
        under_shipped=tuple(k for k, e in shipped.items() if e < UNDER),
        oom=sum(p.measured is None for p, _ in verdicts),
        oom_said_to_fit=tuple(p.case.id for p, ok in verdicts if p.measured is None and ok),
        ran=len(left),
        ran_said_not_to_fit=tuple(p.case.id for p, ok in verdicts if p.measured and not ok),
        unplaced=tuple(unplaced),
        by_source=tuple(table),
        strangers=tuple(strange),
    )


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def _line(p: Peak) -> str:
    held = step_memory(p.setup)
    parts = " ".join(
        f"{name} {getattr(held, name) / GIB:.1f}"
        for name in ("weights", "gradients", "optimizer", "activations", "logits", "overhead")
    )
    against = (
        f"{p.measured / GIB:6.1f} {100 * (held.total / p.measured - 1):+6.1f}%"
        if p.measured
        else "   OOM        "
    )
    most = step_memory(p.setup, fullest=True).total
    return f"{p.case.id:22s} {held.total / GIB:6.1f} {against} | {most / GIB:6.1f} of {limit(p.setup) / GIB:6.1f} | {parts}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows", action="store_true", help="print each row: GiB predicted, measured, error, its parts"
    )
    parser.add_argument("--fit", action="store_true", help="print the slack that all rows fit")
    options = parser.parse_args()
    with DATA.open(encoding="utf-8") as lines:
        rows = [
            row
            for row in csv.DictReader(line for line in lines if not line.startswith("#"))
            if row["kind"] == "memory"
        ]
    if options.rows:
        print(*(_line(p) for p in peaks(rows)[0]), sep="\n")
    if options.fit:
        print(fit(peaks(rows)[0]))
    print(score(rows).text())


if __name__ == "__main__":
    main()
