"""The page of a plan: a table that a person can decide on, as text for a terminal.

In: Timetable, the width there is. Out: lines; the caller prints them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from famc.cost.deploy import DECODE_BAND, PREFILL_BAND
from famc.deployment import Deployed
from famc.plan import Plan, Planned
from famc.planning import Timetable, kept, layout_text
from famc.report.tables import columns, nothing_line
from famc.schedule import Placed
from famc.spec.quantity import show_bytes, show_count, show_seconds
from famc.whatif import CHOSEN, RIGHT, Row, cells

WIDE = 160  # columns that the whole table takes
REASONS = 40  # lines of reasons
SIZES = 8  # sizes of which it is told how much they take
CHAIN = 8  # steps of the critical path that are named
SAME = 5e-4  # share by which a schedule may be worse and is called the best: it would be shown as 0.0 %
BAR = 8  # characters of a memory bar

Cell = Callable[[Planned, Placed], str]
# heading, cell, whether it is a number
COLUMNS: tuple[tuple[str, Cell, bool], ...] = (
    ("step", lambda s, _: s.name, False),
    ("status", lambda s, _: s.status, False),
    ("backend", lambda s, _: s.hardware.name, False),
    ("layout", lambda s, _: layout_text(s), False),
    ("memory", lambda s, _: memory_bar(s), False),
    ("tokens", lambda s, _: show_count(s.node.work.tokens) if s.node.work.tokens else "", True),
    (
        "start",
        lambda s, p: "" if s.status == "cached" else f"+{show_seconds(p.start)}" if p.start else "0",
        True,
    ),
    ("time", lambda s, _: show_seconds(s.seconds), True),
    ("cost", lambda s, _: show_usd(s.cost_usd), True),
)
SHORT: dict[str, Cell] = {  # where there is no room for more
    "layout": lambda s, _: layout_text(s).replace("recompute", "rc"),
    "memory": lambda s, _: show_bytes(s.memory.total),
}
LEAST_LAYOUT = 12
EXPENDABLE = ("start", "tokens", "backend", "status")  # columns that go where there is no room, in this order


def show_usd(amount: float) -> str:
    """12345.6 -> `$12,345.60`; less than a cent is `-`. Cents are told below 10,000."""
    if amount < 0.005:
        return "-"
    return f"${amount:,.2f}" if amount < 10_000 else f"${amount:,.0f}"


def memory_bar(step: Planned, width: int = BAR) -> str:
    """Planned memory against the limit."""
    share = step.memory.total / step.limit if step.limit else 0.0
    filled = min(width, max(1, round(share * width)))
    return f"{'█' * filled}{'░' * (width - filled)} {show_bytes(step.memory.total)}"


def plan_lines(
    made: Timetable,
    *,
    everything: bool = False,
    width: int = WIDE,
    deployed: Sequence[Deployed] = (),
    whatif: Sequence[Row] = (),
) -> list[str]:
    """The table, its reasons, devices, other backends, the totals. Cached steps are counted; listed if asked for."""
    steps = [s for s in made.plan.steps.values() if everything or s.status != "cached"]
    lines: list[str] = []
    if steps:
        placed = {p.name: p for p in made.schedule.placed}
        lines += [*_table([(s, placed[s.name]) for s in steps], width), ""]
        if reasons := _reasons(steps, width):
            lines += ["why:", *reasons, ""]
    if deployed:
        lines += deployment_lines(deployed)
    if whatif:
        lines += whatif_lines(whatif, width)
    return [*lines, *total_lines(made, width)]


def _table(rows: Sequence[tuple[Planned, Placed]], width: int) -> list[str]:
    """All columns if they fit; else without those that say least, then with shorter ones."""
    left = list(COLUMNS)
    lines = _drawn(rows, left)
    for name in EXPENDABLE:
        if _width(lines) <= width:
            return lines
        at = [heading for heading, _, _ in left].index(name)
        if name in ("backend", "status") and len({left[at][1](*row) for row in rows}) > 1:
            continue  # which one is no detail where there are several
        del left[at]
        lines = _drawn(rows, left)
    if _width(lines) > width:
        left = [(name, SHORT.get(name, cell), number) for name, cell, number in left]
        lines = _drawn(rows, left)
    over = _width(lines) - width
    if over > 0:  # `famc show STEP` has the rest
        room = max(LEAST_LAYOUT, max(len(SHORT["layout"](*row)) for row in rows) - over)
        cells = {name: cell for name, cell, _ in left} | {
            "layout": lambda s, p: _cut(SHORT["layout"](s, p), room)
        }
        lines = _drawn(rows, [(name, cells[name], number) for name, _, number in left])
    return lines


def _width(lines: Sequence[str]) -> int:
    return max(map(len, lines))


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _drawn(rows: Sequence[tuple[Planned, Placed]], kinds: Sequence[tuple[str, Cell, bool]]) -> list[str]:
    texts = [[heading for heading, _, _ in kinds], *([cell(*row) for _, cell, _ in kinds] for row in rows)]
    return columns(texts, right=[i for i, (_, _, number) in enumerate(kinds) if number])


def _reasons(steps: Sequence[Planned], width: int) -> list[str]:
    """Why steps run, or can't. What only follows from others is left out; blocked steps with the same reason share a line."""
    who: dict[tuple[str, str], list[str]] = {}
    for step in steps:
        if step.because and not all(reason.startswith("needs ") for reason in step.because):
            alone = "" if step.status == "blocked" else step.name
            who.setdefault(("; ".join(step.because), alone), []).append(step.name)
    lines = [f"  {_few(names)}: {reason}" for (reason, _), names in who.items()]
    shown = [_cut(line, 2 * width) for line in lines[:REASONS]]
    rest = len(lines) - REASONS
    return shown + ([f"  … and {rest} more (famc why STEP)"] if rest > 0 else [])


