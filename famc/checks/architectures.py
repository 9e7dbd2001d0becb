"""Stages at sizes whose architecture can't be trained so, and models of one architecture that another would start from."""

from __future__ import annotations

from collections.abc import Iterator

from famc.checks.names import Names, safe_shape
from famc.checks.stages import Search, Step
from famc.cost.shape import DECODERS, ROTARY
from famc.errors import did_you_mean
from famc.spec.load import Spec
from famc.spec.text import Path
from famc.spec.words import Fault
from famc.steps.base import Training

# what an architecture can be trained for, where it is no decoder
KINDS_OF = {
    "bert": ("pretrain", "embed", "rerank", "adopt"),
    "modernbert": ("pretrain", "embed", "rerank", "adopt"),
    "t5": ("pretrain", "sft", "adopt"),
}
# what only a decoder's stage may say: field -> values that say nothing
DECODERS_ONLY: dict[str, tuple[object, ...]] = {
    "fim": (None, 0.0),
    "loss_on": (None, "assistant"),
    "modes": (None, ()),
}
# kinds whose teacher gives vectors or scores, which any architecture can
ANY_TEACHER = {"embed", "rerank"}


def architectures(spec: Spec) -> Iterator[Fault]:
    """Stages at sizes whose architecture can't be trained so, and models of one that another would start from."""
    yield from _Architectures(spec).walk()


class _Architectures:
    """Every (size, stage) that something published needs, each looked at once. A size with a mistake is told
    elsewhere, and taken to allow everything.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec, self.family, self.names = spec, spec.family, Names(spec)
        shapes = {size: safe_shape(spec, size) for size in spec.family.sizes}
        self.arch = {size: shape.arch for size, shape in shapes.items() if shape is not None}
        self.positions = spec.family.arch.context
        self.search = Search(spec, self.names)
        self.told: set[object] = set()

    def walk(self) -> Iterator[Fault]:
        if len(set(self.arch.values())) == 1 and next(iter(self.arch.values())) in DECODERS:
            return  # nothing to tell of a family of one decoder, and it may have thousands of steps
        todo: list[tuple[Step, Path, bool]] = []
        for variant, v in self.family.variants.items():
            if self.spec.touched("variants", variant):
                continue
            for size in self.family.sizes_of(v.sizes):
                stage = self.family.stage_of(variant, size)
                if stage in self.family.stages and stage is not None:
                    path, key = self.published(variant, size)
                    todo.append(((size, stage), path, key))
        met: set[Step] = set()
        for step, path, key in todo:  # grows while it is read: breadth first, what is nearest is told first
            size, name = step
            if self.spec.touched("stages", name):
                continue
            if not self.possible(step):
                yield from self.kind(step, path, key)
                continue  # what such a stage starts from is no mistake of its own
            if step in met:
                continue
            met.add(step)
            yield from self.values(step)
            for ref, at, where in self.search.edges(step):
                to = self.names.target(ref, at)
                if to is not None:
                    yield from self.across(step, to, ref, where)
                    todo.append((to, where, False))

    def possible(self, step: Step) -> bool:
        size, name = step
        kinds = KINDS_OF.get(self.arch.get(size, ""))
        return kinds is None or self.family.stages[name].kind in kinds

    def published(self, variant: str, size: str) -> tuple[Path, bool]:
        """Where a size comes into a variant, and whether its key is meant: its own line, the list, or all."""
        v = self.family.variants[variant]
        if not isinstance(v.stage, str):
            groups = (key for key in v.stage if size in self.family.groups.get(key, ()))
            return ("variants", variant, "stage", size if size in v.stage else next(groups)), False
        return (("variants", variant), True) if v.sizes == "all" else (("variants", variant, "sizes"), False)

    def kind(self, step: Step, path: Path, key: bool) -> list[Fault]:
        """A stage whose kind the architecture does not know, told where the size comes in."""
        size, name = step
        arch, kind = self.arch[size], self.family.stages[name].kind
        fitting = [s for s, other in self.arch.items() if kind in KINDS_OF.get(other, (kind,))]
        message = (
            f"{_label(path)}: kind '{kind}' ({name}) is not for {arch}, the architecture of size '{size}'"
        )
        what = " or ".join(k for k in KINDS_OF[arch] if k != "adopt")
        sizes = f"; sizes for {kind}: {', '.join(fitting)}" if fitting and path[0] == "variants" else ""
        return self.once(
            ("kind", path, arch, name), Fault(path, message, f"{arch} knows {what}{sizes}", key=key)
        )

    def values(self, step: Step) -> Iterator[Fault]:
        """What a stage says that means nothing to the architecture."""
        size, name = step
        arch, stage = self.arch.get(size), self.names.stage_at(name, size)
        if arch is None or arch in DECODERS or not isinstance(stage, Training):
            return
        for field, plain in DECODERS_ONLY.items():
            value = getattr(stage, field, None)
            if value not in plain:
                yield from self.field(
                    step, field, f"{arch} has no use for it", "set it under 'by', for decoder sizes"
                )
        if stage.rope_theta is not None and arch not in ROTARY:
            hint = "raise arch.context" if arch == "bert" else "leave it out: t5 reads any length"
            yield from self.field(step, "rope_theta", f"{arch} has no rotary positions", hint)
        elif arch == "bert" and (stage.context or 0) > self.positions and "by" in self.where(step, "context"):
            # what the stage itself says is told with the budgets
            why = f"{stage.context} is beyond the {self.positions} positions that bert learns"
            yield from self.field(step, "context", why, "raise arch.context")

    def field(self, step: Step, field: str, why: str, hint: str) -> list[Fault]:
        path = self.where(step, field)
        return self.once(path, Fault(path, f"{_label(path)}: {why} (size {step[0]})", hint))

    def where(self, step: Step, field: str) -> Path:
        """Where the value of a field that holds at a size is written."""
        size, name = step
        keys = [
            k for k in reversed(self.names.overrides(name, size)) if field in self.family.stages[name].by[k]
        ]
        return ("stages", name, "by", keys[0], field) if keys else ("stages", name, field)

    def across(self, step: Step, to: Step, ref: str, where: Path) -> list[Fault]:
        """A model of one architecture, where one of another is needed."""
        mine, other = self.arch.get(step[0]), self.arch.get(to[0])
        if mine is None or other is None:
            return []
        label = f"{_label(where)}: '{ref}' is a {other} (size {to[0]})"
        if where[-1] == "from" and mine != other:
            why = f"{label}, and size '{step[0]}' is a {mine}: weights of one are none of the other's"
            return self.once(
                ("from", where, mine, other), Fault(where, why, "start from a model of the same size")
            )
        learns = where[-1] == "teacher" and self.family.stages[step[1]].kind not in ANY_TEACHER
        if (learns or where[-1] == "by") and other not in DECODERS:
            fitting = [s for s, arch in self.arch.items() if arch in DECODERS]
            why = f"{label}, which gives no probability to the next token"
            if where[-1] == "by":
                why = f"{label}, which generates no text"
            return self.once((where, other), Fault(where, why, did_you_mean("", fitting)))
        return []

    def once(self, mark: object, fault: Fault) -> list[Fault]:
        if mark in self.told:
            return []
        self.told.add(mark)
        return [fault]


def _label(path: Path) -> str:
    """A path as it is said in a message."""
    return ".".join(str(part) for part in path)
