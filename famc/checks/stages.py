"""Stages: what they start from, read and learn from; that no step needs itself; that contexts and batches
fit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from famc.checks.data import one_mix
from famc.checks.names import DATA, SIZES, Names, model_ref, split_ref, unknown
from famc.checks.shapes import path_fault
from famc.errors import did_you_mean
from famc.spec.family import Mix, StageSpec
from famc.spec.load import Spec
from famc.spec.text import Path
from famc.spec.words import Fault
from famc.steps.adopt import Adopt
from famc.steps.base import Training
from famc.steps.distill import Distill
from famc.steps.mixes import format_of
from famc.steps.shapes import vocab_rows

# what a kind may read
FORMATS: dict[str, tuple[str, ...]] = {
    "pretrain": ("text",),
    "sft": ("messages",),
    "dpo": ("preference",),
    "distill": ("text", "messages", "prompts"),
    "grpo": ("prompts", "messages"),
    "embed": ("pairs",),
    "rerank": ("pairs",),
    "vlm": ("image_text",),
    "audio": ("audio_text",),
}
NEEDS_PARENT = {"sft", "dpo", "grpo", "vlm", "audio"}  # embed, rerank: see retrieval.py
LONGEST = 100  # stages one after the other: more is a mistake, and deeper than Python follows
Step = tuple[str, str]  # (size, stage)
Edge = tuple[str, str, Path]  # (reference, size it is read at, where it is written)


def references(spec: Spec) -> Iterator[Fault]:
    """What each stage starts from and reads."""
    family = spec.family
    for name, stage in family.stages.items():
        path: Path = ("stages", name)
        label = f"stages.{name}"
        if stage.from_ is not None:
            if stage.from_ == name:
                yield Fault((*path, "from"), f"{label}.from: a stage can't start from itself")
            yield from model_ref(spec, stage.from_, (*path, "from"), f"{label}.from")
        elif stage.kind in NEEDS_PARENT:
            hint = did_you_mean("", [s for s in family.stages if s != name])
            yield Fault(
                path,
                f"{label}: kind '{stage.kind}' starts from a trained model: 'from' is missing",
                hint,
                key=True,
            )
        if isinstance(stage, Adopt):
            yield from _adopt(spec, path, label, stage)
            continue
        data = getattr(stage, "data", None)
        if data is None:
            hint = did_you_mean("", [*family.data.mixes, *family.data.sources])
            yield Fault(path, f"{label} needs 'data'", hint, key=True)
        else:
            yield from _reads(spec, (*path, "data"), label, stage.kind, data)
        if teacher := getattr(stage, "teacher", None):
            yield from model_ref(spec, teacher, (*path, "teacher"), f"{label}.teacher")


def _adopt(spec: Spec, path: Path, label: str, stage: Adopt) -> Iterator[Fault]:
    if (stage.path is None) == (stage.hf is None):
        yield Fault(
            path, f"{label}: give one of 'path' and 'hf'", "a folder, or a repository on the hub", key=True
        )
    if stage.hf is not None and stage.revision is None:
        yield Fault(path, f"{label}: a hub checkpoint needs 'revision'", "pin the commit", key=True)
    if stage.from_ is not None:
        yield Fault(
            (*path, "from"), f"{label}: an adopted checkpoint starts from nothing", "remove 'from'", key=True
        )
    if stage.by:
        yield Fault(
            (*path, "by"),
            f"{label}: an adopted checkpoint has no values that differ",
            "remove 'by'",
            key=True,
        )
    if stage.path is not None and (wrong := path_fault(spec, stage.path)):
        yield Fault((*path, "path"), f"{label}.path: {wrong}")


def _reads(spec: Spec, path: Path, label: str, kind: str, data: str | Mix) -> Iterator[Fault]:
    """A stage's data: that it is there, and of a format that the kind reads."""
    family = spec.family
    if isinstance(data, str):
        yield from unknown(spec, path, f"{label}.data: no mix or source is called", data, DATA)
    mix = data if isinstance(data, Mix) else family.data.mixes.get(data)
    allowed = FORMATS.get(kind, ())
    names = [k.partition(".")[0] for k in mix.weights] if mix else [data] if isinstance(data, str) else []
    found = {n: format_of(family.data.sources[n]) for n in names if n in family.data.sources}
    if len(set(found.values())) != 1 or any(spec.touched("data", "sources", n) for n in names):
        return  # a mixture of formats is told at the mix
    written = next(iter(found.values()))
    if written not in allowed:
        shown = data if isinstance(data, str) else next(iter(found))
        message = (
            f"{label}.data: '{shown}' is of format '{written}', kind '{kind}' reads {' or '.join(allowed)}"
        )
        fitting = [n for n, s in family.data.sources.items() if format_of(s) in allowed]
        yield Fault(path, message, f"for example {fitting[0]}" if fitting else "")


