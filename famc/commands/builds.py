"""Making what is missing, and keeping the store in order."""

from __future__ import annotations

import argparse
import gc as garbage
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from famc.commands.common import echo, graph_of, out_of, plan_of, print_json, say
from famc.errors import UsageError
from famc.spec.quantity import show_seconds

if TYPE_CHECKING:
    from famc.plan import Plan


def build(args: argparse.Namespace) -> int:
    """Make what is missing, release what is whole."""
    from famc.publish import publish
    from famc.report.tables import nothing_line

    made, order = _to_build(args)
    if not made.to_run and not args.json:
        publish(made)
        say(args, None, nothing_line(made))
        return 0
    from famc.report.live import Events, view  # here: nothing to do is the common case, and told at once
    from famc.run import run

    garbage.enable()
    with Events(sys.stderr) if args.json else view(made, quiet=args.quiet) as tell:
        report = run(made, tell=tell, keep_going=not args.fail_fast, order=order)
    folders = publish(made, report.failed)
    result = {
        "done": list(report.done), "reused": list(report.reused), "cached": len(report.cached), "failed": dict(report.failed),
        "skipped": list(report.skipped), "seconds": round(report.seconds, 2), "released": [str(f) for f in folders],
    }  # fmt: skip
    if args.json:
        print_json(result)
    elif not args.quiet:
        lines = [
            f"{len(report.done)} steps done, {len(report.reused)} kept, {len(report.cached)} cached, "
            f"{len(report.failed)} failed, {len(report.skipped)} skipped in {show_seconds(report.seconds)}",
            *(f"  {folder}" for folder in folders),
        ]
        if report.failed:
            lines += ["", "what to do: mend the cause (each log is named above) and run the same command again; "
                      "what is done stays done"]  # fmt: skip
        echo("\n".join(lines))
    return 0 if report.ok else 1


def _to_build(args: argparse.Namespace) -> tuple[Plan, tuple[str, ...] | None]:
    """The spec's plan; or a saved one, with the order of its steps."""
    from famc import saved

    file = Path(args.spec)
    if not saved.is_plan(file):
        return plan_of(args), None
    given = {
        "--profile": args.profile, "--set": args.set, "--smoke": args.smoke, "--select": args.select,
    }  # fmt: skip
    if words := [name for name, value in given.items() if value]:
        raise UsageError(f"{', '.join(words)}: {file} is a plan, and is done as it stands",
                         "plan again with them: famc plan SPEC -o FILE")  # fmt: skip
    return saved.restore(file, Path(args.out) if args.out else None)


def verify(args: argparse.Namespace) -> int:
    from famc.run import locked
    from famc.store import Store

    out = out_of(args, graph_of(args))
    store = Store(out / "store")
    folders = [path for paths in store.scan().values() for path in paths]
    faults = [fault for folder in folders for fault in store.verify(folder)]
    told = [{"artifact": f.artifact, "file": f.file, "what": f.what} for f in faults]
    end = f"{len(faults)} damaged files" if faults else "every file is what its record says"
    lines = [*(f"{f.artifact}: {f.file} {f.what}" for f in faults), f"{len(folders)} artifacts: {end}"]
    say(
        args,
        {"artifacts": len(folders), "faults": told, "repaired": bool(faults and args.repair)},
        "\n".join(lines),
    )
    if faults and args.repair:
        with locked(out):
            for name in dict.fromkeys(f.artifact for f in faults):
                store.remove(out / "store" / name)
        if not args.quiet:
            print("the damaged artifacts are removed: famc build makes them again", file=sys.stderr)
    return 1 if faults else 0


def gc(args: argparse.Namespace) -> int:
    from famc.graph import open_family
    from famc.plan import keys
    from famc.run import locked
    from famc.spec.quantity import show_bytes
    from famc.store import Store

    made = graph_of(args)
    out = out_of(args, made)
    graphs = [
        made
    ]  # with --profile, --set and --smoke as given; and the specs as they stand, in every profile
    for file in (Path(args.spec), *map(Path, args.keep or ())):
        plain = open_family(file)
        graphs += [plain, *(open_family(file, profile=profile) for profile in plain.spec.family.profiles)]
    store = Store(out / "store")
    reached = {store.path(name, key) for g in graphs for name, key in keys(g).items()}
    partial = {store.partial(name, key) for g in graphs for name, key in keys(g).items()}
    found = [path for paths in store.scan().values() for path in paths]
    garbage = [p for p in found if p not in reached] + [p for p in store.partials() if p not in partial]
    size = 0
    if args.dry_run:
        size = sum(f.stat().st_size for p in garbage for f in p.rglob("*") if f.is_file())
    elif garbage:
        with locked(out):
            size = sum(store.remove(path) for path in garbage)
    result = {
        "removed": [str(p) for p in garbage],
        "bytes": size,
        "kept": len(found) - sum(p in found for p in garbage),
        "dry_run": args.dry_run,
    }
    text = f"{len(garbage)} artifacts, {show_bytes(size)} {'would be' if args.dry_run else 'were'} removed; {result['kept']} are kept"
    say(args, result, text)
    return 0
