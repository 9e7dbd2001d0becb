"""A build runs each step once, after what it needs and within the machine; what fails stops only what needs
it.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_build import Fake, toy_plan

from famc.errors import UsageError
from famc.job import Job
from famc.run import Execute, check_damage, locked, run, why_it_failed
from famc.store import RECORD, Store, digest

LR = ("lr: 1e-3", "lr: 2e-3")
GUARD = "{match: base, require: {bits_per_byte: {max: 9.0}}}"


def build(folder: Path, *edits: tuple[str, str], names=None, keep_going: bool = True, **fake):
    made = toy_plan(folder, *edits, names=names)
    execute = Fake(made, **fake)
    events: list[dict] = []
    report = run(made, execute=execute, tell=events.append, keep_going=keep_going)
    return made, execute, report, events


# --- order and room ---------------------------------------------------------------------------------------


def test_each_step_runs_once_after_all_that_it_needs(tmp_path):
    made, execute, report, _ = build(tmp_path, seconds=0.005)
    assert report.ok
    assert sorted(execute.ran) == sorted(made.steps) == sorted(report.done)
    for name, step in made.steps.items():
        for need in step.node.needs:
            assert execute.spans[need][1] <= execute.spans[name][0], f"{name} began before {need} had ended"


def test_a_second_build_has_nothing_to_do(tmp_path):
    made, *_ = build(tmp_path)
    _, execute, report, events = build(tmp_path)
    assert (execute.ran, report.done, events) == ([], (), [])
    assert report.cached == tuple(made.steps)


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_no_more_threads_are_planned_at_once_than_there_are_cores(tmp_path, cores):
    edit = ("{cpu: 2, ram: 8GB}", f"{{cpu: {cores}, ram: 8GB}}")
    _, execute, report, _ = build(tmp_path, edit, seconds=0.01)
    assert report.ok
    assert execute.most["threads"] == cores


def test_no_more_memory_is_planned_at_once_than_there_is(tmp_path):
    made, execute, report, _ = build(tmp_path, ("{cpu: 2, ram: 8GB}", "{cpu: 16, ram: 1.4GB}"), seconds=0.01)
    assert report.ok
    assert execute.most["memory"] <= next(iter(made.steps.values())).limit
    assert execute.most["jobs"] == 2, "two fit, and three do not"


def test_the_longest_chain_goes_first(tmp_path):
    _, execute, *_ = build(tmp_path, ("{cpu: 2, ram: 8GB}", "{cpu: 1, ram: 8GB}"))
    assert execute.ran.index("m/pretrain") < execute.ran.index("s/base/eval.lm")
    assert execute.ran.index("m/sft") < execute.ran.index("s/base/card")


def test_every_event_of_a_step_is_told(tmp_path):
    made, _, _, events = build(tmp_path, names=["tokenizer"])
    assert [(e["event"], e["step"]) for e in events if e["step"] == "tokenizer"] == [
        ("start", "tokenizer"),
        ("done", "tokenizer"),
    ]
    assert events[-1] == {"event": "done", "step": "tokenizer", "seconds": 0.5, "metrics": {"score": 1.0}}
    assert len(events) == 2 * len(made.steps)


# --- failure ----------------------------------------------------------------------------------------------


def test_a_failed_step_stops_only_what_needs_it(tmp_path):
    made, _execute, report, events = build(tmp_path, fail=["s/sft"])
    stopped = made.graph.closure(["s/sft"], up=False) - {"s/sft"}
    assert report.failed == {"s/sft": "s/sft: it was told to fail"}
    assert set(report.skipped) == stopped
    assert set(report.done) == set(made.steps) - stopped - {"s/sft"}
    assert "m/instruct/release" in report.done
    assert not report.ok
    assert {e["step"] for e in events if e["event"] == "skipped"} == stopped


def test_the_next_build_makes_what_was_missing_and_nothing_else(tmp_path):
    _, _, first, _ = build(tmp_path, fail=["s/sft"])
    _, execute, report, _ = build(tmp_path)
    assert set(execute.ran) == {"s/sft", *first.skipped}
    assert report.ok


def test_fail_fast_starts_nothing_more(tmp_path):
    made, execute, report, _ = build(tmp_path, fail=["data/code"], keep_going=False)
    assert set(report.failed) == {"data/code"}
    assert set(execute.ran) <= {"data/code", "data/qa"}
    assert set(report.skipped) == set(made.steps) - set(execute.ran)


def test_an_executor_that_raises_fails_its_step(tmp_path):
    def raises(job: Job) -> None:
        if job.name == "s/pretrain":
            raise OSError("no more processes")

    _, _, report, _ = build(tmp_path, during=raises)
    assert report.failed == {"s/pretrain": "s/pretrain: could not be started: OSError('no more processes')"}
    assert "m/instruct/release" in report.done


def test_a_job_that_ends_well_without_an_artifact_has_failed(tmp_path):
    made = toy_plan(tmp_path, names=["tokenizer"])
    report = run(made, execute=lambda job: 0)
    assert report.failed["data/code"] == "ended well, but left no artifact"
    assert "tokenizer" in report.skipped


# --- gates guard what trains from a variant ---------------------------------------------------------------


def test_a_base_that_fails_its_limits_is_not_trained_on(tmp_path):
    _made, execute, report, _ = build(tmp_path, fail=["s/base/gate.limits"])
    assert {"s/sft", "s/instruct/export.onnx-int4", "s/instruct/release", "s/base/release"} <= set(
        report.skipped
    )
    assert not {"s/sft", "s/base/release"} & set(execute.ran)
    assert {"m/sft", "m/base/release", "m/instruct/release"} <= set(report.done)


def test_a_variant_that_fails_its_gate_is_not_exported(tmp_path):
    _made, execute, report, _ = build(tmp_path, fail=["m/instruct/gate.beats-base"])
    assert not [name for name in execute.ran if name.startswith(("m/instruct/export", "m/instruct/parity"))]
    assert "m/instruct/release" in report.skipped
    assert {"m/base/release", "s/instruct/release"} <= set(report.done)
    for export in ("s/instruct/export.onnx-fp32", "s/instruct/export.onnx-int4"):
        assert execute.spans["s/instruct/gate.beats-base"][1] <= execute.spans[export][0]


def test_a_stricter_gate_guards_what_is_built_on_a_cached_step(tmp_path):
    """sft is cached: its key does not know of the gate. What follows it waits for the gate all the same."""
    build(tmp_path)
    edits = [
        (GUARD, GUARD.replace("9.0", "1.0")),
        ("format: onnx, quant: [fp32, int4]", "format: onnx, quant: [fp32, int4, int8]"),
    ]
    made, execute, report, _ = build(tmp_path, *edits, fail=["s/base/gate.limits"])
    assert made.steps["s/sft"].status == "cached"
    assert "s/instruct/export.onnx-int8" in report.skipped
    assert "m/instruct/export.onnx-int8" in report.done
    assert execute.spans["m/base/gate.limits"][1] <= execute.spans["m/instruct/export.onnx-int8"][0]


# --- early cut-off ----------------------------------------------------------------------------------------


def test_what_follows_a_byte_identical_step_is_kept(tmp_path):
    same = ["s/pretrain", "m/pretrain"]
    build(tmp_path, same=same)
    made, execute, report, events = build(tmp_path, LR, same=same)
    assert set(execute.ran) == set(same)
    assert set(report.reused) == {n for n in made.steps if made.steps[n].status == "changed"} - set(same)
    store = Store(made.out / "store")
    assert [fault for paths in store.scan().values() for path in paths for fault in store.verify(path)] == []
    record = store.record("s/sft", made.steps["s/sft"].key)
    assert record["key"] == made.steps["s/sft"].key
    assert record["inputs"]["s/pretrain"] == made.steps["s/pretrain"].key
    assert record["reused"] != record["key"]
    assert {e["step"] for e in events if e["event"] == "reused"} == set(report.reused)
    assert toy_plan(tmp_path, LR).to_run == ()


def test_what_follows_other_bytes_is_rebuilt(tmp_path):
    build(tmp_path, same=["s/pretrain"])
    _, execute, report, _ = build(tmp_path, LR, same=["s/pretrain"])
    assert "m/sft" in execute.ran
    assert "s/sft" in report.reused


def test_a_damaged_twin_is_not_kept(tmp_path):
    same = ["s/pretrain", "m/pretrain"]
    made, *_ = build(tmp_path, same=same)
    (Store(made.out / "store").path("s/sft", made.steps["s/sft"].key) / "output.txt").write_text("!" * 64)
    _, execute, report, _ = build(tmp_path, LR, same=same)
    assert set(execute.ran) == {*same, "s/sft"}
    assert "s/instruct/release" in report.reused, "the rebuilt step is what the damaged one was"


def test_an_input_whose_record_is_damaged_fails_its_reader_not_the_build(tmp_path):
    made, *_ = build(tmp_path)
    (Store(made.out / "store").path("data/qa", made.steps["data/qa"].key) / RECORD).write_text("{")
    _, _, report, _ = build(tmp_path, ("epochs: 1}", "epochs: 2}"))
    assert set(report.failed) == {"m/instruct/eval.chat", "s/instruct/eval.chat"}
    assert set(report.done) == {"m/sft", "s/sft"}


def test_damage_is_found_in_cached_steps(tmp_path):
    made, *_ = build(tmp_path)
    (Store(made.out / "store").path("s/sft", made.steps["s/sft"].key) / "output.txt").unlink()
    assert check_damage(toy_plan(tmp_path)) == [
        f"s/sft-{made.steps['s/sft'].key[:12]}: output.txt is missing"
    ]


# --- what is refused before anything starts ---------------------------------------------------------------


def test_a_plan_with_a_blocked_step_is_refused_and_nothing_is_written(tmp_path):
    made = toy_plan(tmp_path, ("path: data/qa.jsonl", "path: data/none.jsonl"))
    with pytest.raises(UsageError, match=r"this build can't run here:\n  data/qa: .*none\.jsonl"):
        run(made, execute=Fake(made))
    assert not made.out.exists()


def test_a_plan_for_another_machine_is_refused(tmp_path):
    made = toy_plan(tmp_path, ("{cpu: 2, ram: 8GB}", "{gpu: h100-80g}"))
    with pytest.raises(UsageError, match="is placed on laptop, which is not this machine"):
        run(made, execute=Fake(made))
    assert not made.out.exists()


def test_two_builds_in_one_folder_are_refused_naming_the_other(tmp_path):
    made = toy_plan(tmp_path)
    with (
        locked(made.out),
        pytest.raises(UsageError, match=rf"another build works in .*out \(process {os.getpid()}\)"),
    ):
        run(made, execute=Fake(made))
    assert run(made, execute=Fake(made)).ok, "the lock is free again"


def test_what_another_build_made_meanwhile_is_not_made_again(tmp_path):
    early = toy_plan(tmp_path)
    build(tmp_path)
    execute = Fake(early)
    report = run(early, execute=execute)
    assert execute.ran == []
    assert report.cached == tuple(early.steps)


def test_the_lock_of_a_killed_build_is_free(tmp_path):
    code = (
        "import time; from pathlib import Path; from famc.run import locked\n"
        f"with locked(Path({str(tmp_path)!r})): print(1, flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(UsageError, match=f"process {other.pid}"), locked(tmp_path):
        pass
    other.kill()
    other.wait()
    other.stdout.close()
    with locked(tmp_path), (tmp_path / ".famc" / "lock").open() as file, pytest.raises(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# --- why it failed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log", "code", "reason"),
    [
        ("loading\nerror: s/sft: no data\nhint: look\n", 1, "s/sft: no data\nhint: look"),
        ("error: first\nmore\nerror: last\n", 1, "last"),
        ("Traceback: much\n", 1, "ended with exit code 1 and said nothing"),
        ("", 7, "ended with exit code 7 and said nothing"),
        (None, 2, "ended with exit code 2 and said nothing"),
        ("", 0, "ended well, but left no artifact"),
        ("", -signal.SIGKILL, "was killed (out of memory? the plan expected 2.50 GB)"),
        ("", -signal.SIGSEGV, "was ended by signal SIGSEGV"),
        ("", -40, "was ended by signal 40"),
        (
            "error: a library's own idea of an error\n",
            -signal.SIGKILL,
            "was killed (out of memory? the plan expected 2.50 GB)",
        ),
    ],
)
def test_the_reason_is_the_jobs_own_or_what_its_code_means(tmp_path, log, code, reason):
    job = Job.for_test("s/sft", "sft", {}, log=str(tmp_path / "log"), memory=2.5e9)
    if log is not None:
        Path(job.log).write_text(log)
    assert why_it_failed(job, code) == reason


def test_a_long_reason_is_cut(tmp_path):
    job = Job.for_test("s/sft", "sft", {}, log=str(tmp_path / "log"))
    Path(job.log).write_text("error: x\n" + "line\n" * 100)
    assert len(why_it_failed(job, 1).splitlines()) == 20


# --- the warm server: real processes, a worker that does as it is told ------------------------------------

SERVER = """
import os, sys, time, types
from pathlib import Path
from famc.work import server

