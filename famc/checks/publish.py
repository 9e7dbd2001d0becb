"""What is published: variants, evaluations, exports, gates, the release."""

from __future__ import annotations

import fnmatch
import re
import string
from collections.abc import Iterator

from famc.checks.names import DATA, SIZES, model_ref, safe_shape, unknown
from famc.cost.layout import Layout
from famc.cost.memory import inference
from famc.cost.parameters import count
from famc.cost.shape import Shape
from famc.errors import did_you_mean
from famc.spec.family import Export, Gate, Target
from famc.spec.load import Spec
from famc.spec.quantity import show_bytes
from famc.spec.text import Path
from famc.spec.words import Fault
from famc.steps import exports as exporting
from famc.steps import others
from famc.steps.mixes import format_of

BUILTIN_TARGETS = ("cpu", "cuda")
CONDITIONS = ("parity", "max_drop", "require", "beats", "monotonic")
REPO_FIELDS = ("family", "org", "size", "variant", "-variant", "export", "-export")


def variants(spec: Spec) -> Iterator[Fault]:
    """The stage of each variant at each of its sizes."""
    family = spec.family
    for name, variant in family.variants.items():
        path: Path = ("variants", name)
        label = f"variants.{name}"
        yield from _size_names(spec, variant.sizes, (*path, "sizes"), f"{label}.sizes")
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


def _size_names(spec: Spec, sizes: str | tuple[str, ...], path: Path, label: str) -> Iterator[Fault]:
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
            if task.task != "lm_eval" and task.tasks:
                yield Fault(
                    (*path, "tasks"), f"evals.{suite}: 'tasks' is only for lm_eval", "remove it", key=True
                )
            if task.data is None:
                continue
            at: Path = (*path, "data")
            yield from unknown(spec, at, f"evals.{suite}: no source is called", task.data, ("data.sources",))
            source = family.data.sources.get(task.data)
            if source is None or spec.touched("data", "sources", task.data):
                continue
            wanted = others.FORMATS.get(task.task)
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


def exports(spec: Spec) -> Iterator[Fault]:
    """Variants, sizes and options of each export."""
    family = spec.family
    made: dict[tuple[str, str, str], tuple[int, Export]] = {}
    told: set[tuple[int, int]] = set()
    for index, export in enumerate(family.exports):
        path: Path = ("exports", index)
        label = f"exports.{index}"
        if not export.variants:
            yield Fault(
                (*path, "variants"), f"{label}.variants is empty", "write at least one variant", key=True
            )
        for position, variant in enumerate(export.variants):
            yield from unknown(
                spec, (*path, "variants", position), f"{label}: no variant is called", variant, ("variants",)
            )
        yield from _size_names(spec, export.sizes, (*path, "sizes"), f"{label}.sizes")
        yield from _options(path, label, export)
        yield from _calibration(spec, export, path, label)
        for target in export.target:
            yield from unknown(
                spec, (*path, "target"), f"{label}: unknown target", target, ("targets",), BUILTIN_TARGETS
            )
        pairs = [
            (s, v) for v in export.variants if v in family.variants for s in family.sizes_of(export.sizes)
        ]
        pairs = [(s, v) for s, v in pairs if family.stage_of(v, s) is not None]
        if not pairs and export.variants and _sound(spec):
            message = f"{label} makes nothing: {' and '.join(export.variants)} is not made at these sizes"
            yield Fault(path, message, "see variants.*.sizes")
        for size, variant in pairs:
            for quant in exporting.quants(export):
                other, first = made.setdefault((size, variant, f"{export.format}-{quant}"), (index, export))
                if other != index and (index, other) not in told and _way(first) != _way(export):
                    told.add((index, other))
                    what = f"{size}/{variant} as {export.format} {quant}"
                    what += f" is made by exports.{other} already, in another way"
                    yield Fault((*path, "format"), f"{label}: {what}", "leave one of them out")


