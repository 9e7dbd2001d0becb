"""The same family on other accelerators, side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_build import machine, write_spec
from test_planning import LARGE

from famc.alternatives import ITSELF, alternatives
from famc.cli import main
from famc.errors import UsageError
from famc.graph import open_family
from famc.plan import Plan, plan
from famc.planning import timetable
from famc.schedule import Objective

CHIPS = ["a100-80g", "h100-80g", "v100-16g"]


@pytest.fixture
def large(tmp_path: Path) -> Plan:
    """A 1.4 B model on up to 4 nodes of 8 H100, at $2."""
    return plan(open_family(write_spec(tmp_path, *LARGE)), tmp_path / "out", local=machine())


def test_the_specs_own_row_is_the_plan(large: Plan) -> None:
    rows = {row.total.backend: row.total for row in alternatives(large, CHIPS)}
    assert rows.keys() == {ITSELF, *CHIPS}
    own, found = rows[ITSELF], timetable(large)
    assert own.seconds == found.schedule.makespan
    assert own.on_demand_usd == pytest.approx(large.totals()["cost_usd"])
    assert own.energy_kwh == pytest.approx(large.totals()["energy_kwh"])
    # the same chip at its own price instead of the spec's
    assert rows["h100-80g"].seconds == own.seconds
    assert rows["h100-80g"].device_hours == pytest.approx(own.device_hours)
    assert rows["h100-80g"].on_demand_usd != pytest.approx(own.on_demand_usd)
    assert rows["a100-80g"].seconds > own.seconds
    assert own.devices <= 32


def test_no_step_becomes_another_on_other_hardware(large: Plan) -> None:
    from famc.alternatives import _chip, _on

    other = plan(_on(large.graph, _chip("b200", large.graph.spec.folder)), large.out)
    assert other.keys == large.keys
    assert {s.hardware.accelerator.name for s in other.steps.values()} == {"b200"}
    assert {(s.hardware.nodes, s.hardware.per_node) for s in other.steps.values()} == {(4, 8)}


def test_the_objective_marks_the_best_and_a_limit_says_why_not(large: Plan) -> None:
    by_time = alternatives(large, CHIPS)
    assert [row.chosen for row in by_time].count(True) == 1
    assert by_time[0].chosen and by_time[0].total.seconds == min(
        r.total.seconds for r in by_time if r.total.fits
    )
    fast, slow = by_time[0].total.seconds, max(r.total.seconds for r in by_time)
    limited = {r.total.backend: r for r in alternatives(large, CHIPS, Objective(deadline=(fast + slow) / 2))}
    late = [r for r in limited.values() if "past the deadline" in r.why_not]
    assert late and not any(r.chosen for r in late)


def test_what_does_not_fit_is_a_row_with_the_reason(tmp_path: Path) -> None:
    made = open_family(Path(__file__).parents[1] / "specs" / "qwen3like.yaml")
    whole = plan(made, tmp_path, names=["235b-a22b/base/eval.base"], local=machine())
    rows = {row.total.backend: row for row in alternatives(whole, ["l4"])}
    assert not rows["l4"].total.fits
    assert "235b-a22b/" in rows["l4"].why_not and "does not fit" in rows["l4"].why_not


def test_a_family_of_cpus_is_asked_what_a_gpu_would_do(tmp_path: Path) -> None:
    made = plan(open_family(write_spec(tmp_path)), tmp_path / "out", local=machine())
    rows = {row.total.backend: row.total for row in alternatives(made, ["rtx4090"])}
    assert rows["rtx4090"].devices >= 1 and rows["rtx4090"].device_hours > 0


def test_names_that_mean_nothing_are_refused(large: Plan) -> None:
    with pytest.raises(UsageError, match="no accelerator is called 'h101-80g'") as error:
        alternatives(large, ["h101-80g"])
    assert "h100-80g" in error.value.hint
    with pytest.raises(UsageError, match="h100-80g is compared twice"):
        alternatives(large, ["h100-80g", "h100-80g"])


def test_the_page_and_the_json_have_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write_spec(tmp_path, *LARGE))
    out = ["--out", str(tmp_path / "out")]
    assert main(["plan", file, *out, "--whatif", "a100-80g, h100-80g"]) == 0
    text = capsys.readouterr().out
    assert "  *  " in text and "a100-80g" in text
    assert main(["plan", file, *out, "--whatif", "a100-80g", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["whatif"]
    assert {row["backend"] for row in rows} == {ITSELF, "a100-80g"}
