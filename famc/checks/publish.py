"""What is published: variants, evaluations, gates, the release."""

from __future__ import annotations

import fnmatch
import re
import string
from collections.abc import Iterator

from famc.checks.names import SIZES, model_ref, unknown
from famc.errors import did_you_mean
from famc.spec.family import Gate
from famc.spec.load import Spec
from famc.spec.text import Path
from famc.spec.words import Fault
from famc.steps import exports as exporting
from famc.steps import others
from famc.steps.mixes import format_of

CONDITIONS = ("parity", "max_drop", "require", "beats", "monotonic")
REPO_FIELDS = ("family", "org", "size", "variant", "-variant", "export", "-export")


def variants(spec: Spec) -> Iterator[Fault]:
    """The stage of each variant at each of its sizes."""
    family = spec.family
    for name, variant in family.variants.items():
        path: Path = ("variants", name)
        label = f"variants.{name}"
        yield from size_names(spec, variant.sizes, (*path, "sizes"), f"{label}.sizes")
        stages = {"": variant.stage} if isinstance(variant.stage, str) else variant.stage
        for where, stage in stages.items():
            spot: Path = (*path, "stage", where) if where else (*path, "stage")
            yield from unknown(spec, spot, f"{label}: no stage is called", stage, ("stages",))
            if where:
                yield from unknown(
                    spec, spot, f"{label}.stage: no size or group is called", where, SIZES, key=True
                )
        whole = not (spec.touched(*path) or spec.touched("groups") or spec.touched("sizes"))
        for size in family.sizes_of(variant.sizes) if whole else ():
            if family.stage_of(name, size) is None:
                message = f"{label}: size '{size}' has no stage"
                yield Fault((*path, "stage"), message, f"add '{size}' to {label}.stage", key=True)
        if variant.eval is not None:
            yield from unknown(
                spec, (*path, "eval"), f"{label}.eval: unknown suite", variant.eval, ("evals",), others.SUITES
            )


def size_names(spec: Spec, sizes: str | tuple[str, ...], path: Path, label: str) -> Iterator[Fault]:
    if not sizes:
        yield Fault(path, f"{label} is empty", "write all, a group, or a list of sizes")
    listed = isinstance(sizes, tuple)
    for index, name in enumerate((sizes,) if isinstance(sizes, str) else sizes):
        where = (*path, index) if listed else path
        yield from unknown(spec, where, f"{label}: no size or group is called", name, SIZES, ("all",))


def evals(spec: Spec) -> Iterator[Fault]:
    """What suites measure, and on which data."""
    family = spec.family
    for suite, tasks in family.evals.items():
        if not tasks:
            yield Fault(("evals", suite), f"evals.{suite} is empty", "write at least one task", key=True)
        for index, task in enumerate(tasks):
            path: Path = ("evals", suite, index)
            if task.task == "lm_eval" and not task.tasks:
                yield Fault(path, f"evals.{suite}: task 'lm_eval' needs 'tasks'", "for example [arc_easy]")
            if task.task == "mteb" and bool(task.tasks) == bool(task.data):
                message = f"evals.{suite}: task 'mteb' reads 'tasks' by name, or the pairs of 'data'"
                yield Fault(path, message, "give one of them")
            if task.task not in ("lm_eval", "mteb") and task.tasks:
                message = f"evals.{suite}: 'tasks' is only for lm_eval and mteb"
                yield Fault((*path, "tasks"), message, "remove it", key=True)
            if task.data is None:
                continue
            at: Path = (*path, "data")
            yield from unknown(spec, at, f"evals.{suite}: no source is called", task.data, ("data.sources",))
            source = family.data.sources.get(task.data)
            if source is None or spec.touched("data", "sources", task.data):
                continue
            wanted = "pairs" if task.task == "mteb" else others.FORMATS.get(task.task)
            if wanted is None:
                yield Fault(
                    at, f"evals.{suite}: '{task.task}' brings its own data", "remove 'data'", key=True
                )
            elif format_of(source) != wanted:
                given = f"'{task.data}' is of format '{format_of(source)}'"
                yield Fault(at, f"evals.{suite}: '{task.task}' reads {wanted}, {given}")
            elif source.heldout.fraction == 0:
                message = f"evals.{suite}: '{task.data}' keeps nothing back (heldout.fraction is 0)"
                yield Fault(at, message, "evaluations read the held-out part")


