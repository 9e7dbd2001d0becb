"""What commands share: from arguments to a graph and a plan, and what is printed."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from famc.errors import FamcError, SpecError, UsageError

if TYPE_CHECKING:
    from famc.graph import Graph
    from famc.plan import Plan


def graph_of(args: argparse.Namespace) -> Graph:
    """The graph of the spec, with --profile, --set and --smoke."""
    from famc.graph import open_family
    from famc.saved import is_plan

    file = Path(args.spec)
    if is_plan(file):
        raise UsageError(f"{file} is a plan, not a spec", "famc build takes it")
    return open_family(file, profile=args.profile, sets=args.set or (), smoke=args.smoke)


def out_of(args: argparse.Namespace, made: Graph) -> Path:
    """--out, else `generated/<family>`."""
    name = made.spec.family.family.name
    return Path(args.out) if args.out else Path("generated") / name


def plan_of(args: argparse.Namespace, *, names: bool = True) -> Plan:
    """The plan of the spec; of the steps of --select, unless `names` is False."""
    from famc.plan import plan

    made = graph_of(args)
    out = out_of(args, made)
    chosen: list[str] | None = None
    if names and getattr(args, "select", None):
        states = None
        if any("state:" in text for text in args.select):
            states = {s.name: s.status for s in plan(made, out).steps.values()}
        chosen = selected(made, args.select, states)
        if not chosen:
            raise UsageError(f"--select {' '.join(args.select)}: no step is left")
    return plan(made, out, names=chosen)


def selected(made: Graph, texts: Sequence[str], states: Any) -> list[str]:
    """Steps that selectors mean. `states`: a plan, or statuses by step; None where `state:` can't be asked for."""
    from famc.select import select

    if states is not None and not isinstance(states, dict):
        states = {s.name: s.status for s in states.steps.values()}
    return select(made, texts, states)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    from famc.store import finite

    echo(json.dumps(finite(value), indent=1, ensure_ascii=False))


def echo(text: str) -> bool:
    """A text on stdout; whether anybody reads it still."""
    try:
        print(text, flush=True)
        return True
    except BrokenPipeError:  # `famc plan SPEC | head`: what is read is enough, and what is done stays done
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return False


def width() -> int:
    """Columns that text may take: the terminal's; elsewhere nothing is folded, unless COLUMNS says so."""
    return shutil.get_terminal_size((10_000, 24)).columns


def say(args: argparse.Namespace, value: Any, text: str) -> None:
    """The answer of a command: JSON if asked for, else text unless quiet."""
    if args.json:
        print_json(value)
    elif not args.quiet:
        echo(text)


def tell(error: FamcError, as_json: bool) -> int:
    """An error as the user sees it; its exit code."""
    text = error.render()
    if as_json:
        print_json({"error": type(error).__name__, "message": text, "exit_code": error.exit_code})
    else:  # mistakes in a spec start with their place, as a compiler's do
        plain = isinstance(error, SpecError) and "\n" in text
        print(text if plain else f"{_red('error')}: {text}", file=sys.stderr)
    return error.exit_code


def _red(text: str) -> str:
    return f"\033[31m{text}\033[0m" if sys.stderr.isatty() and not os.environ.get("NO_COLOR") else text
