"""Plan -> artifacts, on this machine: jobs as processes within its cores and memory, in the order of the
critical path.

In: a Plan. Out: a Report. A failed step stops only what needs it. A rebuilt step whose output is
byte-identical keeps what follows it (early cut-off). Killed at any moment, the next build resumes:
finished artifacts stand, a training step goes on at its last checkpoint. The seam is `execute`: a test
passes a function.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from famc.errors import StepFailed, StoreError, UsageError
from famc.job import Job, base_record, content
from famc.plan import Plan, Planned
from famc.store import Store, read_record

# Kinds whose worker needs no torch: started plain, while the warm server still imports.
PLAIN_KINDS = frozenset({"corpus"})
SERVER_GONE = 254
SERVER_ENDS = 2.0  # seconds that the server has to kill its jobs; then it is killed, and the kernel ends them
Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Report:
    """What a build did. `reused`: kept by early cut-off. `skipped`: not run, as something it needs failed."""

    done: tuple[str, ...] = ()
    reused: tuple[str, ...] = ()
    cached: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.failed


class Execute:
    """Starts jobs as processes: forked from a warm server, or plain. A context: leaving it ends what runs."""

    def __init__(self, command: Sequence[str] = (sys.executable, "-m", "famc.work.server")) -> None:
        self.command = command
        self.server: subprocess.Popen[str] | None = None
        self.words = tempfile.TemporaryFile()  # noqa: SIM115 - the server's stderr: a pipe that nobody reads fills up
        self.ended: dict[str, queue.Queue[int]] = {}  # job file -> where its exit code is waited for
        self.plain: dict[str, subprocess.Popen[bytes]] = {}
        self.lock = threading.Lock()

    def __enter__(self) -> Execute:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",  # torch.set_num_threads gives each job its own number
            "OMP_WAIT_POLICY": "passive",  # threads that spin for one another stand still on a busy machine
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONHASHSEED": "0",
        }
        self.server = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.words, text=True,
            encoding="ascii", env=environment, start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self.server is not None and self.server.stdin is not None
        with self.lock:
            plain, forked = list(self.plain.values()), bool(self.ended)
        for process in plain:
            process.kill()
        with contextlib.suppress(OSError):
            self.server.stdin.close()  # the server kills its jobs and ends
        try:
            self.server.wait(
                SERVER_ENDS if forked else 0.1
            )  # without jobs it may be importing still: never mind
        except subprocess.TimeoutExpired:
            self.server.kill()
            self.server.wait()
        self.words.close()

    def __call__(self, job: Job) -> int:
        """Run a job to its end; its exit code."""
        Path(job.log).parent.mkdir(parents=True, exist_ok=True)
        Path(job.log).write_bytes(b"")
        file = Path(job.log).with_suffix(".job.json")
        file.write_text(job.to_json(), encoding="utf-8")
        assert self.server is not None
        warm = job.kind not in PLAIN_KINDS and self.server.poll() is None  # a server that died is not missed
        code = self._forked(job, file) if warm else self._plain(job, file)
        file.unlink(missing_ok=True)
        return code

    def _forked(self, job: Job, file: Path) -> int:
        assert self.server is not None and self.server.stdin is not None
        box: queue.Queue[int] = queue.Queue()
        with self.lock:
            self.ended[str(file)] = box
            try:
                self.server.stdin.write(json.dumps(str(file)) + "\n")
                self.server.stdin.flush()
            except (OSError, ValueError):  # it has ended, or the build is being left
                box.put(SERVER_GONE)
        code = box.get()
        if code == SERVER_GONE:
            with Path(job.log).open("a", encoding="utf-8") as log:
                log.write(f"error: {job.name}: the process that starts jobs has ended: {self.last_words}\n")
        return code

    def _listen(self) -> None:
        assert self.server is not None and self.server.stdout is not None
        for line in self.server.stdout:
            file, code = json.loads(line)
            with self.lock:
                box = self.ended.pop(file)
            box.put(code)
        with self.lock:
            for box in self.ended.values():
                box.put(SERVER_GONE)

    @property
    def last_words(self) -> str:
        """The last line that the server wrote to stderr."""
        try:
            self.words.seek(0)
            lines = self.words.read().decode("utf-8", "replace").split("\n")
        except ValueError:  # closed: the build is being left
            lines = []
        return next((line for line in reversed(lines) if line.strip()), "no reason given")

    def _plain(self, job: Job, file: Path) -> int:
        threads = str(job.threads)
        environment = {**os.environ, "FAMC_LIFE": "stdin", "OMP_NUM_THREADS": threads, "PYTHONHASHSEED": "0"}
        with Path(job.log).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "famc.work", str(file)], stdin=subprocess.PIPE, stdout=log, stderr=log,
                env=environment, start_new_session=True,
            )  # fmt: skip
        with self.lock:
            self.plain[job.name] = process
        code = process.wait()
        assert process.stdin is not None
        process.stdin.close()
        with self.lock:
            self.plain.pop(job.name, None)
        return code


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """One build a folder: two would train a step twice. Held by the kernel: a killed build holds nothing."""
    (out / ".famc").mkdir(parents=True, exist_ok=True)
    path = out / ".famc" / "lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            hint = "wait for it, or choose another --out"
            raise UsageError(f"another build works in {out} (process {owner})", hint) from None
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


def run(
    plan: Plan,
    *,
    execute: Callable[[Job], int] | None = None,
    tell: Tell = lambda event: None,
    keep_going: bool = True,
    order: Sequence[str] | None = None,
) -> Report:
    """Run all steps of a plan that are not in the store. Of those that can start, the first in `order` does; without it
    the one with the longest chain behind it.

    Raises UsageError before anything starts if one can't run here, or another build works in the folder.
    """
    refuse_blocked(plan)
    started = time.monotonic()
    if not plan.to_run:
        return Report(cached=tuple(plan.steps), seconds=time.monotonic() - started)
    with locked(plan.out), contextlib.ExitStack() as stack:
        runner = execute if execute is not None else stack.enter_context(Execute())
        build = _Build(plan, runner, tell, keep_going, order)
        build.go()
    return Report(
        tuple(build.done), tuple(build.reused), build.cached, dict(build.failed), tuple(build.skipped),
        time.monotonic() - started,
    )  # fmt: skip


def refuse_blocked(plan: Plan) -> None:
    """A step that can't run here is told before anything starts, not at 3 a.m."""
    blocked = [s for s in plan.steps.values() if s.status == "blocked"]
    lines = [f"{s.name}: {reason}" for s in blocked for reason in s.node.missing]
    away = [s for s in plan.to_run if not s.hardware.local or s.hardware.accelerator.kind != "cpu"]
    lines += [f"{s.name} is placed on {s.hardware.name}, which is not this machine" for s in away[:1]]
    if lines:
        shown = lines[:12] + ([f"… and {len(lines) - 12} more"] if len(lines) > 12 else [])
        hint = "famc plan shows them all; select what can run, e.g. famc build SPEC --select kind:pretrain"
        raise UsageError("this build can't run here:\n  " + "\n  ".join(shown), hint)


