"""A build as it runs: a live table on a terminal, plain lines elsewhere, JSON events on request.

In: the events of run.py; running jobs' metrics files are polled. Out: text on a stream.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from famc.plan import Plan
from famc.spec.quantity import show_seconds
from famc.store import finite

_KEEP = (
    "loss", "bits_per_byte", "answer_loss", "chrf", "preference_accuracy", "kl", "perplexity_ratio",
    "bytes_per_token", "tokens_per_second",
)  # fmt: skip


class Lines:
    """A line an event: for pipes, logs and CI. With `as_json`, the events themselves."""

    def __init__(self, plan: Plan, stream: TextIO, *, quiet: bool = False) -> None:
        self.plan, self.stream, self.quiet = plan, stream, quiet
        self.started = time.monotonic()
        self.count = 0

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __call__(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind != "start":
            self.count += 1
        if kind == "skipped" or (self.quiet and kind != "failed"):
            return  # the end of the build counts what was skipped
        text = describe(event)
        clock = f"[{time.monotonic() - self.started:6.1f}s {self.count:>3}/{len(self.plan.to_run)}]"
        with contextlib.suppress(OSError):  # nobody reads any more: the build goes on
            print(f"{clock} {text}", file=self.stream, flush=True)


def describe(event: dict[str, Any]) -> str:
    """An event in a line."""
    step, kind = event["step"], event["event"]
    if kind == "start":
        return f"start    {step} (planned {show_seconds(event['seconds'])})"
    if kind == "done":
        facts = ", ".join(
            f"{k} {v:.4g}" for k, v in event["metrics"].items() if k in _KEEP and isinstance(v, int | float)
        )
        return f"done     {step} in {show_seconds(event['seconds'])}" + (f": {facts}" if facts else "")
    if kind == "reused":
        return f"kept     {step}: its inputs were rebuilt byte-identical"
    return f"FAILED   {step}: {event['reason']}\n         log: {event['log']}"


class Live(Lines):
    """The same on a terminal: what runs stands below, with progress, loss, speed and time left."""

    def __init__(self, plan: Plan, stream: TextIO, *, quiet: bool = False) -> None:
        super().__init__(plan, stream, quiet=quiet)
        from rich.console import Console
        from rich.live import Live as RichLive

        self.console = Console(file=stream, highlight=False)
        self.running: dict[str, dict[str, Any]] = {}
        self.live = RichLive(
            console=self.console, refresh_per_second=4, get_renderable=self._table, transient=True
        )

    def __enter__(self) -> Live:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "start":
            self.running[event["step"]] = {**event, "at": time.monotonic()}
            return
        self.running.pop(event["step"], None)
        self.count += 1
        if event["event"] == "failed" or (event["event"] != "skipped" and not self.quiet):
            style = {"failed": "red", "reused": "cyan"}.get(event["event"])
            self.console.print(describe(event), style=style, markup=False)

    def _table(self) -> Any:
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        for name, event in list(self.running.items()):
            last = last_progress(Path(event["metrics"]))
            spent = time.monotonic() - event["at"]
            share = (
                last["done"] / last["total"]
                if last and last.get("total")
                else min(0.99, spent / max(event["seconds"], 0.1))
            )
            left = spent / share - spent if share > 0.02 else max(0.0, event["seconds"] - spent)
            facts = " ".join(
                f"{k} {last[k]:.4g}" for k in ("loss", "tokens_per_second") if last and k in last
            )
            bar = "█" * round(share * 16) + "░" * (16 - round(share * 16))
            table.add_row(name, bar, f"{share:4.0%}", facts, f"{show_seconds(spent)} + {show_seconds(left)}")
        total = len(self.plan.to_run)
        table.add_row(
            f"{self.count}/{total} steps", "", "", "", show_seconds(time.monotonic() - self.started)
        )
        return table


class Events:
    """Every event as a JSON line."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.lock = threading.Lock()

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __call__(self, event: dict[str, Any]) -> None:
        with self.lock, contextlib.suppress(OSError):
            print(json.dumps(finite(event), ensure_ascii=False), file=self.stream, flush=True)


def last_progress(path: Path) -> dict[str, Any] | None:
    """The last whole line of a metrics file; reads its tail only."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 4096))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return None
    for line in reversed(lines[:-1]):  # what follows the last line end is being written
        with contextlib.suppress(ValueError):
            result = json.loads(line)
            if isinstance(result, dict) and {"done", "total"} <= result.keys():
                return result
    return None


def view(plan: Plan, *, quiet: bool, stream: TextIO | None = None) -> Lines:
    """The view that suits the stream."""
    target = stream or sys.stderr
    return (Live if target.isatty() and not quiet else Lines)(plan, target, quiet=quiet)
