"""A plan in a file: what `famc plan -o` writes and `famc build FILE` does, exactly.

In: a Timetable and what it was made from; or a file. Out: JSON; or a Plan with the saved layouts, in the saved order. The
spec is read again: a step whose identity is another one by now is refused with the field that changed. Prices and this
machine's load may have changed: they are in no step's bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from famc.cost.layout import Layout
from famc.cost.memory import Memory
from famc.errors import FitError, UsageError
from famc.graph import Graph, Node, open_family
from famc.hardware import LOCAL, Hardware, hardware
from famc.plan import Plan, Planned, differences, plan
from famc.planning import Timetable
from famc.steps import KINDS
from famc.steps.base import RUNTIME

FORMAT = 1  # of the file; another one is refused
MARK = "famc_plan"
CHANGES = 12  # that a refusal names
AGAIN = "write it again: famc plan SPEC -o FILE"


@dataclass(frozen=True)
class Source:
    """What a plan was made from: the words of the command line."""

    spec: Path
    out: Path
    profile: str | None = None
    sets: Sequence[str] = ()
    smoke: bool = False
    part: bool = False  # whether it is of selected steps only


@dataclass(frozen=True)
class Kept:
    """A step as a file has it."""

    key: str
    backend: str
    start: float
    layout: Layout
    threads: int
    memory: Memory
    seconds: float
    mfu: float
    basis: str
    interval: tuple[float, float]
    precision_why: str
    runtime: Mapping[str, Any]
    identity: Mapping[str, Any]  # version, params, inputs


def to_dict(made: Timetable, source: Source, file: Path) -> dict[str, Any]:
    """`famc plan --json`, and what it takes to do the plan. Paths are relative to the plan's file: both may move together."""
    root = file.absolute().parent
    steps = made.plan.steps.values()
    return {
        MARK: FORMAT,
        "spec": {
            "file": os.path.relpath(source.spec.absolute(), root),
            "out": os.path.relpath(source.out.absolute(), root),
            "profile": source.profile,
            "set": list(source.sets),
            "smoke": source.smoke,
            "part": source.part,
        },
        **made.to_dict(),
        "identity": {s.name: _identity(s.node) for s in steps},
        "runtime": {s.name: {k: v for k, v in s.node.runtime.items() if k in RUNTIME} for s in steps},
        "precision_why": {s.name: s.precision_why for s in steps if s.precision_why},
    }


def _identity(node: Node) -> dict[str, Any]:
    return {"version": KINDS[node.kind].version, "params": dict(node.params), "inputs": dict(node.inputs)}


def is_plan(file: Path) -> bool:
    """Whether a file is a saved plan: by what it holds, not by its name. False for what can't be read."""
    try:
        with file.open("rb") as stream:
            start = stream.read(4096).lstrip()
        return start.startswith(b"{") and MARK.encode() in start
    except OSError:
        return False


def restore(file: Path, out: Path | None = None) -> tuple[Plan, tuple[str, ...]]:
    """The plan of a file, and its steps in the order in which it starts them. `out`: another folder than the saved one.

    Raises UsageError where the spec or its data are others by now, FitError where this hardware is less than it was.
    """
    source, kept = _read(file, out)
    if not source.spec.is_file():
        raise UsageError(f"{file} was made from {source.spec}, which is not there", "move them together")
    graph = open_family(source.spec, profile=source.profile, sets=source.sets, smoke=source.smoke)
    _refuse_others(file, source, graph, kept)
    made = plan(graph, source.out, names=list(kept))
    have = hardware(graph.spec.family, graph.spec.folder)
    steps = {name: _step(step, kept[name], have) for name, step in made.steps.items()}
    place = {name: i for i, name in enumerate(graph.nodes)}
    order = sorted(steps, key=lambda name: (kept[name].start, place[name]))
    return replace(made, steps=steps), tuple(order)


