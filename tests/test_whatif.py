"""The same work on several backends: which is taken, and why the others are not."""

from __future__ import annotations

import json

import pytest

from famc.schedule import Objective
from famc.whatif import HEADINGS, RIGHT, Total, cells, compare

DAY = 86_400.0
H100 = Total("h100", 10 * DAY, 64, 15_360, 46_080, 19_661, 13_000)
A100 = Total("a100", 24 * DAY, 64, 36_864, 44_237, 25_000, 19_000)
L40S = Total("l40s", 60 * DAY, 64, 92_160, 80_000, None, 30_000)
MI300 = Total("mi300x", 9 * DAY, 64, 13_824, None, None, 12_500)
V100 = Total(
    "v100", 0, 0, 0, None, None, 0, fits=False, reason="8b/pretrain needs 41.2 GB a device of 29.4 GB"
)
ALL = [V100, L40S, A100, H100, MI300]


@pytest.mark.parametrize(
    ("objective", "market", "chosen", "order"),
    [
        (None, "on_demand", "mi300x", ["mi300x", "h100", "a100", "l40s", "v100"]),
        (Objective("cost"), "on_demand", "a100", ["a100", "h100", "l40s", "mi300x", "v100"]),
        (Objective("cost"), "spot", "h100", ["h100", "a100", "mi300x", "l40s", "v100"]),
        (Objective(deadline=14 * DAY), "on_demand", "h100", ["h100", "a100", "l40s", "mi300x", "v100"]),
        (Objective(budget=45_000), "on_demand", "a100", ["a100", "mi300x", "h100", "l40s", "v100"]),
        (
            Objective("time", deadline=14 * DAY),
            "on_demand",
            "mi300x",
            ["mi300x", "h100", "a100", "l40s", "v100"],
        ),
        (
            Objective(deadline=8 * DAY, budget=40_000),
            "on_demand",
            None,
            ["mi300x", "h100", "a100", "l40s", "v100"],
        ),
    ],
)
def test_the_objective_chooses(objective, market, chosen, order):
    """the fastest that is known to fit; the cheapest that has a price; within the limits; or none."""
    rows = compare(ALL, objective, market)
    assert [row.total.backend for row in rows] == order
    assert [row.total.backend for row in rows if row.chosen] == ([chosen] if chosen else [])


def test_why_the_others_are_not_taken():
    rows = {
        row.total.backend: row.why_not for row in compare(ALL, Objective(deadline=14 * DAY, budget=45_000))
    }
    assert rows["h100"] == "$1,080.00 over the budget"
    assert rows["a100"] == "10.0d past the deadline"
    assert rows["l40s"] == "46.0d past the deadline; $35,000 over the budget"
    assert rows["mi300x"] == "no on-demand price is known"
    assert rows["v100"] == "8b/pretrain needs 41.2 GB a device of 29.4 GB"
    assert compare(ALL)[0].why_not == ""
    assert {r.total.backend: r.why_not for r in compare(ALL)}["a100"] == "", "it is only slower"


def test_how_much_slower_and_dearer():
    rows = {row.total.backend: row for row in compare(ALL, Objective(deadline=14 * DAY))}
    assert (rows["h100"].slower, rows["h100"].dearer) == (0, 0)
    assert rows["a100"].slower == pytest.approx(1.4)
    assert rows["a100"].dearer == pytest.approx(-0.04, abs=1e-4)
    assert (rows["mi300x"].slower, rows["mi300x"].dearer) == (pytest.approx(-0.1), None)
    assert (rows["v100"].slower, rows["v100"].dearer) == (None, None)


def test_of_equals_the_one_that_is_better_in_the_other_measure_then_the_first():
    slow, quick = Total("slow", 20, 1, 1, 5, 5, 1), Total("quick", 10, 1, 1, 5, 5, 1)
    assert compare([slow, quick], Objective("cost"))[0].total is quick
    twin = Total("twin", 10, 1, 1, 5, 5, 1)
    assert compare([quick, twin])[0].total is quick
    assert compare([twin, quick])[0].total is twin


def test_as_text():
    """a mark at the chosen one, unknown prices as such, nothing but the reason where it does not fit."""
    table = cells(compare(ALL, Objective(deadline=14 * DAY)))
    assert table[0] == list(HEADINGS)
    assert all(len(line) == len(HEADINGS) for line in table)
    assert max(RIGHT) < len(HEADINGS)
    by_name = {line[1]: line for line in table[1:]}
    assert by_name["h100"][:9] == [
        "*",
        "h100",
        "yes",
        "10.0d",
        "64",
        "15,360.0",
        "$46,080",
        "$19,661",
        "13,000 kWh",
    ]
    assert by_name["a100"][9:] == ["time +140%, cost -4%", "10.0d past the deadline"]
    assert by_name["mi300x"][6:8] == ["?", "?"]
    assert by_name["v100"] == ["", "v100", "no", *[""] * 7, V100.reason]
    assert sum(line[0] == "*" for line in table) == 1


def test_free_hardware():
    """a machine that costs nothing: no shares of nothing."""
    rows = compare(
        [Total("here", 100, 1, 1, 0, None, 1), Total("cloud", 10, 8, 1, 3, 1, 1)], Objective("cost")
    )
    assert [(r.total.backend, r.chosen, r.dearer) for r in rows] == [
        ("here", True, 0),
        ("cloud", False, None),
    ]


def test_json():
    told = json.loads(json.dumps([row.to_dict() for row in compare(ALL)]))
    assert told[0]["backend"] == "mi300x"
    assert told[0]["chosen"] is True
    assert told[-1]["reason"] == V100.reason
    assert set(told[0]) >= {
        "seconds",
        "devices",
        "device_hours",
        "on_demand_usd",
        "spot_usd",
        "energy_kwh",
        "why_not",
    }


def test_bad_input():
    with pytest.raises(ValueError, match="h100 is compared twice"):
        compare([H100, H100])
    with pytest.raises(ValueError, match="x: seconds is -1"):
        Total("x", -1, 1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="x: spot_usd is nan"):
        Total("x", 1, 1, 1, 1, float("nan"), 1)


def test_nothing_to_compare():
    assert compare([]) == ()
    assert cells(()) == [list(HEADINGS)]
