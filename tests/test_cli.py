"""The command line from outside: exit codes, what stands on stdout, and what a user is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_build import Fake, toy_plan, write_spec
from test_this_cpu import figures

from famc.cli import COMMANDS, main
from famc.plan import Plan
from famc.run import run
from famc.store import Store

NO_SPEC = ("schema", "doctor", "estimate", "calibrate")  # commands that read no family
LR = ("lr: 1e-3", "lr: 2e-3")
NO_DATA = ("path: data/qa.jsonl", "path: data/none.jsonl")


@pytest.fixture
def famc(tmp_path, capsys, monkeypatch):
    """`famc COMMAND toy.yaml …` in the folder of the small family, with a worker that trains nothing."""
    monkeypatch.chdir(tmp_path)
    fail: set[str] = set()

    class Executes:
        def __enter__(self):
            return Fake(None, fail=fail)

        def __exit__(self, *_):
            return None

    def measures(request, timeout=0):
        spread = {"median": 100.0, "min": 90.0, "max": 110.0}
        if request["runtime"] == "bandwidth":
            return {"read": 2e10, "copy": 1e10, "threads": 1, "cache_bytes": 0}
        return {"threads": 1, "prefill": spread, "decode": spread, "first_token": spread, "load_seconds": 0.1,
                "peak_rss_bytes": 5_000_000}  # fmt: skip

    class Tries:
        def __init__(self, wanted, tell):
            self.wanted = wanted

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def ask(self, text):
            return {
                "variant": self.wanted.variant,
                "query": text,
                "answer": "Four.",
                "ended": True,
                "tokens": 2,
            }

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("famc.calibrate._measured", lambda seconds, cores: figures(disturbed=False))
    monkeypatch.setattr("famc.run.Execute", Executes)
    monkeypatch.setattr("famc.attempt.Session", Tries)
    monkeypatch.setattr("famc.bench.subprocess_runner", measures)

    def call(command: str, *arguments: str, spec: str = "toy.yaml", edits=(), failing=()):
        if edits is not None:
            write_spec(tmp_path, *edits)
        fail.clear()
        fail.update(failing)
        out = [] if command in NO_SPEC else ["--out", "out"]
        code = main([command, *([] if command in NO_SPEC else [spec]), *arguments, *out])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def built(tmp_path: Path, *edits) -> Plan:
    made = toy_plan(tmp_path, *edits)
    run(made, execute=Fake(made))
    return made


def arguments(command: str) -> list[str]:
    setup = ["--model", "qwen3-0.6b", "--backend", "h100-80g", "--seq-len", "4096", "--global-batch", "64"]
    asked = {
        "why": ["s/sft"],
        "estimate": setup,
        "show": ["s/sft"],
        "bench": ["s/instruct"],
        "try": ["s/instruct", "2 + 2?"],
    }
    return asked.get(command, [])


# --- what all commands have in common ---------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_one_document_and_nothing_else(tmp_path, famc, command):
    built(tmp_path)
    code, out, err = famc(command, *arguments(command), "--json")
    assert code == 0
    assert json.loads(out, parse_constant=pytest.fail) is not None
    assert err == ""


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in NO_SPEC])
@pytest.mark.parametrize(
    ("spec", "edits", "error", "says"),
    [
        ("none.yaml", (), "UsageError", "none.yaml: no such file"),
        ("toy.yaml", [("seed: 7", "sed: 7")], "SpecError", "did you mean 'seed'?"),
    ],
)
def test_json_tells_errors_too(famc, command, spec, edits, error, says):
    code, out, err = famc(command, *arguments(command), "--json", spec=spec, edits=edits)
    told = json.loads(out)
    assert (code, told["exit_code"], told["error"], err) == (2, 2, error, "")
    assert says in told["message"]


@pytest.mark.parametrize("command", COMMANDS)
def test_quiet_says_nothing(tmp_path, famc, command):
    built(tmp_path)
    code, out, err = famc(command, *arguments(command), "-q")
    assert (code, err) == (0, "")
    assert out == "" or command == "schema"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: famc {command} ")
    assert COMMANDS[command][1].split(",")[0] in " ".join(text.split())


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name, (_, about) in COMMANDS.items():
        assert f"  {name}" in text
        assert about.split(",")[0].split(":")[0] in " ".join(text.split())


@pytest.mark.parametrize(
    ("argv", "stderr"),
    [
        (["bild"], "error: no command is called 'bild'; did you mean 'build'?\nhint: famc --help\n"),
        (["x'y"], f"error: no command is called 'x'y'; known: {', '.join(sorted(COMMANDS)[:12])}"),
        ([], "error: the following arguments are required: COMMAND\nhint: famc --help\n"),
        (["plan"], "error: the following arguments are required: SPEC\nhint: famc plan --help\n"),
        (["plan", "toy.yaml", "--smok"], "error: unrecognized arguments: --smok\nhint: famc --help\n"),
        (["graph", "toy.yaml", "--format", "svg"], "error: argument --format: invalid choice: 'svg'"),
        (["plan", "none.yaml"], "error: none.yaml: no such file\nhint: famc init writes a first spec\n"),
    ],
)
def test_a_command_line_that_means_nothing_is_refused(capsys, argv, stderr):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(stderr)


def test_json_tells_of_a_wrong_command_line(capsys):
    assert main(["bild", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["message"].startswith("no command is called 'bild'")


def test_the_mistakes_of_a_spec_are_all_told_with_their_places(famc):
    code, out, err = famc("plan", edits=[("seed: 7", "sed: 7"), ("epochs: 1}", "epoch: 1}")])
    assert (code, out) == (2, "")
    assert [line.partition(": ")[0] for line in err.splitlines()] == ["toy.yaml:2:44", "toy.yaml:16:47"]


def test_a_select_that_means_nothing_is_refused(famc):
    code, out, err = famc("plan", "--select", "s/sfd")
    assert (code, out, err) == (2, "", "error: `s/sfd` selects no step\nhint: did you mean 's/sft'?\n")
    code, out, err = famc("build", "--select", "kind:sft,kind:corpus")
    assert (code, out, err) == (2, "", "error: --select kind:sft,kind:corpus: no step is left\n")


def test_a_folder_that_can_not_be_written_is_told_without_a_traceback(tmp_path, famc):
    (tmp_path / "out").write_text("a file is in the way")
    code, _, err = famc("build")
    assert (code, err) == (2, "error: out/store: Not a directory\n")
    (tmp_path / "out").unlink()
    code, out, err = famc("plan", "--json", "-o", "no/such/folder.json")
    assert (code, err) == (2, "")
    assert json.loads(out)["message"] == "no/such/folder.json: No such file or directory"


def test_the_version_is_told(capsys):
    from famc import __version__

    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, f"famc {__version__}\n")


# --- plan, status, why, show, graph -----------------------------------------------------------------------


def test_plan_tells_steps_reasons_and_totals(tmp_path, famc):
    built(tmp_path)
    code, out, err = famc("plan", edits=[LR])
    assert (code, err) == (0, "")
    assert "  s/pretrain: lr.peak: 0.001 -> 0.002 (toy.yaml:15" in out
    assert "s/sft" in out
    assert "data/qa" not in out, "what is cached is counted, not listed"
    assert "prices: laptop: $0 a device-hour" in out
    assert "data/qa" in famc("plan", "--all", edits=[LR])[1]


def test_plan_of_a_built_family_has_nothing_to_do(tmp_path, famc):
    made = built(tmp_path)
    assert famc("plan")[1] == f"{len(made.steps)} steps: {len(made.steps)} cached. Nothing to do.\n"


def test_plan_writes_what_json_tells(tmp_path, famc):
    _, out, _ = famc("plan", "--json", "-o", "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == json.loads(out)


def test_plan_tells_when_steps_run_how_good_that_is_and_what_decides_it(tmp_path, famc):
    told = json.loads(famc("plan", "--json")[1])
    steps = {s["name"]: s for s in told["steps"]}
    assert max(s["end_seconds"] for s in steps.values()) == told["makespan_seconds"]
    assert steps["s/sft"]["start_seconds"] >= steps["s/pretrain"]["end_seconds"]
    assert told["lower_bound"] <= told["makespan_seconds"]
    assert told["gap"] == pytest.approx(1 - told["lower_bound"] / told["makespan_seconds"])
    assert steps[told["critical_path"][-1]]["end_seconds"] == told["makespan_seconds"]
    assert told["schedule"]["minimize"] == "time"
    out = famc("plan")[1]
    assert "schedule: no other has less time" in out
    assert "critical path: " in out


def test_plan_tells_what_a_change_costs_and_what_it_saves(tmp_path, famc):
    made = built(tmp_path)
    told = json.loads(famc("plan", "--json", edits=[LR])[1])
    cached = [s for s in told["steps"] if s["status"] == "cached"]
    assert told["totals"]["kept"]["steps"] == len(cached)
    assert told["totals"]["kept"]["seconds"] == pytest.approx(0.5 * len(cached)), (
        "what they took: their records"
    )
    again = len(made.steps) - len(cached)
    assert told["totals"]["status"] == {"cached": len(cached), "changed": again}
    assert f"kept: {len(cached)} cached steps, which would take " in famc("plan", edits=[LR])[1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--deadline", "soon"], "--deadline: expected a time such as 14d, 36h, 90min or 30s, not 'soon'"),
        (["--deadline", "14"], "--deadline: expected a time such as"),
        (["--deadline", "-3d"], "argument --deadline: expected one argument"),
        (["--deadline=-3d"], "--deadline: expected a time such as"),
        (["--budget", "much"], "--budget: expected USD such as 250000, not 'much'"),
        (["--budget=-1"], "--budget: expected USD"),
        (["--optimal", "0"], "--optimal 0: seconds between 0 and 3600"),
        (["--minimize", "joy"], "argument --minimize: invalid choice: 'joy'"),
    ],
)
def test_objectives_that_mean_nothing_are_refused(famc, words, says):
    code, out, err = famc("plan", *words)
    assert (code, out) == (2, "")
    assert says in err


def test_limits_that_nothing_keeps_end_with_three_and_the_least(famc):
    code, out, err = famc("plan", "--deadline", "1s")
    assert (code, out) == (3, "")
    assert err.startswith("error: the deadline of 1 s can't be kept: the soonest end found is ")
    assert " on laptop " in err, "with what"
    assert json.loads(famc("plan", "--deadline", "1s", "--json")[1])["exit_code"] == 3
    assert famc("plan", "--deadline", "9d", "--budget", "$1,000", "-q")[0] == 0


def test_build_does_a_written_plan(tmp_path, famc):
    assert famc("plan", "--minimize", "time", "-o", "plan.json", "-q")[0] == 0
    code, out, _ = famc("build", "--json", spec="plan.json")
    assert (code, len(json.loads(out)["done"])) == (0, len(toy_plan(tmp_path).steps))
    assert famc("build", spec="plan.json")[1].endswith("Nothing to do.\n")


def test_stdout_can_be_kept_as_a_plan(tmp_path, famc):
    (tmp_path / "kept.json").write_text(famc("plan", "--json")[1])
    assert famc("build", "-q", spec="kept.json")[0] == 0


def test_a_written_plan_of_another_spec_is_refused(tmp_path, famc):
    famc("plan", "-o", "plan.json", "-q")
    code, out, err = famc("build", spec="plan.json", edits=[LR])
    assert (code, out) == (2, "")
    assert "plan.json is not a plan of " in err
    assert "  s/pretrain: lr.peak: 0.001 -> 0.002 (toy.yaml:15)" in err
    assert not (tmp_path / "out").exists()


def test_a_written_plan_takes_no_other_words_and_is_no_spec(famc):
    famc("plan", "-o", "plan.json", "-q")
    code, _, err = famc("build", "--select", "s/sft", spec="plan.json")
    assert (code, err.splitlines()[0]) == (
        2,
        "error: --select: plan.json is a plan, and is done as it stands",
    )
    code, _, err = famc("plan", spec="plan.json")
    assert (code, err) == (2, "error: plan.json is a plan, not a spec\nhint: famc build takes it\n")


def test_what_does_not_fit_ends_with_three(famc):
    edit = ("{cpu: 2, ram: 8GB}", "{cpu: 2, ram: 600MB}")
    for command in ("plan", "build"):
        code, out, err = famc(command, edits=[edit])
        assert (code, out) == (3, "")
        assert "m/sft does not fit laptop: needs" in err
    assert json.loads(famc("plan", "--json", edits=[edit])[1])["exit_code"] == 3


def test_status_tells_each_step_and_how_far_it_was(tmp_path, famc):
    made = toy_plan(tmp_path)
    run(made, execute=Fake(made, fail=["s/sft"]))
    made.job("s/sft").progress(30, 120)
    lines = dict(line.split(None, 1) for line in famc("status")[1].splitlines())
    assert lines["s/pretrain"] == "cached"
    assert lines["s/sft"].split(None, 1) == ["new", "30 of 120 when last seen"]
    told = json.loads(famc("status", "--json")[1])
    assert {"name": "s/sft", "status": "new", "because": []} in told["steps"]


def test_why_names_the_field_old_and_new(tmp_path, famc):
    built(tmp_path)
    code, out, _ = famc("why", "s/pretrain", edits=[LR])
    assert code == 0
    assert out.splitlines()[0] == "s/pretrain (changed)"
    assert out.splitlines()[1].startswith("  lr.peak: 0.001 -> 0.002 (toy.yaml:15")
    assert famc("why", "s/sft", edits=[LR])[1] == "s/sft (changed)\n  needs s/pretrain, which changed\n"
    assert famc("why", "s/sft")[1].startswith("s/sft (cached)\n  is built: ")
    assert "  shape.layers: 2 -> 4\n" in famc("why", "s/sft", "--set", "sizes.s.layers=4")[1]
    assert famc("why", "s/nothing")[0] == 2


def test_why_of_a_step_that_was_never_built(famc):
    assert famc("why", "s/sft")[1] == "s/sft (new)\n  was never built here\n"


def test_show_tells_every_value_and_who_wrote_it(famc):
    code, out, _ = famc("show", "s/pretrain", "--set", "stages.pretrain.weight_decay=0.2")
    assert code == 0
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in out.splitlines() if len(line.split()) > 2}
    assert rows["lr.peak"].startswith("0.001 toy.yaml:15")
    assert rows["weight_decay"] == "0.2 --set stages.pretrain.weight_decay"
    assert rows["clip"] == "1.0 default: gradient norm 1 (GPT-3, Llama)"
    assert rows["micro_batch"].endswith("(not in the key)")
    assert "reads:" in out
    told = json.loads(famc("show", "s/pretrain", "--json")[1])
    assert told[0]["values"]["lr.peak"] == 0.001
    assert told[0]["origins"]["clip"].startswith("default: ")


@pytest.mark.parametrize(
    ("form", "first", "edge"),
    [("mermaid", "flowchart LR", "n1 --> n0"), ("dot", "digraph family {", '"s/pretrain" -> "s/sft";')],
)
def test_graph_speaks_two_languages(famc, form, first, edge):
    code, out, _ = famc("graph", "--format", form, "--select", "*/sft", "--select", "*/pretrain")
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == first
    if form == "dot":
        assert f"  {edge}" in lines
        assert lines[-1] == "}"
    else:
        ids = {
            line.split('["')[1][:-2]: line.split("[")[0].strip()
            for line in lines
            if "[" in line and "subgraph" not in line
        }
        assert f"  {ids['s/pretrain']} --> {ids['s/sft']}" in lines
        assert lines.count("  end") == 2, "a box a size"


def test_graph_draws_order_without_data_as_a_dashed_line(famc):
    out = famc("graph", "--format", "dot")[1]
    assert '  "s/base/gate.limits" -> "s/sft" [style=dashed];' in out


# --- build ------------------------------------------------------------------------------------------------


def test_build_makes_and_releases_and_then_has_nothing_to_do(tmp_path, famc):
    code, out, err = famc("build")
    steps = len(toy_plan(tmp_path).steps)
    assert code == 0
    assert out.splitlines()[0].startswith(f"{steps} steps done, 0 kept, 0 cached, 0 failed, 0 skipped in ")
    assert [line.strip() for line in out.splitlines()[1:]] == [
        f"out/release/toy-{n}" for n in ("m", "s", "m-instruct", "s-instruct")
    ]
    assert "done     s/sft" in err
    assert "\033" not in out + err, "no colours where there is no terminal"
    code, out, err = famc("build")
    assert (code, out, err) == (0, f"{steps} steps: {steps} cached. Nothing to do.\n", "")


def test_build_with_json_tells_events_on_stderr_and_the_end_on_stdout(tmp_path, famc):
    code, out, err = famc("build", "--json")
    result = json.loads(out)
    steps = len(toy_plan(tmp_path).steps)
    assert (code, len(result["done"]), result["failed"]) == (0, steps, {})
    events = [json.loads(line) for line in err.splitlines()]
    assert {e["event"] for e in events} == {"start", "done"}
    assert json.loads(famc("build", "--json")[1])["cached"] == steps


def test_a_failed_step_ends_with_one_and_is_told_with_its_log(famc):
    code, out, err = famc("build", failing=["s/sft"])
    assert code == 1
    assert "FAILED   s/sft: s/sft: it was told to fail" in err
    log = err.partition("log: ")[2].splitlines()[0]
    assert Path(log).read_text() == "error: s/sft: it was told to fail\n"
    assert "1 failed" in out
    assert "what to do: " in out
    assert famc("build")[0] == 0


def test_a_quiet_build_tells_failures_only(famc):
    code, out, err = famc("build", "-q", failing=["s/sft"])
    assert (code, out) == (1, "")
    assert err.count("FAILED") == 1
    assert "done" not in err


def test_fail_fast_stops_at_the_first(famc):
    code, out, _ = famc("build", "--fail-fast", "--json", failing=["data/code"])
    assert code == 1
    assert len(json.loads(out)["done"]) <= 1


def test_build_refuses_what_can_not_run_here_before_it_writes_anything(tmp_path, famc):
    code, out, err = famc("build", edits=[NO_DATA])
    assert (code, out) == (2, "")
    assert err.startswith("error: this build can't run here:\n  data/qa: ")
    assert not (tmp_path / "out").exists()


def test_build_of_a_part(tmp_path, famc):
    code, out, _ = famc("build", "--json", "--select", "s/pretrain")
    assert (code, set(json.loads(out)["done"])) == (
        0,
        {"data/code", "data/qa", "tokenizer", "mix/text", "s/pretrain"},
    )
    assert json.loads(out)["released"] == []


def test_a_spec_that_is_not_this_machines_is_planned_and_not_built(famc):
    edit = ("{cpu: 2, ram: 8GB}", "{gpu: h100-80g}")
    assert famc("plan", "-q", edits=[edit])[0] == 0
    assert famc("build", "-q", edits=[edit])[0] == 2


# --- verify, gc -------------------------------------------------------------------------------------------


def test_verify_finds_a_flipped_byte_and_repair_removes_its_artifact(tmp_path, famc):
    made = built(tmp_path)
    assert famc("verify")[:2] == (0, f"{len(made.steps)} artifacts: every file is what its record says\n")
    folder = Store(made.out / "store").path("s/sft", made.steps["s/sft"].key)
    data = (folder / "output.txt").read_bytes()
    (folder / "output.txt").write_bytes(bytes([data[0] ^ 1]) + data[1:])
    code, out, _ = famc("verify")
    assert (code, out.splitlines()[0]) == (
        1,
        f"s/{folder.name}: output.txt has other content than the record says",
    )
    told = json.loads(famc("verify", "--json")[1])
    assert told["faults"] == [
        {
            "artifact": f"s/{folder.name}",
            "file": "output.txt",
            "what": "has other content than the record says",
        }
    ]
    assert folder.exists(), "verify only looks"
    code, _, err = famc("verify", "--repair")
    assert (code, folder.exists()) == (1, False)
    assert "famc build makes them again" in err
    assert famc("verify")[0] == 0
    assert json.loads(famc("build", "--json")[1])["done"] == ["s/sft"]


def test_gc_keeps_what_the_spec_and_its_profiles_reach_and_removes_the_rest(tmp_path, famc):
    built(tmp_path, LR)
    quick = toy_plan(tmp_path, profile="quick")
    run(quick, execute=Fake(quick))
    now = built(tmp_path)
    store = Store(tmp_path / "out" / "store")
    reached = {store.path(s.name, s.key) for made in (now, quick) for s in made.steps.values()}
    before = {p for paths in store.scan().values() for p in paths}
    assert before - reached
    code, out, _ = famc("gc", "--dry-run", "--json")
    told = json.loads(out)
    assert {p for paths in store.scan().values() for p in paths} == before, "a dry run removes nothing"
    assert {Path(p) for p in told["removed"]} == {p.relative_to(tmp_path) for p in before - reached}
    assert told["bytes"] > 0
    code, out, _ = famc("gc")
    assert code == 0
    assert out.startswith(f"{len(before - reached)} artifacts, ")
    assert {p for paths in store.scan().values() for p in paths} == reached
    assert toy_plan(tmp_path).to_run == ()
    assert famc("gc")[1].startswith("0 artifacts, 0 B were removed")


@pytest.mark.parametrize("option", [["--profile", "quick"], ["--set", "family.seed=9"], ["--smoke"]])
def test_gc_never_removes_what_the_spec_as_it_stands_reaches(tmp_path, famc, option):
    built(tmp_path)
    famc("gc", *option)
    assert toy_plan(tmp_path).to_run == ()


def test_gc_keeps_what_another_spec_reaches_if_asked(tmp_path, famc):
    made = built(tmp_path, LR)
    write_spec(tmp_path, LR).rename(tmp_path / "other.yaml")
    store = Store(tmp_path / "out" / "store")
    famc("gc", "--keep", "other.yaml")
    assert store.has("s/sft", made.steps["s/sft"].key)
    famc("gc")
    assert not store.has("s/sft", made.steps["s/sft"].key)


def test_gc_removes_unfinished_work_that_nothing_reaches(tmp_path, famc):
    made = built(tmp_path)
    store = Store(made.out / "store")
    mine, other = store.partial("s/sft", made.steps["s/sft"].key), store.partial("s/sft", "f" * 64)
    for folder in (mine, other):
        folder.mkdir(parents=True)
        (folder / "checkpoint").write_text("half")
    famc("gc")
    assert (mine.exists(), other.exists()) == (True, False)


def test_gc_and_repair_wait_for_no_build(tmp_path, famc):
    from famc.run import locked

    made = built(tmp_path, LR)
    (Store(made.out / "store").path("s/sft", made.steps["s/sft"].key) / "output.txt").unlink()
    with locked(made.out):
        for command in (["gc"], ["verify", "--repair"]):
            code, _, err = famc(*command)
            assert code == 2
            assert "another build works in out" in err


# --- from outside -----------------------------------------------------------------------------------------


def start(*argv: str, **more) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "famc.cli", *argv], text=True, **more)


def test_ctrl_c_ends_within_seconds_with_130_and_everything_resumable(tmp_path):
    spec = write_spec(tmp_path)
    process = start(
        "build",
        str(spec),
        "--out",
        str(tmp_path / "out"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    assert "start" in process.stderr.readline()
    interrupted = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert time.monotonic() - interrupted < 5.0
    assert out == ""
    assert err.splitlines()[-1].startswith("interrupted: finished steps are kept")
    assert "Traceback" not in err
    for _ in range(100):  # a job that was still importing Python modules ends when it looks at its stdin
        left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        if str(tmp_path) not in left:
            break
        time.sleep(0.05)
    assert str(tmp_path) not in left, "a job outlived its build"
    assert main(["plan", str(spec), "--out", str(tmp_path / "out"), "-q"]) == 0


def test_ctrl_c_with_json_is_one_document_too(tmp_path):
    spec = write_spec(tmp_path)
    process = start(
        "build",
        str(spec),
        "--out",
        str(tmp_path / "out"),
        "--json",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    assert json.loads(process.stderr.readline())["event"] == "start"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert json.loads(out)["exit_code"] == process.returncode == 130


@pytest.mark.parametrize("arguments", [["--all"], ["--json"]])
def test_a_reader_that_goes_away_is_no_error(tmp_path, arguments):
    process = start(
        "plan", str(write_spec(tmp_path)), *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
    process.stderr.close()


def test_a_terminal_without_colours_is_respected(tmp_path):
    """On a terminal errors are red, unless NO_COLOR is set."""
    import pty

    seen = {}
    for value in ("", "1"):
        reader, writer = pty.openpty()
        process = start(
            "plan", "none.yaml", stderr=writer, stdout=writer, env={**os.environ, "NO_COLOR": value}
        )
        process.wait()
        os.close(writer)
        seen[value] = os.read(reader, 4096)
        os.close(reader)
    assert seen[""].startswith(b"\033[31merror\033[0m: none.yaml")
    assert seen["1"].startswith(b"error: none.yaml")


# --- calibrate --------------------------------------------------------------------------------------------


def test_calibrate_tells_what_it_measured_and_which_plans_use_it(tmp_path, famc, capsys):
    code, out, err = famc("calibrate", edits=None)
    assert code == 0
    assert err == "measuring this machine for about 35 s\n"
    assert "GFLOP/s" in out
    assert f"written to {tmp_path}/config/famc/backends/this-cpu.yaml" in out
    assert "used by every local plan of this user" in out
    code = main(["calibrate", "--json", "--out", str(tmp_path / "backends"), "--seconds", "20"])
    assert code == 2, "no such folder, and no name that is looked for"
    capsys.readouterr()
    (tmp_path / "backends").mkdir()
    assert main(["calibrate", "--json", "--out", str(tmp_path / "backends")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["file"] == str(tmp_path / "backends" / "this-cpu.yaml")
    assert told["basis"] == "measured"


@pytest.mark.parametrize("seconds", ["0", "-3", "nan", "1e9"])
def test_calibrate_measures_for_a_reasonable_time_only(capsys, seconds):
    assert main(["calibrate", f"--seconds={seconds}"]) == 2
    assert "between 5 and 600" in capsys.readouterr().err


# --- estimate ---------------------------------------------------------------------------------------------

SETUP = [
    "--model",
    "qwen3-8b",
    "--backend",
    "h100-80g",
    "--devices",
    "16",
    "--seq-len",
    "4096",
    "--global-batch",
    "64",
]


def estimated(capsys, *words: str) -> tuple[int, str, str]:
    code = main(["estimate", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_estimate_tells_the_step_object_of_a_plan(capsys):
    code, out, err = estimated(capsys, *SETUP, "--tokens", "300B", "--json")
    told = json.loads(out)
    assert (code, err) == (0, "")
    assert {"name", "backend", "layout", "memory", "params", "tokens", "flops", "mfu", "seconds", "device_hours", "cost_usd",
            "energy_kwh", "co2e_kg", "basis", "interval"} <= told.keys()  # fmt: skip
    assert told["layout"]["devices"] == 16
    assert told["params"] == {"total": 8190735360, "active": 8190735360}
    assert 300e9 <= told["tokens"] < 300e9 + 64 * 4096, "whole steps"
    assert told["device_hours"] == pytest.approx(told["seconds"] * 16 / 3600)
    low, high = told["interval"]
    assert low < told["seconds"] < high
    code, out, _ = estimated(capsys, *SETUP)
    assert "8.19B parameters" in out
    assert "16 x h100-80g in 2 nodes" in out


def test_estimate_keeps_what_is_set(capsys):
    told = json.loads(
        estimated(capsys, *SETUP, "--tp", "4", "--micro-batch", "2", "--recompute", "full", "--json")[1]
    )
    assert [told["layout"][k] for k in ("tp", "micro_batch", "recompute")] == [4, 2, "full"]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--model", "qwen3-9b"], 2, "did you mean 'qwen3-8b'?"),
        (["--backend", "h101"], 2, "no accelerator `h101`"),
        (["--precision", "fp7"], 2, "fp7"),
        (["--recompute", "some"], 2, "recompute 'some': choose none, selective, full"),
        (["--devices", "0"], 2, "--devices 0: it must be at least 1"),
        (["--devices=-8"], 2, "--devices: must be at least 0"),
        (["--tokens", "none"], 2, "--tokens: expected an amount such as 3M, not 'none'"),
        (["--seq-len", "1.5"], 2, "--seq-len: '1.5' is not a whole number"),
        (["--tp", "5"], 2, "tp 5 does not divide the 32 heads"),
        (["--pp", "99", "--devices", "99"], 2, "pp 99 is more than the 36 layers"),
        (["--model", "qwen3-235b-a22b"], 3, "devices with"),
        (["--config", "none.json"], 2, "not allowed with argument"),
        (["--batch", "cases.csv"], 2, "not allowed with argument"),
        (["--tpp", "2"], 2, "unrecognized arguments: --tpp"),
    ],
)
def test_estimate_names_what_can_not_be(capsys, words, code, says):
    given, _, err = estimated(capsys, *SETUP, *words)
    assert (given, says in err, "Traceback" in err) == (code, True, False), err


def test_estimate_of_a_table_is_an_object_a_line(tmp_path, capsys):
    cases = Path(__file__).parents[1] / "benchmarks" / "data" / "calibration.csv"
    lines = cases.read_text().splitlines()
    (tmp_path / "cases.csv").write_text(
        "\n".join([*lines[:4], lines[3].replace("H100-SXM-80GB", "Z80")]) + "\n"
    )
    code, out, err = estimated(capsys, "--batch", str(tmp_path / "cases.csv"), "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert (code, err, len(rows)) == (0, "", 4)
    for row in rows[:3]:
        assert row.keys() >= {"id", "fits", "step_seconds", "tokens_per_second_per_device", "memory", "device_hours", "params",
                              "interval"}  # fmt: skip
    assert rows[3].keys() == {"id", "error"}
    assert estimated(capsys, "--batch", "none.csv")[0] == 2
    code, _, err = estimated(capsys, "--batch", str(tmp_path / "cases.csv"), "--tp", "2")
    assert (code, err.splitlines()[0]) == (2, "error: --tp: with --batch every row says it all")