class _Build:
    """One run: a queue of finished jobs, a thread a running job, decisions in the caller's thread only."""

    def __init__(
        self,
        plan: Plan,
        execute: Callable[[Job], int],
        tell: Tell,
        keep_going: bool,
        order: Sequence[str] | None,
    ) -> None:
        self.plan, self.execute, self.tell, self.keep_going = plan, execute, tell, keep_going
        self.store = Store(plan.out / "store")
        # the plan was made before the lock was held: another build may have made some of it since
        self.waiting = {s.name: s for s in plan.to_run if not self.store.has(s.name, s.key)}
        self.cached = tuple(name for name in plan.steps if name not in self.waiting)
        self.present = {name: list(paths) for name, paths in self.store.scan().items()}
        self.finished: queue.Queue[tuple[str, int]] = queue.Queue()
        self.running: dict[str, threading.Thread] = {}
        self.done: list[str] = []
        self.reused: list[str] = []
        self.failed: dict[str, str] = {}
        self.skipped: list[str] = []
        self.rank = _bottom_levels(plan) if order is None else {n: -float(i) for i, n in enumerate(order)}
        self.before = _waits_for(plan, self.waiting)

    def go(self) -> None:
        while self.waiting or self.running:
            self._start_what_fits()
            if not self.running:
                if self.waiting:
                    self._skip_rest()
                break
            name, code = self.finished.get()
            self._finish(name, code)

    def _ready(self) -> list[Planned]:
        pending = set(self.waiting) | set(self.running)
        ready = [s for s in self.waiting.values() if not pending & self.before[s.name]]
        return sorted(ready, key=lambda s: (-self.rank[s.name], s.name))

    def _start_what_fits(self) -> None:
        progress = True
        while progress and not (self.failed and not self.keep_going):
            progress = False
            for step in self._ready():
                if self.before[step.name] & {*self.failed, *self.skipped}:
                    del self.waiting[step.name]
                    self.skipped.append(step.name)
                    self.tell({"event": "skipped", "step": step.name})
                    progress = True
                elif self._cut_off(step):
                    progress = True
                elif self._fits(step):
                    self._start(step)
                    progress = True

    def _fits(self, step: Planned) -> bool:
        busy = [self.plan.steps[name] for name in self.running]
        device = step.hardware.accelerator.device
        cores = sum(s.threads for s in busy) + step.threads <= device.cores
        room = sum(s.memory.total for s in busy) + step.memory.total <= device.usable
        return not busy or (cores and room)

    def _cut_off(self, step: Planned) -> bool:
        """Take an older artifact of the same content; its inputs have new keys but the same bytes."""
        candidates = self.present.pop(step.name, [])  # once: what did not do will not do later
        if not candidates:
            return False
        job = self.plan.job(step.name)
        try:
            outputs = {role: self.store.record(a, k)["output"] for role, (a, k) in job.inputs.items()}
        except StoreError:
            return False  # the job itself will say which input is damaged
        twin = next(self.store.twins(content(job, outputs), candidates), None)
        if twin is None:
            return False
        old = read_record(twin)
        kept = {k: v for k, v in old.items() if k not in ("files", "output")}
        self.store.reuse(
            step.name, step.key, twin, {**kept, **base_record(job, outputs), "reused": old["key"]}
        )
        del self.waiting[step.name]
        self.reused.append(step.name)
        self.tell({"event": "reused", "step": step.name})
        return True

    def _start(self, step: Planned) -> None:
        job = self.plan.job(step.name)
        del self.waiting[step.name]
        Path(job.metrics).parent.mkdir(parents=True, exist_ok=True)
        Path(job.metrics).unlink(missing_ok=True)

        def supervise() -> None:
            try:
                code = self.execute(job)
            except Exception as error:
                with Path(job.log).open("a", encoding="utf-8") as log:
                    log.write(f"error: {step.name}: could not be started: {error!r}\n")
                code = 1
            self.finished.put((step.name, code))

        thread = threading.Thread(target=supervise, name=step.name, daemon=True)
        self.running[step.name] = thread
        event = {"event": "start", "step": step.name, "kind": step.node.kind}
        self.tell({**event, "seconds": step.seconds, "metrics": job.metrics})
        thread.start()

    def _finish(self, name: str, code: int) -> None:
        self.running.pop(name).join()
        step = self.plan.steps[name]
        if code == 0 and self.store.has(name, step.key):
            record = self.store.record(name, step.key)
            self.done.append(name)
            numbers = {"seconds": record.get("seconds", 0.0), "metrics": record.get("metrics", {})}
            self.tell({"event": "done", "step": name, **numbers})
            return
        reason = why_it_failed(self.plan.job(name), code)
        self.failed[name] = reason
        self.tell({"event": "failed", "step": name, "reason": reason, "log": self.plan.job(name).log})

    def _skip_rest(self) -> None:
        for name in list(self.waiting):
            self.skipped.append(name)
            self.tell({"event": "skipped", "step": name})
        self.waiting.clear()


