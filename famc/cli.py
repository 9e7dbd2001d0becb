"""The command line: what there is, and what a mistake comes to. Exit codes: 0 done, 1 a step or gate failed, 2 usage or
spec error, 3 the plan can't fit its hardware, 130 Ctrl-C (all resumable). The commands themselves are in famc/commands/.
"""

from __future__ import annotations

import argparse
import gc as garbage
import sys
from collections.abc import Callable, Sequence
from typing import Any

from famc.commands import asks, builds, options, plans, setups
from famc.commands.common import print_json, tell
from famc.errors import FamcError, UsageError, did_you_mean


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    as_json = "--json" in (sys.argv[1:] if argv is None else argv)
    try:
        args = _parser().parse_args(argv)
        garbage.disable()  # commands make plans of up to 100,000 small objects that live to the end; `build` turns it on
        return int(args.run(args))
    except FamcError as error:
        return tell(error, as_json)
    except OSError as error:  # a folder that can't be written, a full disk
        place = f"{error.filename}: " if error.filename else ""
        return tell(UsageError(f"{place}{error.strerror or error}"), as_json)
    except KeyboardInterrupt:
        text = "interrupted: finished steps are kept, training goes on at its last checkpoint: run the command again"
        if as_json:
            print_json({"error": "Interrupted", "message": text, "exit_code": 130})
        else:
            print(f"\n{text}", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are famc's: exit code 2, a suggestion. A misspelt option is no abbreviation."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more, allow_abbrev=False)

    def error(self, message: str) -> Any:
        if "invalid choice: " in message and "COMMAND" in message:
            word = message.partition("invalid choice: ")[2].rpartition(" (choose")[0].strip("'\"")
            message = f"no command is called '{word}'; {did_you_mean(word, COMMANDS)}"
        raise UsageError(message, f"{self.prog} --help")


Command = Callable[[argparse.Namespace], int]
COMMANDS: dict[str, tuple[Command, str]] = {
    "validate": (plans.validate, "check a spec"),
    "plan": (plans.plan, "what a build would do, why, and what it costs"),
    "build": (
        builds.build,
        "make what is missing, release the family; or do exactly a plan that was written",
    ),
    "status": (plans.status, "which steps are built, and why not"),
    "why": (plans.why, "why a step would run: the field that changed, old -> new"),
    "show": (plans.show, "a step with every value and its origin"),
    "graph": (plans.graph, "the steps as a picture: Mermaid or Graphviz"),
    "verify": (builds.verify, "re-hash every artifact"),
    "gc": (builds.gc, "remove artifacts that the spec no longer reaches"),
    "estimate": (setups.estimate, "one training setup without a spec: layout, memory, time, cost"),
    "calibrate": (setups.calibrate, "measure this machine, so that plans for it are no guesses"),
    "bench": (asks.bench, "speed, memory and size of a variant's exports on this machine"),
    "try": (asks.try_variant, "ask a built variant: search, rerank, answer, fill a gap"),
    "doctor": (asks.doctor, "what this machine and installation have; what can be exported to what"),
    "schema": (asks.schema, "the JSON Schema of a spec, for editors"),
}


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="famc", description="The family compiler: one YAML file in, a family of language models out."
    )
    from famc import __version__

    parser.add_argument("--version", action="version", version=f"famc {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for name, (function, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(run=function)
        options.add(name, command)
    return parser


__all__ = ["COMMANDS", "main"]

if __name__ == "__main__":
    sys.exit(main())
