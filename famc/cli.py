"""The command line: one short function a command. Thin: it parses, calls, prints. Exit codes: 0 done, 1 a
step or gate failed, 2 usage or spec error, 3 the plan can't fit its hardware, 130 Ctrl-C (all resumable).
"""

from __future__ import annotations

import argparse
import gc as garbage
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from famc.errors import FamcError, FitError, SpecError, UsageError, did_you_mean

if TYPE_CHECKING:
    from famc.graph import Graph
    from famc.plan import Plan


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    as_json = "--json" in (sys.argv[1:] if argv is None else argv)
    try:
        args = _parser().parse_args(argv)
        garbage.disable()  # commands make plans of up to 100,000 small objects that live to the end; `build` turns it on
        return int(args.run(args))
    except FamcError as error:
        return _tell(error, as_json)
    except OSError as error:  # a folder that can't be written, a full disk
        place = f"{error.filename}: " if error.filename else ""
        return _tell(UsageError(f"{place}{error.strerror or error}"), as_json)
    except KeyboardInterrupt:
        text = "interrupted: finished steps are kept, training goes on at its last checkpoint: run the command again"
        if as_json:
            _print_json({"error": "Interrupted", "message": text, "exit_code": 130})
        else:
            print(f"\n{text}", file=sys.stderr)
        return 130


def _tell(error: FamcError, as_json: bool) -> int:
    text = error.render()
    if as_json:
        _print_json({"error": type(error).__name__, "message": text, "exit_code": error.exit_code})
    else:  # mistakes in a spec start with their place, as a compiler's do
        plain = isinstance(error, SpecError) and "\n" in text
        print(text if plain else f"{_red('error')}: {text}", file=sys.stderr)
    return error.exit_code


# --- commands ----------------------------------------------------------------------------------------------------------


def validate(args: argparse.Namespace) -> int:
    graph = _graph(args)
    _say(
        args,
        {"family": graph.spec.family.family.name, "steps": len(graph.nodes)},
        f"{args.spec}: valid, {len(graph.nodes)} steps",
    )
    return 0


def plan(args: argparse.Namespace) -> int:
    from famc.plan import measured

    made = _plan(args)
    if args.json or args.output or args.all:
        made = measured(made)
    if args.output:
        Path(args.output).write_text(json.dumps(made.to_dict(), indent=1) + "\n", encoding="utf-8")
    if args.json:
        _print_json(made.to_dict())
    elif not args.quiet:
        from famc.report.tables import plan_lines

        _print("\n".join(plan_lines(made, everything=args.all)))
    return 0


def build(args: argparse.Namespace) -> int:
    from famc.publish import publish
    from famc.report.tables import show_seconds, total_lines

    made = _plan(args)
    if not made.to_run and not args.json:
        publish(made)
        _say(args, None, "\n".join(total_lines(made)))
        return 0
    from famc.report.live import Events, view  # here: nothing to do is the common case, and told at once
    from famc.run import run

    garbage.enable()
    with Events(sys.stderr) if args.json else view(made, quiet=args.quiet) as tell:
        report = run(made, tell=tell, keep_going=not args.fail_fast)
    folders = publish(made, report.failed)
    result = {
        "done": list(report.done), "reused": list(report.reused), "cached": len(report.cached), "failed": dict(report.failed),
        "skipped": list(report.skipped), "seconds": round(report.seconds, 2), "released": [str(f) for f in folders],
    }  # fmt: skip
    if args.json:
        _print_json(result)
    elif not args.quiet:
        lines = [
            f"{len(report.done)} steps done, {len(report.reused)} kept, {len(report.cached)} cached, "
            f"{len(report.failed)} failed, {len(report.skipped)} skipped in {show_seconds(report.seconds)}",
            *(f"  {folder}" for folder in folders),
        ]
        if report.failed:
            lines += ["", "what to do: mend the cause (each log is named above) and run the same command again; "
                      "what is done stays done"]  # fmt: skip
        _print("\n".join(lines))
    return 0 if report.ok else 1