def why_it_failed(job: Job, code: int) -> str:
    """What ended the job, else the reason that it gave, else what its exit code means."""
    if code == -signal.SIGKILL:
        return f"was killed (out of memory? the plan expected {job.memory / 1e9:.2f} GB)"
    if code < 0:
        names = {s.value: s.name for s in signal.Signals}
        return f"was ended by signal {names.get(-code, -code)}"
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path(job.log).read_text(encoding="utf-8", errors="replace").splitlines()
    for index in range(len(lines) - 1, -1, -1):
        if lines[index].startswith("error: "):
            return "\n".join([lines[index].removeprefix("error: "), *lines[index + 1 :]][:20])
    if code == 0:
        return "ended well, but left no artifact"
    return f"ended with exit code {code} and said nothing"


def _bottom_levels(plan: Plan) -> dict[str, float]:
    """Planned seconds from the start of a step to the end of the longest chain behind it."""
    level: dict[str, float] = {}
    for name in reversed(list(plan.steps)):
        behind = [level[f] for f in plan.graph.followers[name] if f in level]
        level[name] = plan.steps[name].seconds + max(behind, default=0.0)
    return level


def _waits_for(plan: Plan, waiting: Mapping[str, Planned]) -> dict[str, frozenset[str]]:
    """The waiting steps that each step needs, through finished ones too: a gate that is checked again guards
    what follows.
    """
    before: dict[str, frozenset[str]] = {}
    for name, step in plan.steps.items():
        needs = (frozenset({need}) if need in waiting else before[need] for need in step.node.needs)
        before[name] = frozenset().union(*needs)
    return before


def check_damage(plan: Plan) -> list[str]:
    """Cached artifacts of a plan that are not what their records say."""
    store = Store(plan.out / "store")
    return [
        f"{fault.artifact}: {fault.file} {fault.what}"
        for step in plan.steps.values()
        if step.status == "cached"
        for fault in store.verify(store.path(step.name, step.key))
    ]


__all__ = [
    "Execute",
    "Report",
    "StepFailed",
    "check_damage",
    "locked",
    "refuse_blocked",
    "run",
    "why_it_failed",
]