def budgets(spec: Spec) -> Iterator[Fault]:
    """Rows, batches and positions that do not fit each other."""
    family, names = spec.family, Names(spec)
    if spec.touched("arch"):
        return
    for name, stage in family.stages.items():
        if not isinstance(stage, Training) or any(spec.touched("stages", s) for s in names.lineage(name)):
            continue
        path: Path = ("stages", name)
        context = stage.context or family.arch.context
        if stage.batch_tokens and stage.batch_tokens % context:
            near = max(1, round(stage.batch_tokens / context)) * context
            message = f"{stage.batch_tokens} is not a whole number of rows of {context} tokens"
            yield Fault(
                (*path, "batch_tokens"), f"stages.{name}.batch_tokens: {message}", f"for example {near}"
            )
        reach = family.arch.context
        for ancestor in reversed(names.lineage(name)):
            one = family.stages[ancestor]
            if isinstance(one, Training) and one.rope_theta and one.context:
                reach = max(reach, one.context)
        if stage.context and stage.context > reach:
            message = f"stages.{name}.context: {stage.context} is beyond the {reach} positions of the model"
            yield Fault(
                (*path, "context"), message, "set rope_theta as well to extend them, or raise arch.context"
            )
        if stage.kind == "pretrain" and stage.data is not None:
            _, mix, _ = names.mix_of(name, stage.data)
            if mix.tokens is not None and mix.tokens < context:
                message = f"stages.{name}.data: {mix.tokens} tokens are less than one row of {context}"
                yield Fault((*path, "data"), message, "raise the mix's tokens, or lower context")


def overrides(spec: Spec) -> Iterator[Fault]:
    """`by`: its keys, and the names and numbers in it."""
    family, names = spec.family, Names(spec)
    for name, stage in family.stages.items():
        for key, values in stage.by.items():
            path: Path = ("stages", name, "by", key)
            label = f"stages.{name}.by"
            yield from unknown(
                spec,
                path,
                f"{label}: no size, group or backend is called",
                key,
                (*SIZES, "backends"),
                key=True,
            )
            if spec.touched("stages", name):
                continue
            view = names.overridden(name, (key,))
            if not isinstance(view, Training):
                continue
            if "data" in values and view.data is not None:
                yield from _reads(spec, (*path, "data"), f"{label}.{key}", stage.kind, view.data)
                if isinstance(view.data, Mix):
                    yield from one_mix(spec, (*path, "data"), f"{label}.{key}.data", view.data)
            if "teacher" in values and (teacher := getattr(view, "teacher", None)):
                yield from model_ref(spec, teacher, (*path, "teacher"), f"{label}.{key}.teacher")
            context = view.context or family.arch.context
            uneven = view.batch_tokens and view.batch_tokens % context
            if uneven and {"batch_tokens", "context"} & set(values) and not spec.touched("arch"):
                where = "batch_tokens" if "batch_tokens" in values else "context"
                message = (
                    f"{view.batch_tokens} batch tokens are not a whole number of rows of {context} tokens"
                )
                yield Fault((*path, where), f"{label}.{key}: {message}", "make one a multiple of the other")


def edges(spec: Spec) -> Iterator[Fault]:
    """Steps that would need themselves, and models asked for at sizes where they are not made."""
    family, names = spec.family, Names(spec)
    published = [
        (size, stage)
        for variant, v in family.variants.items()
        for size in family.sizes_of(v.sizes)
        if (stage := family.stage_of(variant, size)) in family.stages and stage is not None
    ]
    search = Search(spec, names)
    for step in published:
        yield from search.walk(step)
    met = {stage for _, stage in search.state}
    for name in family.stages:  # what nothing uses: at least it must not go in a circle
        if name not in met:
            yield from search.walk((next(iter(family.sizes)), name))