def status(args: argparse.Namespace) -> int:
    made = _plan(args)
    if args.json:
        steps = [
            {"name": s.name, "status": s.status, "because": list(s.because)} for s in made.steps.values()
        ]
        _print_json({"family": made.family.family.name, "steps": steps})
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
    _say(args, None, "\n".join(columns(rows)))
    return 0


def why(args: argparse.Namespace) -> int:
    made = _plan(args, names=False)
    names = _selected(args, made.graph, [args.step], made)
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
    _say(args, answers, "\n".join(lines))
    return 0


def show(args: argparse.Namespace) -> int:
    from famc.plan import measured

    made = measured(_plan(args, names=False))
    names = _selected(args, made.graph, [args.step], made)
    if args.json:
        nodes = [made.graph.nodes[n] for n in names]
        more = [
            {"values": n.params, "runtime": n.runtime, "origins": n.origins, "inputs": n.inputs}
            for n in nodes
        ]
        _print_json(
            [{**made.steps[n.name].to_dict(), **values} for n, values in zip(nodes, more, strict=True)]
        )
        return 0
    from famc.report.tables import show_lines

    shown = ("\n".join(show_lines(made.graph.nodes[n], made.steps[n])) for n in names)
    _say(args, None, "\n\n".join(shown))
    return 0


def graph(args: argparse.Namespace) -> int:
    from famc.report.tables import dot, mermaid

    made = _graph(args)
    names = _selected(args, made, args.select, None) if args.select else list(made.nodes)
    nodes = [{"name": n, "kind": made.nodes[n].kind, "needs": list(made.nodes[n].needs)} for n in names]
    _say(args, {"nodes": nodes}, "\n".join((dot if args.format == "dot" else mermaid)(made, names)))
    return 0


