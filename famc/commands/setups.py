"""One training setup without a spec, and what this machine can do."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from famc.commands.common import echo, say
from famc.errors import UsageError
from famc.spec.quantity import count
from famc.store import finite

# options of `estimate` that hold a number from 1 on
NUMBERS = ("devices", "seq_len", "global_batch", "micro_batch", "tp", "pp", "cp", "ep", "dp_shard", "tokens")
WORDS = ("model", "config", "backend", "recompute", "precision")
SECONDS = (5.0, 600.0)  # that `calibrate` may be asked to measure for


def estimate(args: argparse.Namespace) -> int:
    """The step object of one setup; or of each row of a table, as they are made."""
    from famc.estimate import batch
    from famc.estimate import estimate as one

    asked: dict[str, Any] = {name: _number(name, getattr(args, name)) for name in NUMBERS}
    asked |= {name: getattr(args, name) for name in WORDS}
    if args.batch:
        if given := [f"--{name.replace('_', '-')}" for name, value in asked.items() if value is not None]:
            raise UsageError(f"{', '.join(given)}: with --batch every row says it all", "leave it out")
        if not Path(args.batch).is_file():
            raise UsageError(f"{args.batch}: no such file")
        _stream(batch(Path(args.batch)))
        return 0
    found = one(**asked)
    from famc.report.setup_page import setup_lines

    say(args, found, "\n".join(setup_lines(found)))
    return 0


def calibrate(args: argparse.Namespace) -> int:
    """Measure this machine, and write the backend that plans for it then use."""
    from famc.calibrate import SECONDS as USUAL
    from famc.calibrate import calibrate as measure
    from famc.calibrate import default_path
    from famc.report.setup_page import calibration_lines

    seconds = USUAL if args.seconds is None else args.seconds
    if not SECONDS[0] <= seconds <= SECONDS[1]:
        raise UsageError(f"--seconds {seconds:g}: between {SECONDS[0]:g} and {SECONDS[1]:g}")
    usual = default_path()
    path = usual if args.out is None else Path(args.out)
    if path.is_dir():
        path = path / usual.name
    if path.name != usual.name:
        raise UsageError(
            f"--out {path}: a calibration is looked for under its own name",
            f"call it {path.with_name(usual.name)}",
        )
    if not (args.json or args.quiet):
        print(f"measuring this machine for about {seconds:.0f} s", file=sys.stderr)
    found = measure(path, seconds)
    told: dict[str, Any] = {"file": str(path), **found.model_dump(mode="json", exclude_defaults=True)}
    say(args, told, "\n".join(calibration_lines(found, path)))
    return 0


def _stream(rows: Iterable[Mapping[str, Any]]) -> None:
    """An object a line, each as soon as it is known."""
    for row in rows:
        if not echo(json.dumps(finite(row), ensure_ascii=False)):
            return


def _number(name: str, text: str | None) -> int | None:
    """`300B` -> 300000000000; UsageError, with the option's name, for what is no whole number from 1 on."""
    if text is None:
        return None
    option = f"--{name.replace('_', '-')}"
    try:
        value = count(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from None
    if value < 1:
        raise UsageError(f"{option} {text}: it must be at least 1")
    return value
