"""Sizes, groups, the tokenizer and the hardware."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path as FilePath

from famc.backend import Accelerator, UnknownAccelerator, load_accelerator
from famc.checks.names import DATA, Names, safe_text, unknown
from famc.cost.money import grid
from famc.errors import did_you_mean
from famc.spec.load import Spec
from famc.spec.text import Path
from famc.spec.words import Fault
from famc.steps.mixes import format_of
from famc.steps.shapes import WrongField, shape_of

CHAT = {"sft", "dpo", "grpo"}
RESERVED = (
    "all",
    "data",
    "mix",
    "tokenizer",
)  # `all` means every size; the rest begin addresses of their own
_GENERATION = ("{% generation %}", "{%- generation %}", "{% generation -%}", "{%- generation -%}")


def sizes(spec: Spec) -> Iterator[Fault]:
    """Shapes that can't be, and groups of sizes that are not there."""
    family = spec.family
    for name in family.sizes:
        if name in RESERVED:
            yield Fault(
                ("sizes", name),
                f"sizes.{name}: a size can't be called '{name}'",
                "call it something else",
                key=True,
            )
        if spec.touched("arch") or spec.touched("sizes", name) or spec.touched("tokenizer", "vocab"):
            continue
        try:
            shape_of(family, name)
        except ValueError as error:
            text, _, hint = str(error).partition("; ")
            if isinstance(error, WrongField):
                path = ("sizes", name, error.field)
                yield Fault(path, f"sizes.{name}.{error.field}: {text}", hint)
                continue
            if text.startswith("unknown architecture"):
                yield Fault(("arch", "type"), f"arch.type: {text}", hint)
                break
            if text.startswith("head_dim") and family.arch.head_dim:
                yield Fault(("arch", "head_dim"), f"arch.{text}", hint)
                break
            yield Fault(("sizes", name), f"sizes.{name}: {text}", hint, key=True)
    for group, members in family.groups.items():
        if group in family.sizes or group == "all":
            hint = "call the group something else"
            yield Fault(("groups", group), f"groups.{group}: the name already means a size", hint, key=True)
        for index, member in enumerate(members):
            yield from unknown(
                spec, ("groups", group, index), f"groups.{group}: unknown size", member, ("sizes",)
            )


def tokenizer(spec: Spec) -> Iterator[Fault]:
    """Where the one tokenizer comes from, and whether it can mark what an assistant says."""
    family, t = spec.family, spec.family.tokenizer
    if t.adopt is None and t.train_on is None:
        message = "tokenizer needs 'train_on' (a mix to learn from) or 'adopt' (a folder)"
        yield Fault(("tokenizer",), message, "for example train_on: {mix: NAME}", key=True)
    if t.adopt is not None and t.train_on is not None:
        yield Fault(
            ("tokenizer", "adopt"),
            "tokenizer: 'adopt' and 'train_on' exclude each other",
            "keep one",
            key=True,
        )
    if t.train_on is not None:
        yield from _learns_from(spec, t.train_on.mix)
    if t.vocab and family.arch.vocab_pad and t.vocab > family.arch.vocab_pad:
        rows = f"the {family.arch.vocab_pad} rows of arch.vocab_pad"
        message = f"tokenizer.vocab: {t.vocab} entries do not fit {rows}"
        yield Fault(("tokenizer", "vocab"), message, "raise vocab_pad")
    chat = [name for name, stage in family.stages.items() if stage.kind in CHAT]
    if chat and t.adopt and not t.chat_template and path_fault(spec, t.adopt) is None:
        folder = spec.folder / t.adopt
        config = safe_text(folder / "tokenizer_config.json")
        if (
            config is not None
            and "chat_template" not in config
            and not (folder / "chat_template.jinja").is_file()
        ):
            message = (
                f"stages.{chat[0]} trains on conversations, but the adopted tokenizer has no chat template"
            )
            yield Fault(("stages", chat[0], "kind"), message, "set tokenizer.chat_template")
    for key, written in (("adopt", t.adopt), ("chat_template", t.chat_template)):
        wrong = path_fault(spec, written) if written is not None else None
        if wrong:
            yield Fault(("tokenizer", key), f"tokenizer.{key}: {wrong}")
        elif key == "chat_template" and written is not None:
            text = safe_text(spec.folder / written)
            if text is None and (spec.folder / written).exists():
                yield Fault(("tokenizer", key), f"tokenizer.chat_template: {written} is no text file")
            elif text is not None and not any(mark in text for mark in _GENERATION):
                what = "which tokens are the assistant's can't be told"
                message = f"tokenizer.chat_template: {written} has no {{% generation %}} marks: {what}"
                hint = "wrap the assistant's words in {% generation %} … {% endgeneration %}"
                yield Fault(("tokenizer", "chat_template"), message, hint)