class Search:
    """Depth first over (size, stage), each visited once."""

    def __init__(self, spec: Spec, names: Names) -> None:
        self.spec, self.names, self.family = spec, names, spec.family
        self.state: dict[Step, str] = {}
        self.told: set[object] = set()
        self.data: dict[object, tuple[str, ...]] = {}

    def edges(self, step: Step) -> list[Edge]:
        size, name = step
        stage: StageSpec = self.names.stage_at(name, size)
        found: list[Edge] = [(stage.from_, size, ("stages", name, "from"))] if stage.from_ else []
        if teacher := getattr(stage, "teacher", None):
            keys = [k for k in reversed(self.names.overrides(name, size)) if "teacher" in stage.by[k]]
            where: Path = ("stages", name, "by", keys[0], "teacher") if keys else ("stages", name, "teacher")
            found.append((teacher, size, where))
        if (miner := self.names.miner(stage, size)) and miner != self.names.target(stage.from_ or "", size):
            found.append(("@".join(reversed(miner)), size, ("stages", name, "hard_negatives")))
        data = getattr(stage, "data", None)
        sources = self.names.sources_of(data)
        if data is not None and self.names.decontaminated(data):
            sources += tuple(s for e in self.names.eval_sources for s in self.names.sources_of(e))
        for source in dict.fromkeys(sources):
            by = self.family.data.sources[source].by
            if by:
                found.append((by, next(iter(self.family.sizes)), ("data", "sources", source, "by")))
        return found

    def walk(self, start: Step) -> Iterator[Fault]:
        if start in self.state:
            return
        self.state[start] = "open"
        stack: list[tuple[Step, Path, Iterator[Edge]]] = [(start, (), iter(self.edges(start)))]
        while stack:
            step, _, rest = stack[-1]
            edge = next(rest, None)
            if edge is None:
                self.state[step] = "done"
                stack.pop()
                continue
            ref, size, path = edge
            to = self.names.target(ref, size)
            if to is None:
                yield from self.not_made(ref, size, path)
            elif self.state.get(to) == "open":
                yield from self.circle([(s, p) for s, p, _ in stack], to, path)
            elif to not in self.state:
                if len(stack) >= LONGEST:
                    message = f"stages.{step[1]}: more than {LONGEST} stages one after the other"
                    yield from self.once("long", Fault(path, message, "cut the chain"))
                    continue
                self.state[to] = "open"
                stack.append((to, path, iter(self.edges(to))))

    def not_made(self, ref: str, size: str, path: Path) -> Iterator[Fault]:
        """A variant without a stage at a size; a name that means nothing is told elsewhere."""
        name, at = split_ref(ref, size)
        whole = not (
            self.spec.touched("variants", name) or self.spec.touched("groups") or self.spec.touched("sizes")
        )
        if (
            name in self.family.variants
            and name not in self.family.stages
            and at in self.family.sizes
            and whole
        ):
            if at in self.family.sizes_of(self.family.variants[name].sizes):
                return  # without a stage there, which is told at the variant
            made = [s for s in self.family.sizes if self.family.stage_of(name, s)]
            label = ".".join(str(p) for p in path)
            message = f"{label}: variant '{name}' is not made at size '{at}'"
            yield from self.once((path, at), Fault(path, message, f"it is made at {', '.join(made)}"))

    def circle(self, chain: list[tuple[Step, Path]], to: Step, path: Path) -> Iterator[Fault]:
        loop = chain[[step for step, _ in chain].index(to) :]
        names = [f"{size}/{stage}" for (size, stage), _ in loop]
        if len(loop) == 1 and path[-1] == "from" and self.family.stages[to[1]].from_ == to[1]:
            return  # told where stages are checked
        made = next((p for p in (path, *(p for _, p in loop[1:])) if p[0] == "data"), None)
        what = "data is needed before the step that makes it" if made else "a step would need itself"
        shown = f"{what}: {' <- '.join([*names, names[0]])}"
        mark = made or frozenset(stage for (_, stage), _ in loop)
        yield from self.once(mark, Fault(made or path, shown, f"cut it at '{(made or path)[-1]}'"))

    def once(self, mark: object, fault: Fault) -> Iterator[Fault]:
        if mark not in self.told:
            self.told.add(mark)
            yield fault


def teachers(spec: Spec) -> Iterator[Fault]:
    """An adopted checkpoint with another vocabulary than the family's."""
    family = spec.family
    if spec.touched("arch") or spec.touched("tokenizer"):
        return
    rows = vocab_rows(family)
    for name, stage in family.stages.items():
        if not isinstance(stage, Adopt) or not stage.path or path_fault(spec, stage.path):
            continue
        config = spec.folder / stage.path / "config.json"
        if not config.is_file():
            continue
        try:
            values = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            yield Fault(("stages", name, "path"), f"stages.{name}.path: {config} is no JSON")
            continue
        found = values.get("vocab_size") if isinstance(values, dict) else None
        if found != rows:
            users = [
                n
                for n, s in family.stages.items()
                if isinstance(s, Distill) and s.teacher.partition("@")[0] == name
            ]
            what = (
                f"stages.{users[0]}.teacher: '{name}' has another vocabulary"
                if users
                else f"stages.{name}: another vocabulary"
            )
            path: Path = ("stages", users[0], "teacher") if users else ("stages", name, "path")
            hint = "adopt its tokenizer and set arch.vocab_pad"
            yield Fault(path, f"{what}: {found} rows, the family has {rows}", hint)
