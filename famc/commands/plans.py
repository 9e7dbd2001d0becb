"""What would be built, and why."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from famc.commands.common import echo, graph_of, plan_of, print_json, say, selected, width
from famc.errors import UsageError
from famc.spec.quantity import duration
from famc.store import finite

if TYPE_CHECKING:
    from famc.schedule import Objective


def validate(args: argparse.Namespace) -> int:
    graph = graph_of(args)
    say(
        args,
        {"family": graph.spec.family.family.name, "steps": len(graph.nodes)},
        f"{args.spec}: valid, {len(graph.nodes)} steps",
    )
    return 0


def plan(args: argparse.Namespace) -> int:
    """The table, or its JSON; -o writes it for `famc build`."""
    from famc import saved
    from famc.alternatives import alternatives
    from famc.deployment import deployments
    from famc.plan import measured
    from famc.planning import timetable

    objective, seconds = _objective(args)
    made = plan_of(args)
    if args.json or args.output or args.all:
        made = measured(made)
    found = timetable(made, objective, seconds)
    deployed = deployments(made.graph, made.steps, _devices(args))
    rows = alternatives(made, _names(args.whatif), objective, seconds) if args.whatif else ()
    if args.json or args.output:
        file = Path(args.output or "plan.json")  # stdout may be kept as a plan of this folder, too
        source = saved.Source(
            Path(args.spec), made.out, args.profile, args.set or (), args.smoke, bool(args.select)
        )
        told = saved.to_dict(found, source, file)
        told |= {"targets": [row.to_dict() for row in deployed], "whatif": [row.to_dict() for row in rows]}
        if args.output:
            text = json.dumps(finite(told), indent=1, ensure_ascii=False)
            file.write_text(text + "\n", encoding="utf-8")
        if args.json:
            print_json(told)
    if not args.json and not args.quiet:
        from famc.report.plan_page import plan_lines

        echo("\n".join(plan_lines(found, everything=args.all, width=width(), deployed=deployed, whatif=rows)))
    return 0


def _devices(args: argparse.Namespace) -> list[str] | None:
    """Those of --targets, else one of each kind; None where nothing is said: the spec's own."""
    from famc.steps.deployed import USUAL

    if args.targets is None:
        return None
    return _names(args.targets) or list(USUAL)


def _names(text: str) -> list[str]:
    """`a,b` -> [a, b]."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _objective(args: argparse.Namespace) -> tuple[Objective | None, float]:
    """What is wanted of the whole plan (None: each step's own layout), and seconds for CP-SAT."""
    from famc.schedule import Objective

    if args.optimal is not None and not 0 < args.optimal <= 3600:
        raise UsageError(f"--optimal {args.optimal:g}: seconds between 0 and 3600")
    asked = args.minimize or args.deadline or args.budget or args.optimal
    if not asked:
        return None, 0.0
    try:
        deadline = duration(args.deadline) if args.deadline else None
    except ValueError as error:
        raise UsageError(f"--deadline: {error}") from None
    return Objective(args.minimize, deadline, _usd(args.budget)), args.optimal or 0.0


def _usd(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        amount = float(text.removeprefix("$").replace(",", ""))
    except ValueError:
        amount = -1.0
    if not 0 <= amount < 1e15:
        raise UsageError(f"--budget: expected USD such as 250000, not '{text[:40]}'")
    return amount


def status(args: argparse.Namespace) -> int:
    made = plan_of(args)
    if args.json:
        steps = [
            {"name": s.name, "status": s.status, "because": list(s.because)} for s in made.steps.values()
        ]
        print_json({"family": made.family.family.name, "steps": steps})
        return 0
    from famc.report.live import last_progress
    from famc.report.tables import columns

    rows = [["step", "status", ""]]
    for step in made.steps.values():
        progress = last_progress(Path(made.job(step.name).metrics)) if step.status != "cached" else None
        note = (
            f"{progress['done']:g} of {progress['total']:g} when last seen"
            if progress
            else "; ".join(step.because)
        )
        rows.append([step.name, step.status, note])
    say(args, None, "\n".join(columns(rows)))
    return 0


def why(args: argparse.Namespace) -> int:
    made = plan_of(args, names=False)
    names = selected(made.graph, [args.step], made)
    answers = []
    for name in names:
        step = made.steps[name]
        if step.status == "cached":
            text = ["is built: " + str(Path("store") / f"{name}-{step.key[:12]}")]
        elif step.status == "new":
            text = ["was never built here"]
        else:
            text = list(step.because)
        answers.append({"name": name, "status": step.status, "because": text})
    lines = []
    for answer in answers:
        lines += [f"{answer['name']} ({answer['status']})", *(f"  {line}" for line in answer["because"])]
    say(args, answers, "\n".join(lines))
    return 0


def show(args: argparse.Namespace) -> int:
    from famc.plan import measured

    made = measured(plan_of(args, names=False))
    names = selected(made.graph, [args.step], made)
    if args.json:
        nodes = [made.graph.nodes[n] for n in names]
        more = [
            {"values": n.params, "runtime": n.runtime, "origins": n.origins, "inputs": n.inputs}
            for n in nodes
        ]
        print_json(
            [{**made.steps[n.name].to_dict(), **values} for n, values in zip(nodes, more, strict=True)]
        )
        return 0
    from famc.report.tables import show_lines

    shown = ("\n".join(show_lines(made.graph.nodes[n], made.steps[n])) for n in names)
    say(args, None, "\n\n".join(shown))
    return 0


def graph(args: argparse.Namespace) -> int:
    from famc.report.tables import dot, mermaid

    made = graph_of(args)
    names = selected(made, args.select, None) if args.select else list(made.nodes)
    nodes = [{"name": n, "kind": made.nodes[n].kind, "needs": list(made.nodes[n].needs)} for n in names]
    say(args, {"nodes": nodes}, "\n".join((dot if args.format == "dot" else mermaid)(made, names)))
    return 0