def _learns_from(spec: Spec, mix: str) -> Iterator[Fault]:
    family, path = spec.family, ("tokenizer", "train_on", "mix")
    yield from unknown(spec, path, "tokenizer.train_on.mix: no mix or source is called", mix, DATA)
    for name in Names(spec).sources_of(mix):
        source = family.data.sources[name]
        if format_of(source) in ("image_text", "audio_text") and not spec.touched("data", "sources", name):
            yield Fault(path, f"tokenizer.train_on.mix: '{name}' holds no text")
        if source.by is not None:
            why = "is made by a model, and every model needs the tokenizer first"
            yield Fault(
                path, f"tokenizer.train_on.mix: '{name}' {why}", "learn from sources that no model makes"
            )


def path_fault(spec: Spec, written: str) -> str | None:
    """Why a local path can't be one."""
    if not written.strip():
        return "the path is empty"
    if written.startswith("~"):
        return f"'{written}' is taken as it is, relative to the spec: write the folder out"
    try:
        FilePath(spec.folder / written).exists()
    except (OSError, ValueError):
        return "no path can be so long, or hold such characters"
    return None


def backends(spec: Spec) -> Iterator[Fault]:
    """Hardware that famc does not know, and places that are not there."""
    family = spec.family
    for name, use in family.backends.items():
        path = ("backends", name)
        if use.gpu is not None and use.cpu is not None:
            yield Fault(
                (*path, "cpu"), f"backends.{name}: 'gpu' and 'cpu' exclude each other", "keep one", key=True
            )
        if use.gpu is not None and use.use is not None:
            yield Fault(
                (*path, "use"), f"backends.{name}: 'gpu' and 'use' exclude each other", "keep one", key=True
            )
        try:
            grid(use.grid)
        except ValueError as error:
            yield Fault((*path, "grid"), f"backends.{name}.grid: {error}")
        for key, chip in (("gpu", use.gpu), ("use", use.use)):
            if chip is None:
                continue
            accelerator, faults = found_chip(spec, (*path, key), f"backends.{name}.{key}", chip)
            yield from faults
            if key == "gpu" and accelerator is not None and accelerator.kind != "gpu":
                yield Fault((*path, key), f"backends.{name}.gpu: '{chip}' is no GPU", "write it under 'use'")
    for pattern, backend in family.place.items():
        yield from unknown(spec, ("place", pattern), "place: no backend is called", backend, ("backends",))


def found_chip(spec: Spec, path: Path, label: str, chip: str) -> tuple[Accelerator | None, tuple[Fault, ...]]:
    """The accelerator that a value of the spec names; or why there is none."""
    try:
        return load_accelerator(chip, spec.folder), ()
    except UnknownAccelerator as error:
        hint = did_you_mean(chip[:200], error.candidates)
        return None, (Fault(path, f"{label}: no accelerator is called '{chip[:64]}'", hint),)
    except (ValueError, OSError) as error:
        first = (str(error).splitlines() or ["?"])[0]
        return None, (Fault(path, f"{label}: '{chip[:64]}' can't be read: {first[:200]}"),)