def verify(args: argparse.Namespace) -> int:
    from famc.run import locked
    from famc.store import Store

    out = _out(args, _graph(args))
    store = Store(out / "store")
    folders = [path for paths in store.scan().values() for path in paths]
    faults = [fault for folder in folders for fault in store.verify(folder)]
    told = [{"artifact": f.artifact, "file": f.file, "what": f.what} for f in faults]
    end = f"{len(faults)} damaged files" if faults else "every file is what its record says"
    lines = [*(f"{f.artifact}: {f.file} {f.what}" for f in faults), f"{len(folders)} artifacts: {end}"]
    _say(
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

    made = _graph(args)
    out = _out(args, made)
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
    _say(args, result, text)
    return 0


def bench(args: argparse.Namespace) -> int:
    """How fast a variant's exports are here, in each runtime that is installed."""
    from famc.bench import RUNTIMES, all_requests, measure
    from famc.report.bench import bench_lines

    for name in args.runtime or ():
        if name not in RUNTIMES:
            raise UsageError(f"no runtime is called '{name}'", did_you_mean(name, RUNTIMES))
    made = _plan(args, names=False)
    wanted = all_requests(
        made, [args.variant], threads=args.threads, prompt=args.prompt, tokens=args.tokens, repeats=args.repeats,
        runtimes=args.runtime or RUNTIMES,
    )  # fmt: skip
    loud = not (args.json or args.quiet) and sys.stderr.isatty()
    result = measure(wanted, tell=lambda text: print(f"measuring {text}", file=sys.stderr) if loud else None)
    _say(args, result, "\n".join(bench_lines(result)))
    return 0 if any(row["error"] is None for row in result["rows"]) else 1


def try_variant(args: argparse.Namespace) -> int:
    """A variant's answers: to the text that is given, to what is typed, or to each line of stdin."""
    from famc.attempt import Session, request, texts
    from famc.report.attempt import answer_lines

    wanted = request(
        _plan(args, names=False), args.variant, by=args.by, k=args.k, dims=args.dims, export=args.export,
        max_new_tokens=args.max_new_tokens, threads=args.threads, spec=args.spec,
    )  # fmt: skip
    loud = not (args.json or args.quiet) and sys.stderr.isatty()
    prompt = "> " if sys.stdin.isatty() and not args.json else ""
    width, found, code = shutil.get_terminal_size().columns, [], 0
    try:
        with Session(wanted, lambda text: print(text, file=sys.stderr) if loud else None) as session:
            if args.text is not None:
                answer = session.ask(args.text)
                _say(args, answer, "\n".join(answer_lines(answer, width)))
                return 0
            for text in texts(sys.stdin, prompt):
                try:
                    found.append(session.ask(text))
                except UsageError as error:  # this text can't be asked; the next one may
                    found.append({"variant": wanted.variant, "query": text, "error": error.render()})
                    code = 0 if prompt else 2
                    if not args.json:
                        _tell(error, False)
                    continue
                if not args.json:
                    _say(args, None, "\n".join(answer_lines(found[-1], width)))
    except KeyboardInterrupt:  # nothing is unfinished: main would speak of steps
        if args.json:
            _print_json({"error": "Interrupted", "message": "interrupted", "exit_code": 130})
        else:
            print(file=sys.stderr)
        return 130
    if args.json:
        _print_json(found)
    return code


def doctor(args: argparse.Namespace) -> int:
    """What this machine and this installation have; with --exports, what can be exported to what."""
    from famc.report.doctor import exports, exports_lines, machine, machine_lines

    if args.exports:
        _say(args, exports(), "\n".join(exports_lines()))
    else:
        found = machine()
        _say(args, found, "\n".join(machine_lines(found)))
    return 0


def schema(args: argparse.Namespace) -> int:
    from famc.schema import json_schema

    _print_json(json_schema())
    return 0


# --- shared ------------------------------------------------------------------------------------------------------------


def _graph(args: argparse.Namespace) -> Graph:
    from famc.graph import open_family

    return open_family(Path(args.spec), profile=args.profile, sets=args.set or (), smoke=args.smoke)


def _out(args: argparse.Namespace, made: Graph) -> Path:
    name = made.spec.family.family.name
    return Path(args.out) if args.out else Path("generated") / name


def _plan(args: argparse.Namespace, *, names: bool = True) -> Plan:
    from famc.plan import plan as make_plan

    made = _graph(args)
    out = _out(args, made)
    chosen: list[str] | None = None
    if names and getattr(args, "select", None):
        states = None
        if any("state:" in text for text in args.select):
            states = {s.name: s.status for s in make_plan(made, out).steps.values()}
        chosen = _selected(args, made, args.select, states)
        if not chosen:
            raise UsageError(f"--select {' '.join(args.select)}: no step is left")
    return make_plan(made, out, names=chosen)


def _selected(args: argparse.Namespace, made: Graph, texts: Sequence[str], states: Any) -> list[str]:
    from famc.select import select

    if states is not None and not isinstance(states, dict):
        states = {s.name: s.status for s in states.steps.values()}
    return select(made, texts, states)


def _print_json(value: Any) -> None:
    from famc.store import finite

    _print(json.dumps(finite(value), indent=1, ensure_ascii=False))


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `famc plan SPEC | head`: what is read is enough, and what is done stays done
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _say(args: argparse.Namespace, value: Any, text: str) -> None:
    if args.json:
        _print_json(value)
    elif not args.quiet:
        _print(text)


def _red(text: str) -> str:
    return f"\033[31m{text}\033[0m" if sys.stderr.isatty() and not os.environ.get("NO_COLOR") else text


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
    "validate": (validate, "check a spec"),
    "plan": (plan, "what a build would do, why, and what it costs"),
    "build": (build, "make what is missing, release the family"),
    "status": (status, "which steps are built, and why not"),
    "why": (why, "why a step would run: the field that changed, old -> new"),
    "show": (show, "a step with every value and its origin"),
    "graph": (graph, "the steps as a picture: Mermaid or Graphviz"),
    "verify": (verify, "re-hash every artifact"),
    "gc": (gc, "remove artifacts that the spec no longer reaches"),
    "bench": (bench, "speed, memory and size of a variant's exports on this machine"),
    "try": (try_variant, "ask a built variant: search, rerank, answer, fill a gap"),
    "doctor": (doctor, "what this machine and installation have; what can be exported to what"),
    "schema": (schema, "the JSON Schema of a spec, for editors"),
}


