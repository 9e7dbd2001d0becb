"""Sources, cleaning recipes and mixes."""

from __future__ import annotations

from collections.abc import Iterator

from famc.checks.names import MODELS, known, model_ref, spec_files, unknown
from famc.checks.shapes import path_fault
from famc.errors import did_you_mean
from famc.spec.family import Family, Mix, Source
from famc.spec.load import Spec
from famc.spec.text import Path
from famc.spec.words import Fault, label, word
from famc.steps.corpus import FILTERS, RECIPES, recipe
from famc.steps.installed_id import canonical
from famc.steps.mixes import PYSTDLIB_FORMATS, SYNTH, format_of

ORIGINS = ("path", "hf", "pystdlib", "installed", "synth")


def sources(spec: Spec) -> Iterator[Fault]:
    """Where each source comes from."""
    family = spec.family
    for name, source in family.data.sources.items():
        path: Path = ("data", "sources", name)
        label = f"data.sources.{name}"
        origins = [o for o in ORIGINS if getattr(source, o) is not None]
        if len(origins) != 1:
            what = f"comes from {' and '.join(origins)}" if origins else "does not say where it comes from"
            yield Fault(path, f"{label} {what}", f"give one of {', '.join(ORIGINS)}", key=True)
        if source.hf is not None and source.revision is None:
            yield Fault(
                path,
                f"{label}: a hub dataset needs 'revision'",
                "pin the commit, so that the data can't move",
                key=True,
            )
        if source.path is not None and (wrong := path_fault(spec, source.path)):
            yield Fault((*path, "path"), f"{label}.path: {wrong}")
        if source.clean not in RECIPES:
            recipe_path = (*path, "clean")
            yield from unknown(
                spec, recipe_path, f"{label}: unknown cleaning recipe", source.clean, ("data.clean",), RECIPES
            )
        yield from _only(path, label, source)
        yield from _packages(path, label, source)
        yield from _generator(spec, path, label, source)
    yield from _circles(family)


def _only(path: Path, label: str, source: Source) -> Iterator[Fault]:
    """Keys that mean something for one origin or format only."""
    written = source.model_fields_set
    if source.revision is not None and source.hf is None:
        yield Fault(
            (*path, "revision"), f"{label}: 'revision' is only for hub datasets (hf)", "remove it", key=True
        )
    if "split" in written and source.hf is None:
        yield Fault(
            (*path, "split"), f"{label}: 'split' is only for hub datasets (hf)", "remove it", key=True
        )
    for key, value in (("from", source.from_), ("by", source.by), ("keep", source.keep)):
        if value is not None and source.synth is None:
            yield Fault(
                (*path, key), f"{label}: '{key}' is only for generators (synth)", "remove it", key=True
            )
    if source.rate is not None and format_of(source) != "audio_text":
        yield Fault((*path, "rate"), f"{label}: 'rate' is only for audio", "remove it", key=True)
    made = PYSTDLIB_FORMATS.get(source.pystdlib or "") or SYNTH.get(source.synth or "")
    made = made or ("pairs" if source.installed else None)
    if made and "format" in written and source.format != made:
        what = f"pystdlib {source.pystdlib}" if source.pystdlib else f"synth {source.synth}"
        what = "installed" if source.installed else what
        yield Fault(
            (*path, "format"),
            f"{label}: {what} is of format '{made}', not '{source.format}'",
            "remove 'format'",
        )


def _packages(path: Path, label: str, source: Source) -> Iterator[Fault]:
    """A package that is named twice. One that is not installed is no fault: the spec may be for another machine."""
    first: dict[str, int] = {}
    written = source.installed or ()
    for index, name in enumerate(written):
        other = first.setdefault(canonical(name), index)
        if other != index:
            what = "is there twice" if written[other] == name else f"is package '{written[other]}' again"
            yield Fault((*path, "installed", index), f"{label}.installed: '{name}' {what}", "remove it")


def _generator(spec: Spec, path: Path, label: str, source: Source) -> Iterator[Fault]:
    if source.synth is not None and source.synth not in SYNTH:
        hint = did_you_mean(source.synth[:200], SYNTH)
        yield Fault((*path, "synth"), f"{label}: unknown generator '{source.synth[:64]}'", hint)
    if source.from_ is not None:
        yield from unknown(
            spec, (*path, "from"), f"{label}.from: no source is called", source.from_, ("data.sources",)
        )
    if source.by is not None:
        yield from model_ref(spec, source.by, (*path, "by"), f"{label}.by")
        name, at, _ = source.by.partition("@")
        if not at and known(spec, name, *MODELS):
            hint = f"write {name}@SIZE: sizes are {', '.join(spec.family.sizes)}"
            yield Fault((*path, "by"), f"{label}.by: which size of '{name}' generates is not said", hint)