def _calibration(spec: Spec, export: Export, path: Path, label: str) -> Iterator[Fault]:
    """Data that is there, and that a language model can read."""
    names = export.calibrate.data if export.calibrate is not None else ()
    at: Path = (*path, "calibrate", "data")
    if export.calibrate is not None and not names:
        yield Fault(at, f"{label}.calibrate.data is empty", "write at least one source")
    sources = spec.family.data.sources
    for name in names:
        yield from unknown(spec, at, f"{label}.calibrate: no mix or source is called", name, DATA)
        source = sources.get(name)
        if source is not None and format_of(source) not in exporting.CALIBRATION_FORMATS:
            known = ", ".join(exporting.CALIBRATION_FORMATS)
            message = f"{label}.calibrate: '{name}' is of format '{format_of(source)}'"
            yield Fault(at, message, f"calibration reads {known}")


def _way(export: Export) -> tuple[object, ...]:
    """What makes two exports of one format different."""
    return (
        export.block_size, export.algorithm, export.symmetric, export.lm_head, export.embeddings,
        export.calibrate, export.mixed,
    )  # fmt: skip


def _sound(spec: Spec) -> bool:
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


def _options(path: Path, label: str, export: Export) -> Iterator[Fault]:
    fmt, made = export.format, exporting.quants(export)
    calibrated = fmt in exporting.CALIBRATED_FORMATS
    if fmt in ("gptq", "awq", "fp8") and export.quant:
        hint = "gptq and awq take 'bits'"
        yield Fault((*path, "quant"), f"{label}: {fmt} takes no 'quant'", hint, key=True)
    elif fmt not in ("gptq", "awq", "fp8"):
        known = exporting.known_quants(fmt)
        for quant in export.quant:
            if quant not in known:
                hint = did_you_mean(quant[:64], known)
                yield Fault((*path, "quant"), f"{label}: {fmt} has no '{quant[:64]}'", hint)
    if export.bits is not None and not calibrated:
        what = f"{label}: 'bits' is for gptq and awq"
        yield Fault((*path, "bits"), what, f"{fmt} takes 'quant'", key=True)
    elif export.bits not in (None, 4, 8):
        yield Fault((*path, "bits"), f"{label}: {fmt} has no {export.bits} bits", "write 4 or 8")
    int4 = fmt == "onnx" and "int4" in made
    packed = int4 or (fmt == "onnx" and "int8" in made)
    allowed = {
        "block_size": (packed or calibrated, "onnx int4 and int8, gptq and awq"),
        "algorithm": (int4, "onnx int4"),
        "symmetric": (int4, "onnx int4"),  # transformers can't read packed zero points
        "lm_head": (packed, "onnx int4 and int8"),
        "embeddings": (packed, "onnx int4 and int8"),
        "mixed": (int4 or (calibrated and "4" in made), "onnx int4, and gptq and awq of 4 bits"),
        "calibrate": (int4 or calibrated, "onnx int4, gptq and awq"),
    }
    for field, (fits, where) in allowed.items():
        if field in export.model_fields_set and not fits:
            yield Fault((*path, field), f"{label}: '{field}' is for {where}", "remove it", key=True)
    yield from _algorithm(path, label, export, int4, calibrated)
    if export.block_size is not None and export.block_size & (export.block_size - 1):
        hint = "onnxruntime and vLLM take 16, 32, 64, 128 and 256"
        yield Fault(
            (*path, "block_size"), f"{label}: block_size {export.block_size} is no power of two", hint
        )


def _algorithm(path: Path, label: str, export: Export, int4: bool, calibrated: bool) -> Iterator[Fault]:
    """What an algorithm needs, and what it can't have."""
    looks: str | None = export.format if calibrated else "mixed" if export.mixed is not None else None
    looks = str(export.algorithm) if export.algorithm in exporting.CALIBRATED else looks
    if looks is not None and export.calibrate is None:
        hint = "for example calibrate: {data: SOURCE, n: 128}"
        yield Fault(path, f"{label}: '{looks}' needs 'calibrate'", hint)
    if export.algorithm in exporting.ASYMMETRIC and export.symmetric:
        hint = "leave symmetric out, or take rtn, gptq or awq"
        message = f"{label}: {export.algorithm} searches for zero points, so it can't be symmetric"
        yield Fault((*path, "symmetric"), message, hint)
    data_free = export.algorithm is not None and export.algorithm not in exporting.CALIBRATED
    if int4 and export.calibrate is not None and data_free and export.mixed is None:
        hint = "take gptq or awq, or set 'mixed'"
        message = f"{label}: {export.algorithm} looks at no data"
        yield Fault((*path, "calibrate"), message, hint, key=True)


