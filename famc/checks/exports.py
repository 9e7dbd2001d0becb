"""Exports: what the capability table has, options that a format knows, data that calibration can read, devices that
exports fit on."""

from __future__ import annotations

from collections.abc import Iterator

from famc.checks.names import DATA, Names, safe_shape, unknown
from famc.checks.publish import size_names, sound
from famc.checks.shapes import found_chip
from famc.cost.deploy import Fit, Target
from famc.cost.parameters import count
from famc.cost.shape import Shape
from famc.errors import did_you_mean
from famc.spec.family import Export
from famc.spec.load import Spec
from famc.spec.quantity import show_bytes
from famc.spec.text import Path
from famc.spec.words import Fault
from famc.steps import deployed
from famc.steps import exports as exporting
from famc.steps.mixes import format_of

BUILTIN_TARGETS = ("cpu", "cuda")
# what only a language model's export obeys; of block_size and algorithm, see _unobeyed
TEXT_ONLY = ("lm_head", "embeddings", "calibrate", "mixed")


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
        yield from size_names(spec, export.sizes, (*path, "sizes"), f"{label}.sizes")
        uses = {task for size in family.sizes_of(export.sizes) for task in _uses(spec, export, size).values()}
        yield from _options(path, label, export, text=not uses or exporting.TEXT in uses)
        yield from _calibration(spec, export, path, label)
        for target in export.target:
            yield from unknown(
                spec, (*path, "target"), f"{label}: unknown target", target, ("targets",), BUILTIN_TARGETS
            )
        pairs = [
            (s, v) for v in export.variants if v in family.variants for s in family.sizes_of(export.sizes)
        ]
        pairs = [(s, v) for s, v in pairs if family.stage_of(v, s) is not None]
        if not pairs and export.variants and sound(spec):
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


def _options(path: Path, label: str, export: Export, *, text: bool) -> Iterator[Fault]:
    """Words that the format has. `text`: whether some variant is a language model; see _unobeyed for the others."""
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
    yield from _algorithm(path, label, export, int4, calibrated, text)
    if export.block_size is not None and export.block_size & (export.block_size - 1):
        hint = "onnxruntime and vLLM take 16, 32, 64, 128 and 256"
        yield Fault(
            (*path, "block_size"), f"{label}: block_size {export.block_size} is no power of two", hint
        )


def _algorithm(
    path: Path, label: str, export: Export, int4: bool, calibrated: bool, text: bool
) -> Iterator[Fault]:
    """What an algorithm needs, and what it can't have."""
    looks: str | None = export.format if calibrated else "mixed" if export.mixed is not None else None
    looks = str(export.algorithm) if export.algorithm in exporting.CALIBRATED else looks
    if looks is not None and export.calibrate is None and text:
        hint = "for example calibrate: {data: SOURCE, n: 128}"
        yield Fault(path, f"{label}: '{looks}' needs 'calibrate'", hint)
    if export.algorithm in exporting.ASYMMETRIC and export.symmetric:
        hint = f"leave symmetric out, or take rtn{', gptq or awq' if text else ''}"
        message = f"{label}: {export.algorithm} searches for zero points, so it can't be symmetric"
        yield Fault((*path, "symmetric"), message, hint)
    data_free = export.algorithm is not None and export.algorithm not in exporting.CALIBRATED
    if int4 and export.calibrate is not None and data_free and text and export.mixed is None:
        hint = "take gptq or awq, or set 'mixed'"
        message = f"{label}: {export.algorithm} looks at no data"
        yield Fault((*path, "calibrate"), message, hint, key=True)


