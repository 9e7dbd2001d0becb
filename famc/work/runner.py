"""Runs a job: inputs checked, the kind's worker called, the artifact committed with its record last.

In: a job file. Out: an artifact in the store, or exit 1 with the reason as the log's last lines. What a worker returns
are the step's metrics; what it writes into its folder are the artifact's files.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import os
import platform
import resource
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

from famc.errors import FamcError, StepFailed, StoreError
from famc.job import Job, base_record
from famc.steps import KINDS
from famc.store import Store

FULL = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
)  # what a write to a full disk, over a quota or a limit raises
LIFE = "FAMC_LIFE"  # "stdin": the build holds the other end
CHECKPOINTS = "checkpoints"  # inside the partial folder; removed before the artifact is committed
_PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "tokenizers",
    "datasets",
    "onnxruntime",
    "onnxruntime-genai",
    "sentence-transformers",
    "bm25s",
    "numpy",
)


def main(argv: list[str]) -> int:
    """Run the job file that is the only argument."""
    if len(argv) != 1:
        print("usage: python -m famc.work JOB.json", file=sys.stderr)
        return 2
    try:
        job = Job.from_json(Path(argv[0]).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{argv[0]}: not a job file: {error}", file=sys.stderr)
        return 2
    return execute(job)


def execute(job: Job) -> int:
    """Run a job in this process; 0 or 1. What went wrong is printed, the last line first cause."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the build stops its jobs itself
    if os.environ.get(LIFE) == "stdin":
        threading.Thread(target=_die_with_build, daemon=True).start()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr, force=True
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if job.offline:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        run(job)
    except FamcError as error:
        print(f"error: {error.render()}", file=sys.stderr)
        return 1
    except MemoryError:
        print(
            f"error: {job.name}: out of memory; the plan expected {job.memory / 1e9:.2f} GB", file=sys.stderr
        )
        return 1
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            full = f"no room for it on the disk of {job.store} ({error.strerror})"
            print(f"error: {job.name}: {full}; make room, and run the same command again", file=sys.stderr)
            return 1
        traceback.print_exc()
        print(f"error: {job.name}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _die_with_build() -> None:
    """A job must not outlive its build: a build that starts again would work beside it. End of stdin means death."""
    with contextlib.suppress(OSError):
        os.read(0, 1)  # not sys.stdin: a thread inside its lock would abort the interpreter's end
    os._exit(1)


def run(job: Job) -> dict[str, Any]:
    """Run a job and commit its artifact; returns the metrics. Raises StepFailed and whatever the worker raises."""
    store = Store(Path(job.store))
    worker = KINDS[job.kind].worker
    if worker is None:
        raise StepFailed(f"{job.name}: kind '{job.kind}' has no worker in this version of famc")
    inputs, outputs = _inputs(job, store)
    out = store.partial(job.name, job.key)
    out.mkdir(parents=True, exist_ok=True)
    for left in out.iterdir():  # what a killed run left behind; its checkpoints stay
        if left.name != CHECKPOINTS:
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    started, before = time.time(), _cpu_seconds()
    module = importlib.import_module(f"famc.work.{worker}")
    metrics: dict[str, Any] = module.run(job, inputs, out)
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    record = {
        **base_record(job, outputs),
        "metrics": metrics,
        "seconds": round(time.time() - started, 3),
        "cpu_seconds": round(_cpu_seconds() - before, 3),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": versions(),
        "host": {
            "name": socket.gethostname(),
            "machine": platform.machine(),
            "threads": job.threads,
            "precision": job.precision,
        },
    }
    store.commit(job.name, job.key, record)
    return metrics


def _inputs(job: Job, store: Store) -> tuple[dict[str, Path], dict[str, str]]:
    folders: dict[str, Path] = {}
    outputs: dict[str, str] = {}
    for role, (address, key) in job.inputs.items():
        if not store.has(address, key):
            raise StoreError(
                f"{job.name} needs {address}, which is not in the store", "famc build makes it first"
            )
        record = store.record(address, key)
        folder = store.path(address, key)
        for relative, entry in record["files"].items():
            path = folder / relative
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise StoreError(
                    f"{address}: {relative} is not what its record says", "famc verify tells what is damaged"
                )
        folders[role] = folder
        outputs[role] = record["output"]
    return folders, outputs


def _cpu_seconds() -> float:
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def versions() -> dict[str, str]:
    """Versions of what can change an output."""
    found = {"python": platform.python_version()}
    for package in (*_PACKAGES, "famc"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
