"""The same work on several backends, side by side: what each would take and cost, and which one the objective takes.

In: the totals of plans that are priced already, one a backend (or a mix of them), and an Objective. Out: rows, the chosen one
marked, each other one with why not; and the same as text. Bears no identity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from famc.schedule import Objective
from famc.spec.quantity import show_seconds

Market = Literal["on_demand", "spot"]

HEADINGS = (
    "",
    "backend",
    "fits",
    "time",
    "devices",
    "device-hours",
    "on demand",
    "spot",
    "energy",
    "against the chosen",
    "",
)
RIGHT = (3, 4, 5, 6, 7, 8)  # columns that are aligned to the right
CHOSEN = "*"


@dataclass(frozen=True, slots=True)
class Total:
    """A plan's sums on one backend. `seconds`: wall time from the first step's begin to the last one's end; `devices`: most
    in use at once. Costs in USD, None where no price is known. With `fits` False `reason` says what doesn't; the other
    figures are then of what fits, or 0."""

    backend: str
    seconds: float
    devices: int
    device_hours: float
    on_demand_usd: float | None
    spot_usd: float | None
    energy_kwh: float
    co2e_kg: float | None = None
    fits: bool = True
    reason: str = ""

    def __post_init__(self) -> None:
        for name in (
            "seconds",
            "devices",
            "device_hours",
            "on_demand_usd",
            "spot_usd",
            "energy_kwh",
            "co2e_kg",
        ):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{self.backend}: {name} is {value}: it must be at least 0 and finite")

    def usd(self, market: Market) -> float | None:
        """The cost in that market."""
        return self.on_demand_usd if market == "on_demand" else self.spot_usd


@dataclass(frozen=True, slots=True)
class Row:
    """A backend among the others. `chosen`: by the objective; `why_not`: empty for the chosen one, and for those that are
    only slower or dearer. `slower`, `dearer`: than the chosen one, as a share of it (0.5: half as much again, -0.2: a fifth
    less); None where there is no chosen one or no figure."""

    total: Total
    chosen: bool
    why_not: str
    slower: float | None
    dearer: float | None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        own = {f.name: getattr(self.total, f.name) for f in fields(self.total)}
        more = {"chosen": self.chosen, "why_not": self.why_not, "slower": self.slower, "dearer": self.dearer}
        return {**own, **more}


def compare(
    totals: Sequence[Total], objective: Objective | None = None, market: Market = "on_demand"
) -> tuple[Row, ...]:
    """Rows, best first by the objective (default: the soonest end), then those that break a limit, then those that don't fit.

    Chosen is the best of those that fit and keep deadline and budget; of equal ones the better in the other measure, then the
    first given. Where the cost decides or a budget limits it, a backend without a price in that `market` can't be chosen.
    ValueError for a backend twice.
    """
    wanted = objective or Objective()
    names = [t.backend for t in totals]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"{', '.join(twice)} is compared twice: give each backend once")
    reasons = [_why_not(t, wanted, market) for t in totals]
    order = sorted(range(len(totals)), key=lambda i: _rank(totals[i], reasons[i], wanted, market))
    best = totals[order[0]] if order and not reasons[order[0]] else None
    return tuple(
        Row(
            totals[i],
            totals[i] is best,
            reasons[i],
            _share(totals[i].seconds, best.seconds) if best and totals[i].fits else None,
            _share(totals[i].usd(market), best.usd(market)) if best and totals[i].fits else None,
        )
        for i in order
    )


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """HEADINGS and the rows as text, for whatever draws a table: columns RIGHT are numbers."""
    return [list(HEADINGS), *(_cells(row) for row in rows)]


def _why_not(total: Total, wanted: Objective, market: Market) -> str:
    if not total.fits:
        return total.reason or "does not fit"
    usd, told = total.usd(market), []
    if wanted.deadline is not None and total.seconds > wanted.deadline * (1 + 1e-9):
        told.append(f"{show_seconds(total.seconds - wanted.deadline)} past the deadline")
    if wanted.budget is not None and usd is not None and usd > wanted.budget * (1 + 1e-9):
        told.append(f"{_usd(usd - wanted.budget)} over the budget")
    if usd is None and (wanted.budget is not None or wanted.goal == "cost"):
        told.append(f"no {'spot' if market == 'spot' else 'on-demand'} price is known")
    return "; ".join(told)


def _rank(total: Total, why_not: str, wanted: Objective, market: Market) -> tuple[bool, bool, float, float]:
    usd = total.usd(market)
    money = math.inf if usd is None else usd
    first, second = (money, total.seconds) if wanted.goal == "cost" else (total.seconds, money)
    return not total.fits, bool(why_not), first, second


def _share(value: float | None, of: float | None) -> float | None:
    if value is None or of is None:
        return None
    if of == 0:
        return 0.0 if value == 0 else None
    return value / of - 1


def _cells(row: Row) -> list[str]:
    total = row.total
    if not total.fits:
        return ["", total.backend, "no", "", "", "", "", "", "", "", row.why_not]
    return [
        CHOSEN if row.chosen else "",
        total.backend,
        "yes",
        show_seconds(total.seconds),
        f"{total.devices:,}",
        f"{total.device_hours:,.1f}",
        _usd(total.on_demand_usd),
        _usd(total.spot_usd),
        f"{total.energy_kwh:,.3g} kWh" if total.energy_kwh < 1000 else f"{total.energy_kwh:,.0f} kWh",
        "" if row.chosen else _against(row),
        row.why_not,
    ]


def _against(row: Row) -> str:
    parts = [
        f"{name} {share:+.0%}"
        for name, share in (("time", row.slower), ("cost", row.dearer))
        if share is not None
    ]
    return ", ".join(parts)


def _usd(value: float | None) -> str:
    if value is None:
        return "?"
    return f"${value:,.2f}" if value < 10_000 else f"${value:,.0f}"