def act(job, inputs, out):
    what = job.params["do"]
    if what == "raise": raise ValueError("bad luck")
    if what == "exit": sys.exit(3)
    if what == "gone": os._exit(7)
    if what == "abort": os.abort()
    if what == "server": os.kill(os.getppid(), 9); time.sleep(60)
    if what == "sleep": Path(job.params["mark"]).write_text(str(os.getpid())); time.sleep(60)
    print("working", flush=True)
    (out / "file").write_text("made")
    return {"score": 1}

sys.modules["famc.work.gate"] = types.SimpleNamespace(run=act)
server.PRELOAD = ("famc.work.runner",)
sys.exit(server.serve())
"""
COMMAND = (sys.executable, "-c", SERVER)


def job_that(folder: Path, do: str, name: str = "s/base/gate.g", **params: str) -> Job:
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    log = folder / "logs" / f"{name.replace('/', '.')}-{do}.log"
    params = {"do": do, **params}
    return Job(name, "gate", digest([do, name]), str(folder / "store"), params, log=str(log))


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process has ended (a zombie has)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


def wait_for(path: Path, seconds: float = 20.0) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.02)
    raise AssertionError(f"{path} never came")


def test_the_server_runs_jobs_and_survives_those_that_crash(tmp_path):
    with Execute(COMMAND) as execute:
        good = job_that(tmp_path, "work")
        assert execute(good) == 0
        assert Store(Path(good.store)).verify(Store(Path(good.store)).path(good.name, good.key)) == []
        assert Path(good.log).read_text() == "working\n"
        codes = {do: execute(job_that(tmp_path, do)) for do in ("raise", "exit", "gone", "abort")}
        assert codes == {"raise": 1, "exit": 3, "gone": 7, "abort": -signal.SIGABRT}
        assert why_it_failed(job_that(tmp_path, "raise"), 1) == "s/base/gate.g: ValueError: bad luck"
        assert execute(job_that(tmp_path, "work", "m/base/gate.g")) == 0
        assert list((tmp_path / "logs").glob("*.job.json")) == []


def test_a_path_with_spaces_and_line_ends_is_a_path(tmp_path):
    with Execute(COMMAND) as execute:
        assert execute(job_that(tmp_path / "a b\nc é", "work")) == 0


def test_leaving_the_build_kills_what_runs(tmp_path):
    import threading

    mark = tmp_path / "pid"
    with Execute(COMMAND) as execute:
        thread = threading.Thread(
            target=execute, args=(job_that(tmp_path, "sleep", mark=str(mark)),), daemon=True
        )
        thread.start()
        pid = int(wait_for(mark))
        assert execute.server is not None
        server = execute.server.pid
        left = time.monotonic()
    assert gone(pid)
    assert gone(server)
    thread.join(5.0)
    assert not thread.is_alive()
    assert time.monotonic() - left < 4.0


def test_jobs_of_a_server_that_is_killed_fail_with_the_reason_and_later_ones_run_without_it(tmp_path):
    with Execute(COMMAND) as execute:
        job = job_that(tmp_path, "server")
        code = execute(job)
        assert why_it_failed(job, code).startswith("s/base/gate.g: the process that starts jobs has ended")
        assert execute.server is not None
        execute.server.wait(5.0)
        later = job_that(tmp_path, "work", "m/base/gate.g")
        assert execute(later) == 1, "a real gate, that has nothing to check"
        assert "nothing to check" in why_it_failed(later, 1)


def test_a_server_that_can_not_start_says_why(tmp_path):
    with Execute(
        (sys.executable, "-c", "import sys; sys.stdin.readline(); raise SystemExit('no torch here')")
    ) as execute:
        job = job_that(tmp_path, "work")
        assert (
            why_it_failed(job, execute(job))
            == "s/base/gate.g: the process that starts jobs has ended: no torch here"
        )


def test_a_server_that_warns_at_length_does_not_stand_still(tmp_path):
    talks = SERVER.replace("server.PRELOAD =", "sys.stderr.write('warning\\n' * 100_000)\nserver.PRELOAD =")
    with Execute((sys.executable, "-c", talks)) as execute:
        assert execute(job_that(tmp_path, "work")) == 0


def test_a_build_that_is_killed_leaves_no_process(tmp_path):
    mark = tmp_path / "pid"
    job = job_that(tmp_path, "sleep", mark=str(mark))
    code = (
        "import sys; from famc.job import Job; from famc.run import Execute\n"
        f"with Execute((sys.executable, '-c', {SERVER!r})) as execute:\n"
        "    print(execute.server.pid, flush=True)\n"
        f"    execute(Job.from_json({job.to_json()!r}))\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    server, worker = int(other.stdout.readline()), int(wait_for(mark))
    other.kill()
    other.wait()
    other.stdout.close()
    assert gone(worker), "the job outlived its build"
    assert gone(server), "the server outlived its build"


@pytest.mark.slow
def test_the_real_server_runs_a_real_gate(tmp_path):
    """With torch imported first, as in a build."""
    import json

    score = tmp_path / "store" / ".partial" / f"s.base.eval.lm-{'e' * 12}"
    score.mkdir(parents=True)
    (score / "results.json").write_text(json.dumps({"bits_per_byte": {"value": 2.0, "stderr": 0.1, "n": 10}}))
    store = Store(tmp_path / "store")
    store.commit("s/base/eval.lm", "e" * 64, {"key": "e" * 64, "metrics": {}})
    (tmp_path / "logs").mkdir()
    with Execute() as execute:
        for limit, code in ((3.0, 0), (1.0, 1)):
            job = Job(
                name="s/base/gate.g",
                kind="gate",
                key=f"{int(limit):064x}",
                store=str(store.root),
                log=str(tmp_path / "logs" / "g.log"),
                params={"require": {"bits_per_byte": {"max": limit}}},
                inputs={"score": ("s/base/eval.lm", "e" * 64)},
            )
            assert execute(job) == code, Path(job.log).read_text()
    assert "bits_per_byte is 2, must be <= 1" in why_it_failed(job, 1)
