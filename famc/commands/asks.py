"""What is asked of built variants, and of this installation."""

from __future__ import annotations

import argparse
import shutil
import sys

from famc.commands.common import plan_of, print_json, say, tell
from famc.errors import UsageError, did_you_mean


def bench(args: argparse.Namespace) -> int:
    """How fast a variant's exports are here, in each runtime that is installed."""
    from famc.bench import RUNTIMES, all_requests, measure
    from famc.report.bench import bench_lines

    for name in args.runtime or ():
        if name not in RUNTIMES:
            raise UsageError(f"no runtime is called '{name}'", did_you_mean(name, RUNTIMES))
    made = plan_of(args, names=False)
    wanted = all_requests(
        made, [args.variant], threads=args.threads, prompt=args.prompt, tokens=args.tokens, repeats=args.repeats,
        runtimes=args.runtime or RUNTIMES,
    )  # fmt: skip
    loud = not (args.json or args.quiet) and sys.stderr.isatty()
    result = measure(wanted, tell=lambda text: print(f"measuring {text}", file=sys.stderr) if loud else None)
    say(args, result, "\n".join(bench_lines(result)))
    return 0 if any(row["error"] is None for row in result["rows"]) else 1


def try_variant(args: argparse.Namespace) -> int:
    """A variant's answers: to the text that is given, to what is typed, or to each line of stdin."""
    from famc.attempt import Session, request, texts
    from famc.report.attempt import answer_lines

    wanted = request(
        plan_of(args, names=False), args.variant, by=args.by, k=args.k, dims=args.dims, export=args.export,
        max_new_tokens=args.max_new_tokens, threads=args.threads, spec=args.spec,
    )  # fmt: skip
    loud = not (args.json or args.quiet) and sys.stderr.isatty()
    prompt = "> " if sys.stdin.isatty() and not args.json else ""
    width, found, code = shutil.get_terminal_size().columns, [], 0
    try:
        with Session(wanted, lambda text: print(text, file=sys.stderr) if loud else None) as session:
            if args.text is not None:
                answer = session.ask(args.text)
                say(args, answer, "\n".join(answer_lines(answer, width)))
                return 0
            for text in texts(sys.stdin, prompt):
                try:
                    found.append(session.ask(text))
                except UsageError as error:  # this text can't be asked; the next one may
                    found.append({"variant": wanted.variant, "query": text, "error": error.render()})
                    code = 0 if prompt else 2
                    if not args.json:
                        tell(error, False)
                    continue
                if not args.json:
                    say(args, None, "\n".join(answer_lines(found[-1], width)))
    except KeyboardInterrupt:  # nothing is unfinished: main would speak of steps
        if args.json:
            print_json({"error": "Interrupted", "message": "interrupted", "exit_code": 130})
        else:
            print(file=sys.stderr)
        return 130
    if args.json:
        print_json(found)
    return code


def doctor(args: argparse.Namespace) -> int:
    """What this machine and this installation have; with --exports, what can be exported to what."""
    from famc.report.doctor import exports, exports_lines, machine, machine_lines

    if args.exports:
        say(args, exports(), "\n".join(exports_lines()))
    else:
        found = machine()
        say(args, found, "\n".join(machine_lines(found)))
    return 0


def schema(args: argparse.Namespace) -> int:
    from famc.schema import json_schema

    print_json(json_schema())
    return 0