def targets(spec: Spec) -> Iterator[Fault]:
    """Exports that an architecture can't have, and exports that do not fit their target."""
    family = spec.family
    told: set[object] = set()
    for index, export in enumerate(family.exports):
        if spec.touched("exports", index):
            continue
        for size in family.sizes_of(export.sizes):
            shape = safe_shape(spec, size)
            if shape is None or not any(
                v in family.variants and family.stage_of(v, size) for v in export.variants
            ):
                continue
            for quant in exporting.quants(export):
                if quant not in exporting.known_quants(export.format):
                    continue  # told above
                refused = [t for t in _tasks_of(spec, export, size)
                           if exporting.capability(shape.arch, t, export.format, quant) is None]  # fmt: skip
                for task in refused:
                    if (index, quant, shape.arch, task) not in told:
                        told.add((index, quant, shape.arch, task))
                        what = f"{export.format} {quant} does not support {task} models"
                        what += f" of architecture '{shape.arch}' (size {size})"
                        hint = exporting.nearest(shape.arch, task, export.format, quant)
                        yield Fault(("exports", index, "format"), f"exports.{index}: {what}", hint)
                if refused:
                    continue
                block, inputs = export.block_size, (shape.hidden, shape.ffn, shape.heads * shape.head_dim)
                short = [width for width in inputs if block and width % block]
                if export.format in exporting.CALIBRATED_FORMATS and short and (index, "block") not in told:
                    told.add((index, "block"))
                    message = f"exports.{index}: block_size {block} does not divide {short[0]} (size {size})"
                    yield Fault(
                        ("exports", index, "block_size"), message, "leave it out: famc finds one that does"
                    )
                for name in export.target:
                    target = family.targets.get(name)
                    if target is not None and not spec.touched("targets", name):
                        yield from _fits(spec, index, size, shape, export.format, quant, name, target)


def _tasks_of(spec: Spec, export: Export, size: str) -> list[str]:
    """What an export's variants are for at a size, as far as their stages are known."""
    family = spec.family
    stages = [family.stage_of(v, size) for v in export.variants if v in family.variants]
    kinds = [family.stages[stage].kind for stage in stages if stage in family.stages]
    return sorted({exporting.task_of(kind) for kind in kinds})


def _fits(
    spec: Spec, index: int, size: str, shape: Shape, fmt: str, quant: str, name: str, target: Target
) -> Iterator[Fault]:
    needed = _needed(shape, fmt, quant, target)
    if needed <= target.memory:
        return
    shapes = {other: safe_shape(spec, other) for other in spec.family.sizes}
    fits = {
        n: count(s).total
        for n, s in shapes.items()
        if s is not None and _needed(s, fmt, quant, target) <= target.memory
    }
    largest = max(fits, key=lambda n: fits[n]) if fits else None
    hint = f"the largest size that fits is {largest}" if largest else "no size of the family fits"
    have = f"target '{name}' has {show_bytes(target.memory)}"
    message = f"exports.{index}: {size} as {fmt} {quant} needs {show_bytes(needed)}, {have}"
    yield Fault(("exports", index, "target"), message, hint)


def _needed(shape: Shape, fmt: str, quant: str, target: Target) -> float:
    """Bytes of an export's weights, and of the KV cache that the target asks for."""
    cache = inference(shape, Layout(), min(target.context, shape.context)).kv_cache
    return exporting.export_bytes(shape, fmt, quant) + cache


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
    """A metric that nothing measures, or that the gate's suite does not. lm_eval's names are its harness's own."""
    suites = _suites(spec, gate)
    tasks = {task for suite in suites for task in _tasks(spec, suite)}
    if "lm_eval" in tasks:
        return
    known = {name for task in tasks for name in others.METRICS.get(task, ())}
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
    if not _sound(spec):
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