def sound(spec: Spec) -> bool:
    """Whether it is known what is published and exported: all names there mean something, and nothing was
    left out.
    """
    family = spec.family
    if any(spec.touched(section) for section in ("sizes", "groups", "variants", "exports")):
        return False
    places = {"all", *family.sizes, *family.groups}
    wanted = [v.sizes for v in family.variants.values()] + [e.sizes for e in family.exports]
    listed = {name for sizes in wanted for name in ((sizes,) if isinstance(sizes, str) else sizes)}
    return listed <= places and all(
        v in family.variants for export in family.exports for v in export.variants
    )


def gates(spec: Spec) -> Iterator[Fault]:
    """Conditions that say something, about metrics and models that are there."""
    for index, gate in enumerate(spec.family.gates):
        path: Path = ("gates", index)
        label = f"gates.{index}"
        if not conditions(gate):
            yield Fault(path, f"{label} states no condition", f"write one of {', '.join(CONDITIONS)}")
        wanted = conditions(gate)
        mixed = [c for c in wanted if c in CONDITIONS[:2]], [c for c in wanted if c in CONDITIONS[2:]]
        if all(mixed):
            what = f"'{mixed[0][0]}' is about exports, '{mixed[1][0]}' about variants"
            yield Fault((*path, mixed[1][0]), f"{label}: {what}", "write two gates", key=True)
        if gate.parity is not None and not gate.parity.model_dump(exclude_none=True):
            yield Fault(
                (*path, "parity"), f"{label}: 'parity' states no limit", "for example {kl: 0.05}", key=True
            )
        for key, suite in (("suite", gate.suite), ("monotonic", gate.monotonic)):
            if suite is not None:
                yield from unknown(
                    spec, (*path, key), f"{label}: unknown suite", suite, ("evals",), others.SUITES
                )
        if gate.monotonic and gate.across is None:
            yield Fault((*path, "monotonic"), f"{label}: 'monotonic' needs 'across: sizes'", key=True)
        if gate.across and not gate.monotonic:
            yield Fault((*path, "across"), f"{label}: 'across' needs 'monotonic: SUITE'", key=True)
        if gate.within is not None and not gate.beats:
            yield Fault((*path, "within"), f"{label}: 'within' needs 'beats'", key=True)
        if gate.metrics and not (gate.beats or gate.monotonic):
            yield Fault((*path, "metrics"), f"{label}: 'metrics' needs 'beats' or 'monotonic'", key=True)
        if gate.beats is not None:
            yield from model_ref(spec, gate.beats, (*path, "beats"), f"{label}.beats")
        for position, metric in enumerate(gate.metrics):
            yield from _metric(spec, gate, (*path, "metrics", position), label, metric, key=False)
        for metric, bound in (gate.require or {}).items():
            at: Path = (*path, "require", metric)
            yield from _metric(spec, gate, at, label, metric, key=True)
            if bound.min is None and bound.max is None:
                yield Fault(at, f"{label}: '{metric[:64]}' needs min or max", key=True)
            if bound.min is not None and bound.max is not None and bound.min > bound.max:
                message = (
                    f"{label}: '{metric[:64]}' can't be at least {bound.min:g} and at most {bound.max:g}"
                )
                yield Fault(at, message, key=True)


def conditions(gate: Gate) -> list[str]:
    """What a gate demands."""
    return [c for c in CONDITIONS if getattr(gate, c)]


def _metric(spec: Spec, gate: Gate, path: Path, label: str, metric: str, *, key: bool) -> Iterator[Fault]:
    """A metric that nothing measures, or that the gate's suite does not. Harnesses bring names of their own."""
    suites = _suites(spec, gate)
    tasks = {task for suite in suites for task in _tasks(spec, suite)}
    if {"lm_eval", "mteb"} & tasks:
        return
    known = {name for task in tasks for name in others.METRICS.get(task, ())}
    metric, _, source = metric.partition(
        "."
    )  # a suite's second task of a kind is called by its source as well
    if source:
        yield from unknown(spec, path, f"{label}: no source is called", source, ("data.sources",), key=key)
    if metric not in others.HIGHER_IS_BETTER:
        hint = did_you_mean(metric[:200], others.HIGHER_IS_BETTER)
        yield Fault(path, f"{label}: unknown metric '{metric[:64]}'", hint, key=key)
    elif known and metric not in known:
        what = f"{label}: '{metric}' is not measured by suite {' or '.join(repr(s) for s in sorted(suites))}"
        yield Fault(path, what, f"it measures {', '.join(sorted(known))}", key=key)