def _bench_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("variant", metavar="VARIANT", help="m/instruct, or instruct at all its sizes")
    command.add_argument(
        "--threads", metavar="N", type=int, default=0, help="threads of a runtime (default: all cores)"
    )
    command.add_argument("--prompt", metavar="N", type=int, default=512, help="tokens of the prompt")
    command.add_argument("--tokens", metavar="N", type=int, default=64, help="tokens that are decoded")
    command.add_argument("--repeats", metavar="N", type=int, default=3, help="how often each is measured")
    command.add_argument(
        "--runtime", metavar="NAME", action="append", help="only this one, e.g. llama.cpp; may be repeated"
    )


def _try_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("variant", metavar="VARIANT", help="m/instruct, or instruct if one size has it")
    command.add_argument(
        "text", metavar="TEXT", nargs="?", help="what to ask (default: a prompt, or each line of stdin)"
    )
    command.add_argument("-k", metavar="N", type=int, help="results that are shown (default: 5)")
    command.add_argument("--by", metavar="HOW", help="search by bm25, embedder or fused, both of them")
    command.add_argument("--dims", metavar="N", type=int, help="search by the first N numbers of a vector")
    command.add_argument("--max-new-tokens", metavar="N", type=int, help="of an answer (default: 128)")
    command.add_argument("--export", metavar="NAME", help="run this export, e.g. onnx-int8, not the weights")
    command.add_argument("--threads", metavar="N", type=int, default=0, help="default: all cores")


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
        command.add_argument("--json", action="store_true", help="one JSON document on stdout, nothing else")
        command.add_argument("-q", "--quiet", action="store_true", help="errors only")
        if name == "doctor":
            command.add_argument(
                "--exports", action="store_true", help="architecture x task x format x quantisation x runtime"
            )
        if name in ("schema", "doctor"):
            continue
        command.add_argument("spec", metavar="SPEC", help="the family's YAML file")
        if name in ("why", "show"):
            command.add_argument("step", metavar="STEP", help="a step, or a selector")
        if name == "bench":
            _bench_options(command)
        if name == "try":
            _try_options(command)
        command.add_argument(
            "--out", metavar="DIR", help="where the store and the release lie (default: generated/<family>)"
        )
        command.add_argument("--profile", metavar="NAME", help="a set of overrides that the spec names")
        command.add_argument(
            "--set", metavar="PATH=VALUE", action="append", help="override one value; may be repeated"
        )
        command.add_argument(
            "--smoke", action="store_true", help="the same graph with 2-layer models and a few steps"
        )
        if name in ("plan", "build", "status", "graph"):
            command.add_argument(
                "--select",
                metavar="SELECTOR",
                action="append",
                help="steps, e.g. +0.6b/instruct, kind:export, state:changed",
            )
        if name == "plan":
            command.add_argument("-o", "--output", metavar="FILE", help="write the JSON to a file as well")
            command.add_argument("--all", action="store_true", help="list cached steps too")
        if name == "build":
            command.add_argument(
                "--fail-fast", action="store_true", help="start nothing more once a step has failed"
            )
        if name == "graph":
            command.add_argument(
                "--format", choices=("mermaid", "dot"), default="mermaid", help="language of the picture"
            )
        if name == "verify":
            command.add_argument(
                "--repair",
                action="store_true",
                help="remove damaged artifacts, so that build makes them again",
            )
        if name == "gc":
            command.add_argument("--dry-run", action="store_true", help="tell what would be removed")
            command.add_argument(
                "--keep", metavar="SPEC", action="append", help="another spec whose artifacts are kept"
            )
    return parser


__all__ = ["FitError", "main"]

if __name__ == "__main__":
    sys.exit(main())