def targets(spec: Spec) -> Iterator[Fault]:
    """Exports that an architecture can't have, and exports that do not fit their target."""
    family = spec.family
    told: set[object] = set()
    known: dict[str, Target] = {}
    for name, target in family.targets.items():
        if not spec.touched("targets", name):
            faults = list(_device(spec, name))
            yield from faults
            if not faults:
                known[name] = deployed.target(name, target, spec.folder)
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
                refused = [t for t in sorted(set(_uses(spec, export, size).values()))
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
                yield from _unobeyed(spec, index, export, size, told)
                if export.format == "gguf":
                    yield from _unread(spec, index, export, size, told)
                block, inputs = export.block_size, (shape.hidden, shape.ffn, shape.heads * shape.head_dim)
                short = [width for width in inputs if block and width % block]
                if export.format in exporting.CALIBRATED_FORMATS and short and (index, "block") not in told:
                    told.add((index, "block"))
                    message = f"exports.{index}: block_size {block} does not divide {short[0]} (size {size})"
                    yield Fault(
                        ("exports", index, "block_size"), message, "leave it out: famc finds one that does"
                    )
                tasks = list(_uses(spec, export, size).values())
                for name in export.target:
                    where = known.get(name)
                    if where is not None and tasks:
                        yield from _fits(spec, index, size, quant, tasks[0], where)


def _unobeyed(spec: Spec, index: int, export: Export, size: str, told: set[object]) -> Iterator[Fault]:
    """Options that the export of a variant which is no language model would not obey."""
    for variant, task in _uses(spec, export, size).items():
        if task == exporting.TEXT:
            continue
        whose = f"{size}/{variant} is for {task}"
        alone = "remove it" if len(export.variants) == 1 else f"remove it, or export {variant} on its own"
        int4 = export.format == "onnx" and "int4" in exporting.quants(export)
        for field in (*TEXT_ONLY, *(() if int4 else ("block_size",))):
            if field in export.model_fields_set and (index, field) not in told:
                told.add((index, field))
                what = "onnx int4, and language models" if field == "block_size" else "language models"
                message = f"exports.{index}: '{field}' is for {what}; {whose}"
                yield Fault(("exports", index, field), message, alone, key=True)
        if export.algorithm in exporting.CALIBRATED and (index, "algorithm") not in told:
            told.add((index, "algorithm"))
            message = f"exports.{index}: {export.algorithm} looks at data, as only language models' exports do; {whose}"
            yield Fault(("exports", index, "algorithm"), message, "take k_quant, rtn or hqq")


def _unread(spec: Spec, index: int, export: Export, size: str, told: set[object]) -> Iterator[Fault]:
    """Embedders and rerankers that read texts as llama.cpp can't."""
    names = Names(spec)
    for variant, task in _uses(spec, export, size).items():
        stage = spec.family.stage_of(variant, size)
        if stage is None or spec.touched("stages", stage) or (index, variant, "text") in told:
            continue
        what, hint = "", "onnx can do it"
        if getattr(names.stage_at(stage, size), "text", "") == "words":
            what = "its tokenizer lower-cases and splits (text: words), and llama.cpp can't normalise text"
            hint += ": its tokenizer does; or train it with text: as_is"
        elif task == exporting.RANKING and _both_ways(names, stage, size):
            what = "its tokens see what follows, and llama.cpp then reads the score off the first one"
        if what:
            told.add((index, variant, "text"))
            yield Fault(
                ("exports", index, "format"), f"exports.{index}: no GGUF of {size}/{variant}: {what}", hint
            )


def _both_ways(names: Names, stage: str, size: str) -> bool:
    """Whether a stage, or what it continues, made a decoder see what follows."""
    at, seen = (size, stage), set[tuple[str, str]]()
    while at not in seen:
        seen.add(at)
        one = names.stage_at(at[1], at[0])
        if getattr(one, "bidirectional", False):
            return True
        parent = names.target(one.from_, at[0]) if one.from_ else None
        at = parent or at
    return False


def _uses(spec: Spec, export: Export, size: str) -> dict[str, str]:
    """What each of an export's variants is for at a size, as far as their stages are known."""
    family, shape = spec.family, safe_shape(spec, size)
    arch = shape.arch if shape else ""
    stages = {v: family.stage_of(v, size) for v in export.variants if v in family.variants}
    kinds = {v: family.stages[stage].kind for v, stage in stages.items() if stage in family.stages and stage}
    return {variant: exporting.task_of(kind, arch) for variant, kind in kinds.items()}


def _device(spec: Spec, name: str) -> Iterator[Fault]:
    """A target that says neither what it is nor what it has, or is a device that famc doesn't know."""
    target = spec.family.targets[name]
    path: Path = ("targets", name)
    if target.device is not None:
        yield from found_chip(spec, (*path, "device"), f"targets.{name}.device", target.device)[1]
    elif target.memory is None:
        yield Fault(
            path, f"targets.{name} says neither 'device' nor 'memory'", "for example {device: oneplus-12}"
        )


def _fits(spec: Spec, index: int, size: str, quant: str, task: str, where: Target) -> Iterator[Fault]:
    """An export that is too large for where it must run, with the largest size that is not."""
    export = spec.family.exports[index]

    def fit(shape: Shape) -> Fit:
        return deployed.fit(shape, exporting.export_params(export, quant, shape, task), where)

    shapes = {other: safe_shape(spec, other) for other in spec.family.sizes}
    own = shapes[size]
    assert own is not None  # the caller has looked
    found = fit(own)
    if found.fits:
        return
    fits = {name: count(s).total for name, s in shapes.items() if s is not None and fit(s).fits}
    largest = max(fits, key=lambda name: fits[name]) if fits else None
    hint = f"the largest size that fits is {largest}" if largest else "no size of the family fits"
    have = f"target '{where.name}' has {show_bytes(where.limit)}"
    tokens = f"with {found.context} tokens of context"
    message = (
        f"exports.{index}: {size} as {export.format} {quant} needs {show_bytes(found.total)} {tokens}, {have}"
    )
    yield Fault(("exports", index, "target"), message, hint)
