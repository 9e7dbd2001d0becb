"""The warm server of a local build: imports torch and transformers once, then forks a process for each job.

In, on stdin: one job file's path a line, as JSON. Out, on stdout: `[PATH, CODE]` when its job has ended.
End of stdin means that the build is gone: the jobs are killed and the server ends, so nothing trains
beside the next build. The server only imports and forks: a process that had run multi-threaded torch
operations could not be forked safely.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import selectors
import signal
import sys
import traceback
from pathlib import Path

from famc.job import Job

PRELOAD = (
    "numpy",
    "pyarrow.parquet",
    "tokenizers",
    "torch",
    "datasets",
    "accelerate",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.llama.modeling_llama",
    "famc.work.runner",
    "famc.work.training",
)
_PR_SET_PDEATHSIG = 1


def serve() -> int:
    """Fork jobs until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the build decides
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    for module in PRELOAD:
        importlib.import_module(module)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(wake_read, selectors.EVENT_READ)
    jobs: dict[int, str] = {}
    pending = b""
    while True:
        for key, _ in selector.select():
            if key.fd == wake_read:
                os.read(wake_read, 4096)
                continue
            chunk = os.read(0, 65536)
            if not chunk:
                for pid in jobs:
                    os.kill(pid, signal.SIGKILL)  # none is reaped yet, so the numbers are theirs
                return 0
            pending += chunk
            *lines, pending = pending.split(b"\n")
            for line in lines:
                file = json.loads(line)
                jobs[_fork(file)] = file
        while jobs:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid in jobs:
                reports.write(json.dumps([jobs.pop(pid), os.waitstatus_to_exitcode(status)]) + "\n")


def _fork(file: str) -> int:
    """The process of a job. Whatever happens in it, it ends there: the server must not run twice."""
    server = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        job = Job.from_json(Path(file).read_text(encoding="utf-8"))
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with contextlib.suppress(OSError, AttributeError):  # Linux: die even if the server is killed
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:  # it was killed in between
            os._exit(1)
        log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        empty = os.open(os.devnull, os.O_RDONLY)
        os.dup2(empty, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from famc.work.runner import execute

        code = execute(job)
    except SystemExit as end:  # a library that ends its process ends a job, with its own code
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # without torch's tear-down: everything that counts is fsynced


if __name__ == "__main__":
    sys.exit(serve())