def _few(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def total_lines(made: Timetable, width: int = WIDE) -> list[str]:
    """What the plan comes to, what it depends on, and what it saves."""
    plan = made.plan
    totals = plan.totals()
    counted = ", ".join(f"{count} {name}" for name, count in totals["status"].items())
    if not plan.to_run:
        return [nothing_line(plan)]
    bases = sorted({s.basis for s in plan.to_run})
    low, high = made.interval
    return [
        f"{totals['steps']} steps: {counted}",
        f"to run: {show_seconds(made.schedule.makespan)} of wall time ({show_seconds(low)} to {show_seconds(high)}), "
        f"{totals['device_hours']:,.2f} device-hours, ${totals['cost_usd']:,.2f}, "
        f"{totals['energy_kwh']:,.3g} kWh, {totals['co2e_kg']:,.3g} kg CO2e ({' and '.join(bases)})",
        *_size_lines(plan),
        *_kept_lines(plan),
        _schedule_line(made),
        *_wrapped(_chain(made), width),
        *_hardware_lines(plan),
    ]


def _size_lines(plan: Plan) -> list[str]:
    """Which sizes it is spent on."""
    hours: dict[str, float] = {}
    for step in plan.to_run:
        where = step.node.size or "data"
        hours[where] = hours.get(where, 0.0) + step.device_hours
    total = sum(hours.values())
    if len(hours) < 2 or not total:
        return []
    largest = sorted(hours, key=lambda size: -hours[size])[:SIZES]
    return [f"of the device-hours: {', '.join(f'{size} {hours[size] / total:.0%}' for size in largest)}"]


def _kept_lines(plan: Plan) -> list[str]:
    saved = kept(plan)
    if not saved["steps"]:
        return []
    return [
        f"kept: {saved['steps']:.0f} cached steps, which would take {saved['device_hours']:,.2f} device-hours and "
        f"{show_usd(saved['cost_usd']) if saved['cost_usd'] else '$0.00'} to make again"
    ]


def _schedule_line(made: Timetable) -> str:
    """How good the schedule is, in its own measure."""
    found, objective = made.schedule, made.objective
    by_cost = objective is not None and objective.goal == "cost"
    bound = show_usd(found.lower_bound) if by_cost else show_seconds(found.lower_bound)
    what = "cost" if by_cost else "time"
    if found.status == "optimal" or found.gap < SAME:
        text = f"schedule: no other has less {what}"
    else:
        text = f"schedule: no other has less {what} than {bound}, {found.gap:.1%} below this one"
    how = f"{found.solver}{f'; {found.note}' if found.note else ''}"
    scope = "with these layouts" if objective is None else "with any layouts found"
    return f"{text}, {scope} ({how})"


def _chain(made: Timetable) -> str:
    """The steps that decide how long it all takes, those that take longest named."""
    steps, path = made.plan.steps, made.critical_path
    longest = set(sorted(path, key=lambda name: -steps[name].seconds)[:CHAIN])
    parts: list[str] = []
    skipped = 0
    for name in path:
        if name in longest:
            if skipped:
                parts.append(f"{skipped} short step{'s' if skipped > 1 else ''}")
            parts.append(f"{name} {show_seconds(steps[name].seconds)}")
            skipped = 0
        else:
            skipped += 1
    if skipped:
        parts.append(f"{skipped} short step{'s' if skipped > 1 else ''}")
    return f"critical path: {' > '.join(parts)}"


def _wrapped(text: str, width: int) -> list[str]:
    """A long line, broken at its ` > `."""
    lines = [""]
    for index, part in enumerate(text.split(" > ")):
        joined = f" > {part}" if index else part
        if len(lines[-1]) + len(joined) > width:
            lines[-1] += " >"
            lines.append(f"    {part}")
        else:
            lines[-1] += joined
    return lines


def _hardware_lines(plan: Plan) -> list[str]:
    used = {s.hardware.name: s.hardware for s in plan.to_run}
    price = "; ".join(
        f"{name}: ${h.usd_per_device_hour:g} a device-hour ({h.price_basis})" for name, h in used.items()
    )
    grids = "; ".join(
        dict.fromkeys(
            f"{h.grid.name} {h.grid.kg_per_kwh:g} kg a kWh ({h.grid.date or h.grid.source})"
            for h in used.values()
        )
    )
    notes = dict.fromkeys(note for h in used.values() for note in h.notes)
    return [f"prices: {price}", f"electricity: {grids}", *(f"note: {note}" for note in notes)]


def whatif_lines(rows: Sequence[Row], width: int = WIDE) -> list[str]:
    """Backends side by side, the chosen one marked."""
    lines = [f"  {line}" for line in columns(cells(rows), right=RIGHT)]
    return [
        f"what if: {CHOSEN} is the best",
        *(x if len(x) <= width else x[: width - 1] + "…" for x in lines),
        "",
    ]


def deployment_lines(rows: Sequence[Deployed]) -> list[str]:
    """A table a device: its exports, whether they fit, how fast they answer at batch 1."""
    lines: list[str] = []
    for target in dict.fromkeys(row.fit.target for row in rows):
        own = [row for row in rows if row.fit.target == target]
        table = [["export", "file", "memory", "", "decode", "prefill", ""]]
        for row in own:
            fit, speed = row.fit, row.fit.speed
            if fit.fits:
                verdict = "fits, as it must" if row.required else "fits"
            else:
                verdict = (
                    f"too large; {fit.largest} would fit" if fit.largest else "too large, as all sizes are"
                )
            told = speed is not None and fit.fits
            table.append(
                [
                    row.export,
                    show_bytes(fit.weights),
                    show_bytes(fit.total),
                    verdict,
                    _rate(speed.decode) if told and speed and speed.decode else "-",
                    _rate(speed.prefill) if told and speed else "-",
                    speed.basis if told and speed else "",
                ]
            )
        context = max(row.fit.context for row in own)
        lines += [
            f"on {target}: {show_bytes(own[0].fit.limit)} usable, {context} tokens of context, one request at a time",
            *(f"  {line}" for line in columns(table, right=(1, 2, 4, 5))),
            "",
        ]
    if any(row.fit.speed for row in rows):
        lines += [
            f"nine of ten measurements lie within a factor of {DECODE_BAND:g} (decode) and {PREFILL_BAND:g} (prefill) of these",
            "",
        ]
    return lines


def _rate(tokens: float) -> str:
    """Tokens/s to three digits at least."""
    return f"{tokens:,.0f} tok/s" if tokens >= 100 else f"{tokens:.3g} tok/s"