def _read(file: Path, out: Path | None) -> tuple[Source, dict[str, Kept]]:
    """What a file says. UsageError where famc did not write it so."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.get(MARK) != FORMAT:
            raise UsageError(
                f"{file}: a plan of format {found.get(MARK)}, and this famc reads format {FORMAT}", AGAIN
            )
        told, root = found["spec"], file.absolute().parent
        source = Source(
            Path(os.path.normpath(root / told["file"])), out or Path(os.path.normpath(root / told["out"])),
            told["profile"], told["set"], told["smoke"], told["part"],
        )  # fmt: skip
        return source, {step["name"]: _kept(step, found) for step in found["steps"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{file}: no plan that famc wrote: {error!r}", AGAIN) from error


def _kept(step: Mapping[str, Any], found: Mapping[str, Any]) -> Kept:
    name, words = step["name"], dict(step["layout"])
    why = found["precision_why"].get(name, "")
    threads, reasons = int(words.pop("threads")), words.pop("why")
    low, high = step["interval"]
    identity = found["identity"][name]
    return Kept(
        step["key"], step["backend"], float(step["start_seconds"]),
        Layout(**words, why=tuple(r for r in reasons if r != why)), threads,
        Memory(**{f.name: step["memory"][f.name] for f in fields(Memory)}),
        float(step["seconds"]), float(step["mfu"]), step["basis"], (low, high), why, dict(found["runtime"][name]),
        {part: identity[part] for part in ("version", "params", "inputs")},
    )  # fmt: skip


def _refuse_others(file: Path, source: Source, graph: Graph, kept: Mapping[str, Kept]) -> None:
    """UsageError where the spec's steps are not those of the file."""
    wanted = [name for name in kept if name in graph.nodes]
    needed = graph.closure(wanted, up=True) if source.part else graph.nodes
    told = [f"{name}: the spec has no such step any more" for name in kept if name not in graph.nodes]
    told += [f"{name}: the spec has it now, and the plan does not" for name in needed if name not in kept]
    told += [
        f"{name}: {line}" for name in wanted for line in differences(graph.nodes[name], kept[name].identity)
    ]
    if told:
        shown = told[:CHANGES] + ([f"… and {len(told) - CHANGES} more"] if len(told) > CHANGES else [])
        raise UsageError(
            f"{file} is not a plan of {source.spec} as it is now:\n  " + "\n  ".join(shown), AGAIN
        )


def _step(now: Planned, kept: Kept, have: Mapping[str, Hardware]) -> Planned:
    """A step as it was planned, on the hardware that there is."""
    if now.key != kept.key:  # the same values, and yet another key: another composition of keys
        raise UsageError(f"{now.name}: this famc makes other keys than the one that planned it", AGAIN)
    if kept.backend not in have:
        where = "on this machine" if kept.backend == LOCAL else f"on backend '{kept.backend}'"
        raise UsageError(f"{now.name} is planned {where}, which the spec no longer has", AGAIN)
    where_now = have[kept.backend]
    device = where_now.accelerator.device
    cores = kept.threads if device.kind == "cpu" else 1
    lack = ""
    if kept.layout.nodes > where_now.nodes:
        lack = f"{kept.layout.nodes} nodes, and there are {where_now.nodes}"
    elif cores > device.cores:
        lack = f"{cores} cores, and there are {device.cores}"
    elif kept.memory.total > now.limit:
        lack = f"{kept.memory.total / 1e9:.3g} GB a device, and {now.limit / 1e9:.3g} GB can be used"
    if lack and now.status != "cached":
        raise FitError(
            f"{now.name} was planned on {kept.backend} with {lack}", "plan again: famc plan SPEC -o FILE"
        )
    runtime = {k: v for k, v in now.node.runtime.items() if k not in RUNTIME} | dict(kept.runtime)
    return replace(
        now, node=replace(now.node, runtime=runtime), hardware=where_now, layout=kept.layout, memory=kept.memory,
        seconds=kept.seconds, mfu=kept.mfu, basis=kept.basis, interval=kept.interval, precision_why=kept.precision_why,
        threads=kept.threads,
    )  # fmt: skip