def _circles(family: Family) -> Iterator[Fault]:
    for name, source in family.data.sources.items():
        chain, current = [name], source.from_
        while current and current in family.data.sources and current not in chain:
            chain.append(current)
            current = family.data.sources[current].from_
        if current == name and name == min(chain, key=list(family.data.sources).index):
            loop = " <- ".join([*chain, name])
            yield Fault(
                ("data", "sources", name, "from"),
                f"data.sources: {loop} goes in a circle",
                "cut it at one 'from'",
            )


def files(spec: Spec) -> Iterator[Fault]:
    """Local files that can't be read."""
    found: list[tuple[Path, str | None]] = [
        (("data", "sources", name, "path"), source.path) for name, source in spec.family.data.sources.items()
    ]
    found.append((("tokenizer", "adopt"), spec.family.tokenizer.adopt))
    found += [
        (("stages", name, "path"), getattr(stage, "path", None)) for name, stage in spec.family.stages.items()
    ]
    for path, written in found:
        if written is None or path_fault(spec, written):
            continue
        try:
            spec_files(spec).listing(spec.folder / written)
        except OSError as error:
            yield Fault(path, f"{label(path)}: {word(error.filename)} can't be read: {error.strerror}")
        except ValueError as error:
            yield Fault(path, f"{label(path)}: {error}")


def recipes(spec: Spec) -> Iterator[Fault]:
    """Filters and their parameters."""
    for name, steps in spec.family.data.clean.items():
        for index, message, wrong in recipe(steps)[1]:
            known_words = FILTERS if message.startswith("unknown filter") else ()
            if message.startswith("unknown key"):
                known_words = FILTERS[message.split("'")[-2]].defaults  # type: ignore[assignment]  # a mapping by name too
            shown = "for example length: {min: 20}" if message.startswith("a filter is") else ""
            hint = did_you_mean(wrong[:200], known_words) if wrong else shown
            yield Fault(("data", "clean", name, index), f"data.clean.{name}: {message}", hint)


def mixes(spec: Spec) -> Iterator[Fault]:
    """Weights, formats and tiers of every mix, those that stand in a stage included."""
    family = spec.family
    for name, mix in family.data.mixes.items():
        if name in family.data.sources:
            hint = "call one of them something else"
            yield Fault(
                ("data", "mixes", name), f"data.mixes.{name}: a source has the same name", hint, key=True
            )
        yield from one_mix(spec, ("data", "mixes", name), f"data.mixes.{name}", mix)
    for name, stage in family.stages.items():
        data = getattr(stage, "data", None)
        if isinstance(data, Mix):
            yield from one_mix(spec, ("stages", name, "data"), f"stages.{name}.data", data)
            if f"{name}.data" in family.data.mixes:
                message = f"data.mixes.{name}.data: the mix in stages.{name} has this name"
                yield Fault(("data", "mixes", f"{name}.data"), message, "call it something else", key=True)


def one_mix(spec: Spec, path: Path, label: str, mix: Mix) -> Iterator[Fault]:
    family = spec.family
    formats: dict[str, str] = {}
    for key, weight in mix.weights.items():
        name, dot, tier = key.partition(".")
        at: Path = (*path, "weights", key)
        yield from unknown(spec, at, f"{label}: no source is called", name, ("data.sources",), key=True)
        if weight < 0:
            yield Fault(at, f"{label}: the weight of '{key}' is negative", "leave the source out, or write 0")
        source = family.data.sources.get(name)
        if (
            source is None
            or spec.touched("data", "sources", name)
            or spec.touched("data", "clean", source.clean)
        ):
            continue
        formats[key] = format_of(source)
        if dot and source.clean in {**family.data.clean, **RECIPES}:
            if not any(
                f[0] == "tier"
                for f in recipe(family.data.clean.get(source.clean, RECIPES.get(source.clean, ())))[0]
            ):
                message = (
                    f"{label}: '{key}' names a tier, but the recipe '{source.clean}' of '{name}' makes none"
                )
                yield Fault(at, message, "add tier to the recipe", key=True)
            elif tier not in ("high", "mid", "low"):
                yield Fault(
                    at,
                    f"{label}: unknown tier '{tier[:64]}'",
                    did_you_mean(tier[:64], ("high", "mid", "low")),
                    key=True,
                )
    if not any(weight > 0 for weight in mix.weights.values()):
        hint = "give at least one source a weight above 0"
        yield Fault((*path, "weights"), f"{label}: the weights sum to nothing", hint, key=True)
    if len(set(formats.values())) > 1:
        each = ", ".join(f"{k} is {v}" for k, v in list(formats.items())[:8])
        yield Fault(
            (*path, "weights"), f"{label}: sources of different formats can't be mixed: {each}", key=True
        )
