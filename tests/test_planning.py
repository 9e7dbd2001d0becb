"""When steps run, on which layouts, what stays within a deadline or a budget, and plans that are kept in a file."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from fake_build import Fake, machine, toy_plan, write_spec
from test_plan import HEAVY

from famc import saved
from famc.errors import FitError, UsageError
from famc.graph import open_family
from famc.plan import Plan, plan
from famc.planning import kept, pools, timetable
from famc.run import run
from famc.schedule import Objective

GPUS = ("{cpu: 2, ram: 8GB}", "{gpu: h100-80g, per_node: 8, nodes: 4, scheduler: slurm, usd_per_gpu_hour: 2}")
LARGE = [GPUS,
         ("layers: 3, hidden: 64, ffn: 192, heads: 2, kv_heads: 1", "layers: 28, hidden: 2048, ffn: 6144, heads: 16, kv_heads: 8"),
         ("{kind: pretrain, data: text, batch_tokens: 512,", "{kind: pretrain, data: text, tokens: 20B, batch_tokens: 512k, context: 4096,"),
         ("text: {tokens: 20k, weights: {code: 1}, max_epochs: 100}", "text: {tokens: 20B, weights: {code: 1}, max_epochs: 1000}"),
         ("head_dim: 32, vocab_pad: 512, context: 64", "head_dim: 128, vocab_pad: 512, context: 4096")]  # fmt: skip


def busy(made: Plan, found) -> None:
    """Needs come first, and no backend is asked for more than it has, at any time."""
    ends = {p.name: p.end for p in found.schedule.placed}
    for placed in found.schedule.placed:
        for need in made.steps[placed.name].node.needs:
            assert ends[need] <= placed.start + 1e-6
    have = pools(made)
    for at in {p.start for p in found.schedule.placed}:
        used = dict.fromkeys(have, 0)
        for p in found.schedule.placed:
            if p.option is not None and p.start <= at < p.end:
                used[p.option.pool] += p.option.units
        assert all(used[name] <= have[name] for name in have)


def test_steps_wait_for_what_they_need_and_for_room(tmp_path: Path) -> None:
    made = toy_plan(tmp_path)
    found = timetable(made)
    busy(made, found)
    assert found.schedule.lower_bound <= found.schedule.makespan
    assert pools(made) == {"laptop": 2}
    assert found.plan.steps == made.steps, "without an objective nothing is chosen anew"


def test_the_critical_path_is_a_chain_that_takes_all_the_time(tmp_path: Path) -> None:
    made = toy_plan(tmp_path)
    found = timetable(made)
    placed = {p.name: p for p in found.schedule.placed}
    path = [placed[name] for name in found.critical_path]
    assert path[0].start == 0 and path[-1].end == found.schedule.makespan
    assert all(a.end == b.start for a, b in pairwise(path))
    low, high = found.interval
    assert low <= found.schedule.makespan <= high


@pytest.mark.parametrize("cores", [1, 2, 64])
def test_wall_time_lies_between_the_longest_chain_and_the_sum(tmp_path: Path, cores: int) -> None:
    edit = ("{cpu: 2, ram: 8GB}", f"{{cpu: {cores}, ram: 8GB}}")
    made = toy_plan(tmp_path, edit)
    makespan = timetable(made).schedule.makespan
    chain: dict[str, float] = {}
    for name, step in made.steps.items():
        chain[name] = step.seconds + max((chain[need] for need in step.node.needs), default=0.0)
    total = sum(s.seconds for s in made.steps.values())
    assert max(chain.values()) - 1e-6 <= makespan <= total + 1e-6
    if cores == 1:
        assert makespan == pytest.approx(total)
    if cores == 64:
        assert makespan == pytest.approx(max(chain.values()))


def test_cached_steps_take_no_time_and_are_told_as_kept(tmp_path: Path) -> None:
    made = toy_plan(tmp_path)
    assert kept(made)["steps"] == 0
    run(made, execute=Fake(made))
    again = toy_plan(tmp_path, ("epochs: 1}", "epochs: 2}"))
    found = timetable(again)
    assert kept(again)["steps"] == len(again.steps) - len(again.to_run) > 0
    assert kept(again)["seconds"] == pytest.approx(
        sum(s.seconds for s in again.steps.values() if s.status == "cached")
    )
    assert {p.name for p in found.schedule.placed if p.option is not None} == {s.name for s in again.to_run}
    told = found.to_dict()
    assert told["totals"]["kept"]["steps"] == kept(again)["steps"]
    assert timetable(toy_plan(tmp_path)).schedule.makespan == 0


def large(folder: Path) -> Plan:
    return plan(open_family(write_spec(folder, *LARGE)), folder / "out", local=machine())


def test_an_objective_chooses_other_layouts_and_the_totals_follow(tmp_path: Path) -> None:
    made = large(tmp_path)
    fast, cheap = (timetable(made, Objective(goal)) for goal in ("time", "cost"))
    for found in (fast, cheap):
        busy(found.plan, found)
        assert found.plan.totals()["cost_usd"] == pytest.approx(found.schedule.cost_usd)
    assert cheap.schedule.cost_usd < fast.schedule.cost_usd
    assert fast.schedule.makespan < cheap.schedule.makespan
    devices = [found.plan.steps["m/pretrain"].layout.devices for found in (fast, cheap)]
    assert devices[0] > devices[1]


def test_a_deadline_between_the_fastest_and_the_cheapest_costs_something_between(tmp_path: Path) -> None:
    made = large(tmp_path)
    fast, cheap = (timetable(made, Objective(goal)).schedule for goal in ("time", "cost"))
    deadline = (fast.makespan + cheap.makespan) / 2
    found = timetable(made, Objective(deadline=deadline))
    assert found.schedule.makespan <= deadline
    assert cheap.cost_usd <= found.schedule.cost_usd <= fast.cost_usd
    within = timetable(made, Objective(budget=(fast.cost_usd + cheap.cost_usd) / 2)).schedule
    assert within.cost_usd <= (fast.cost_usd + cheap.cost_usd) / 2
    assert fast.makespan <= within.makespan <= cheap.makespan


def test_a_deadline_that_nothing_reaches_names_the_least_and_with_what(tmp_path: Path) -> None:
    made = large(tmp_path)
    with pytest.raises(
        FitError, match=r"the deadline of 60 s can't be kept: the soonest end found is"
    ) as error:
        timetable(made, Objective(deadline=60))
    assert "m/pretrain on laptop " in error.value.message
    assert error.value.exit_code == 3
    with pytest.raises(FitError, match=r"the budget of 0\.01 USD can't be kept: the cheapest of all costs"):
        timetable(made, Objective(budget=0.01))


# --- plans in files ---------------------------------------------------------------------------------------


def keep(folder: Path, *edits: tuple[str, str], objective: Objective | None = None) -> Path:
    """A plan of the small family, written; its store is `<folder>/out`."""
    graph = open_family(write_spec(folder, *edits))
    found = timetable(plan(graph, folder / "out", local=None), objective)
    file = folder / "plan.json"
    file.write_text(json.dumps(saved.to_dict(found, saved.Source(folder / "toy.yaml", folder / "out"), file)))
    return file


def test_a_saved_plan_comes_back_as_it_was(tmp_path: Path) -> None:
    file = keep(tmp_path)
    was = plan(open_family(tmp_path / "toy.yaml"), tmp_path / "out")
    made, order = saved.restore(file)
    assert made.steps == was.steps
    assert set(order) == set(made.steps)
    assert [made.job(n).to_json() for n in made.steps] == [was.job(n).to_json() for n in was.steps]
    place = {name: i for i, name in enumerate(order)}
    assert all(place[need] < place[name] for name, s in made.steps.items() for need in s.node.needs)


def test_layouts_threads_and_seconds_are_the_files_whatever_the_spec_would_choose_now(tmp_path: Path) -> None:
    file = keep(tmp_path)
    told = json.loads(file.read_text())
    step = next(s for s in told["steps"] if s["name"] == "m/pretrain")
    step["layout"] |= {"micro_batch": 2, "grad_accum": 4, "threads": 2}
    step["seconds"] = 123.0
    told["runtime"]["m/pretrain"]["checkpoint_steps"] = 7
    file.write_text(json.dumps(told))
    write_spec(tmp_path, ("batch_tokens: 512,", "batch_tokens: 512, micro_batch: 1,"))  # bears no identity
    made, _ = saved.restore(file)
    job = made.job("m/pretrain")
    assert (job.micro_batch, job.threads, job.seconds) == (2, 2, 123.0)
    assert job.runtime["checkpoint_steps"] == 7


def test_the_order_is_the_files(tmp_path: Path) -> None:
    file = keep(tmp_path)
    told = json.loads(file.read_text())
    starts = {s["name"]: s for s in told["steps"]}
    starts["data/qa"]["start_seconds"], starts["data/code"]["start_seconds"] = 0.0, 1.0
    file.write_text(json.dumps(told))
    _, first = saved.restore(file)
    starts["data/qa"]["start_seconds"], starts["data/code"]["start_seconds"] = 1.0, 0.0
    file.write_text(json.dumps(told))
    _, second = saved.restore(file)
    assert (first[0], second[0]) == ("data/qa", "data/code")
    for order in (first, second):
        made = toy_plan(tmp_path)
        fake = Fake(made)
        narrow = {n: s for n, s in made.steps.items() if n.startswith("data/")}
        one = Plan(
            made.graph, {n: _wide(s) for n, s in narrow.items()}, tmp_path / f"out-{order[0][5:]}", made.keys
        )
        run(one, execute=fake, order=order)
        assert fake.ran == [n for n in order if n in narrow]


def _wide(step):
    """A step that leaves no core for another."""
    from dataclasses import replace

    return replace(step, threads=2)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (("lr: 1e-3", "lr: 2e-3"), "s/pretrain: lr.peak: 0.001 -> 0.002"),
        (("hidden: 64, ffn: 192", "hidden: 64, ffn: 256"), "m/pretrain: shape.ffn: 192 -> 256"),
        (("seed: 7", "seed: 8"), "data/code: seed: 7 -> 8"),
        (("sft, from: base", "sft, from: pretrain"), None),
        (("  instruct: {stage: sft, sizes: all,", "  instruct: {stage: sft, sizes: [s],"),
         "m/sft: the spec has no such step any more"),
        (("  m: {", "  l: {layers: 4, hidden: 64, ffn: 192, heads: 2, kv_heads: 1, tie: true}\n  m: {"),
         "l/pretrain: the spec has it now, and the plan does not"),
        (("target: cpu}", "target: cpu}\n  - {variants: [base], format: onnx, quant: fp32}"),
         "the spec has it now, and the plan does not"),
        (("backends: {laptop: {cpu: 2, ram: 8GB}}", "backends: {desk: {cpu: 2, ram: 8GB}}"),
         "is planned on backend 'laptop', which the spec no longer has"),
    ],
)  # fmt: skip
def test_a_plan_of_another_spec_is_refused_with_the_step_and_the_field(tmp_path: Path, edit, says) -> None:
    file = keep(tmp_path)
    write_spec(tmp_path, edit)
    if says is None:  # another way to say the same
        saved.restore(file)
        return
    with pytest.raises(UsageError) as error:
        saved.restore(file)
    assert says in error.value.message
    assert error.value.exit_code == 2


def test_data_that_changed_on_disk_is_a_reason_to_refuse(tmp_path: Path) -> None:
    file = keep(tmp_path)
    with (tmp_path / "data" / "qa.jsonl").open("a") as more:
        more.write("\n")
    with pytest.raises(UsageError, match=r"data/qa: files: "):
        saved.restore(file)


def test_less_hardware_than_was_planned_for_does_not_fit(tmp_path: Path) -> None:
    file = keep(tmp_path)
    told = json.loads(file.read_text())
    next(s for s in told["steps"] if s["name"] == "m/pretrain")["layout"]["threads"] = 16
    file.write_text(json.dumps(told))
    with pytest.raises(FitError, match="m/pretrain was planned on laptop with 16 cores, and there are 2"):
        saved.restore(file)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"famc_plan": 99}', "a plan of format 99"),
        ('{"famc_plan": 1}', "no plan that famc wrote"),
        ('{"famc_plan": 1, "spec": 3}', "no plan that famc wrote"),
        ('{"famc_plan": 1', "no plan that famc wrote: JSONDecodeError"),
        ('{"famc_plan": 1, "spec": {}, "steps": []}', "no plan that famc wrote: KeyError"),
    ],
)
def test_a_damaged_plan_is_no_traceback(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UsageError, match=says):
        saved.restore(tmp_path / "plan.json")


def test_a_plan_whose_spec_is_gone_names_it(tmp_path: Path) -> None:
    file = keep(tmp_path)
    (tmp_path / "toy.yaml").unlink()
    with pytest.raises(UsageError, match=r"toy\.yaml, which is not there"):
        saved.restore(file)


def test_folder_and_plan_may_move_together(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    keep(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    made, _ = saved.restore(tmp_path / "b" / "plan.json")
    assert made.out == tmp_path / "b" / "out"


def test_a_plan_is_known_by_what_it_holds(tmp_path: Path) -> None:
    file = keep(tmp_path)
    assert saved.is_plan(file.rename(tmp_path / "family.yaml"))
    assert not saved.is_plan(tmp_path / "toy.yaml")
    assert not saved.is_plan(tmp_path / "none.json")
    (tmp_path / "family.json").write_text('{"famc": 1}')
    assert not saved.is_plan(tmp_path / "family.json")


# --- light ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "toy.yaml", "--minimize", "cost", "--whatif", "a100-80g", "--targets", "-o", "plan.json"],
        ["estimate", "--model", "qwen3-8b", "--backend", "h100-80g"],
        ["calibrate", "--seconds", "1"],
    ],
)
def test_nothing_that_only_plans_loads_a_heavy_module(tmp_path: Path, words: list[str]) -> None:
    write_spec(tmp_path)
    code = (
        f"import sys; from famc.cli import main; main({words!r});"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines()[-1] == "[]"