def _suites(spec: Spec, gate: Gate) -> set[str]:
    """Suites whose results a gate reads."""
    named = gate.suite or gate.monotonic
    if named is not None:
        return {named}
    family = spec.family
    return {
        variant.eval
        for name, variant in family.variants.items()
        if variant.eval and any(gate_means(gate, size, name) for size in family.sizes_of(variant.sizes))
    }


def gate_means(gate: Gate, size: str, variant: str) -> bool:
    """Whether a gate is about a variant at a size: `*/instruct`, or just `instruct`."""
    return fnmatch.fnmatchcase(f"{size}/{variant}", gate.match) or gate.match == variant


def _tasks(spec: Spec, suite: str) -> tuple[str, ...]:
    declared = spec.family.evals.get(suite)
    return tuple(t.task for t in declared) if declared is not None else others.SUITES.get(suite, ())


def matches(spec: Spec) -> Iterator[Fault]:
    """Gates whose glob matches nothing: a misspelt gate must not pass for a gate that holds."""
    family = spec.family
    if not sound(spec):
        return
    published = [(s, v) for v, one in family.variants.items() for s in family.sizes_of(one.sizes)]
    exported = [
        f"{size}/{variant}/export.{export.format}-{quant}"
        for export in family.exports
        for variant in export.variants
        for size in family.sizes_of(export.sizes)
        if (size, variant) in published
        for quant in exporting.quants(export)
    ]
    for index, gate in enumerate(family.gates):
        path: Path = ("gates", index, "match")
        if gate.parity or gate.max_drop:
            if not any(fnmatch.fnmatchcase(name, gate.match) for name in exported):
                hint = f"exports are called {exported[0]}" if exported else "the spec has no exports"
                yield Fault(path, f"gates.{index}: '{gate.match[:64]}' matches no export", hint)
            continue
        hit = [v for s, v in published if fnmatch.fnmatchcase(f"{s}/{v}", gate.match) or gate.match == v]
        if not hit and conditions(gate):
            hint = f"variants are called {'/'.join(published[0])}" if published else ""
            yield Fault(path, f"gates.{index}: '{gate.match[:64]}' matches no variant", hint)
        for variant in dict.fromkeys(hit):
            if not (gate.suite or gate.monotonic or family.variants[variant].eval) and conditions(gate):
                message = f"gates.{index}: '{variant}' is scored on nothing that could be compared"
                yield Fault(path, message, f"set 'suite' here, or variants.{variant}.eval")


def release(spec: Spec) -> Iterator[Fault]:
    """Names and folders of what is released."""
    family = spec.family
    path: Path = ("release", "repo")
    try:
        parts = list(string.Formatter().parse(family.release.repo))
    except ValueError:
        yield Fault(
            path, "release.repo: a '{' or '}' has no partner", "for example {family}-{size}{-variant}"
        )
        return
    fields = [field for _, field, _, _ in parts if field is not None]
    for field in fields:
        if field not in REPO_FIELDS:
            yield Fault(
                path, f"release.repo: unknown field '{{{field[:64]}}}'", did_you_mean(field[:64], REPO_FIELDS)
            )
    literal = "".join(text for text, _, _, _ in parts)
    decorated = any(extra or conversion for _, field, extra, conversion in parts if field is not None)
    if (
        decorated
        or not re.fullmatch(r"[A-Za-z0-9._/-]*", literal)
        or literal.count("/") > 1
        or ".." in literal
    ):
        hint = "letters, digits, and . _ - between fields such as {size}; one / after {org}"
        yield Fault(path, "release.repo: this can't name a repository", hint)
    elif family.release.repo.startswith(("/", ".")) or family.release.repo.endswith("/"):
        yield Fault(
            path,
            "release.repo: a repository's name starts and ends with a word",
            "for example {family}-{size}{-variant}",
        )
    example = "write {family}-{size}{-variant}"
    if not {"variant", "-variant"} & set(fields) and len(family.variants) > 1:
        yield Fault(
            path, "release.repo: without {variant} all variants of a size would have one name", example
        )
    if "size" not in fields and len(family.sizes) > 1:
        yield Fault(path, "release.repo: without {size} all sizes would have one name", example)
    folders = family.release.path.replace("\\", "/").split("/")
    if (
        family.release.path.startswith(("/", "~", "\\"))
        or ".." in folders
        or not family.release.path.strip()
        or ":" in folders[0]
    ):
        shown = family.release.path[:64]
        yield Fault(
            ("release", "path"), f"release.path: '{shown}' leaves the output folder", "use a folder name"
        )
