"""What the names of a spec mean, and how to say that one means nothing.

In: a Spec whose sections are each valid, perhaps with mistakes left out. A name whose entry was left out
is known all the same: its mistake was told where it stands, and is not told again wherever it is used.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path as FilePath

from famc.cost.shape import Shape
from famc.errors import did_you_mean
from famc.spec.family import Family, Mix, StageSpec
from famc.spec.load import Spec, merge
from famc.spec.text import Path
from famc.spec.words import Fault, word
from famc.steps import others
from famc.steps.corpus import RECIPES, recipe
from famc.steps.files import Files
from famc.steps.mixes import format_of
from famc.steps.shapes import shape_of, vocab_rows

MODELS = ("stages", "variants")
DATA = ("data.mixes", "data.sources")
SIZES = ("sizes", "groups")


def split_ref(ref: str, size: str) -> tuple[str, str]:
    """`instruct@32b` -> (instruct, 32b); without @, at the size given."""
    name, at, where = ref.partition("@")
    return name, where if at else size


def section(spec: Spec, name: str) -> dict[str, object]:
    """The entries of `sizes`, `data.mixes`, …"""
    value: object = spec.family
    for part in name.split("."):
        value = getattr(value, part)
    assert isinstance(value, dict)
    return value


def known(spec: Spec, name: str, *sections: str) -> bool:
    """Whether one of the sections has the name, or had it before a mistake was left out."""
    for where in sections:
        path: Path = tuple(where.split("."))
        if name in section(spec, where) or any(
            path[: len(d)] == d or d == (*path, name) for d in spec.dropped
        ):
            return True
    return False


def unknown(
    spec: Spec,
    path: Path,
    message: str,
    name: str,
    sections: Iterable[str],
    extra: Iterable[str] = (),
    *,
    key: bool = False,
) -> Iterator[Fault]:
    """The problem that no section has the name: `message 'name'; did you mean …?`. Nothing if one has."""
    sections, extra = tuple(sections), tuple(extra)
    if name in extra or known(spec, name, *sections):
        return
    names = [n for s in sections for n in section(spec, s) if (*s.split("."), n) not in spec.dropped]
    yield Fault(path, f"{message} '{word(name)}'", did_you_mean(name[:200], (*names, *extra)), key=key)


def model_ref(spec: Spec, ref: str, path: Path, label: str) -> Iterator[Fault]:
    """A reference to a model: stage or variant, with or without @size."""
    name, at, size = ref.partition("@")
    yield from unknown(spec, path, f"{label}: no stage or variant is called", name, MODELS)
    if at:
        yield from unknown(spec, path, f"{label}: unknown size", size, ("sizes",))


def safe_shape(spec: Spec, size: str) -> Shape | None:
    """The dimensions of a size; None where it, or the architecture, has a mistake."""
    if spec.touched("arch") or spec.touched("sizes", size) or spec.touched("tokenizer", "vocab"):
        return None
    try:
        return shape_of(spec.family, size)
    except ValueError:
        return None


def safe_text(file: FilePath) -> str | None:
    """A local file's text; None where it is not there or can't be read."""
    try:
        return file.read_text(encoding="utf-8") if file.is_file() else None
    except (OSError, ValueError):
        return None


class Names:
    """What the names of a spec mean."""

    def __init__(self, spec: Spec, files: Files | None = None) -> None:
        self.spec = spec
        self.family: Family = spec.family
        self.files = files or spec_files(spec)

    # --- models ---------------------------------------------------------------------------------------------

    def stage_of(self, variant: str, size: str) -> str:
        """The stage behind a variant at a size. The checks have made sure that there is one."""
        stage = self.family.stage_of(variant, size)
        assert stage is not None, (variant, size)
        return stage

    def target(self, ref: str, size: str) -> tuple[str, str] | None:
        """(size, stage) that `stage`, `variant`, `stage@size` or `variant@size` means at a size; None if
        there is none.
        """
        name, at = split_ref(ref, size)
        stage = name if name in self.family.stages else None
        if stage is None and name in self.family.variants:
            stage = self.family.stage_of(name, at)
        return (at, stage) if stage in self.family.stages and at in self.family.sizes else None

    def backend(self, address: str) -> str | None:
        """The backend that `place` gives a step: the first glob that matches, else the default, else the
        first backend.
        """
        for pattern, backend in self.family.place.items():
            if pattern != "default" and fnmatch.fnmatchcase(address, pattern):
                return backend
        return self.family.place.get("default") or next(iter(self.family.backends), None)

    def overrides(self, stage: str, size: str) -> list[str]:
        """Keys of `by` that hold for a stage at a size, the strongest last: groups, backend, size."""
        by = self.family.stages[stage].by
        keys = [g for g, members in self.family.groups.items() if g in by and size in members]
        more = (self.backend(f"{size}/{stage}"), size)
        return keys + [k for k in dict.fromkeys(more) if k is not None and k in by and k not in keys]

    def stage_at(self, stage: str, size: str) -> StageSpec:
        """A stage with the overrides that hold at a size laid over it."""
        return self.overridden(stage, tuple(self.overrides(stage, size)))

    def overridden(self, stage: str, keys: tuple[str, ...]) -> StageSpec:
        """A stage with some of its `by` laid over it."""
        spec = self.family.stages[stage]
        if not keys:
            return spec
        memo = self.spec.document.memo.setdefault("stages", {})
        if (stage, keys) not in memo:
            raw = spec.model_dump(exclude_unset=True, by_alias=True)
            for key in keys:
                raw = merge(raw, spec.by[key])
            memo[stage, keys] = type(spec).model_validate(raw)
        result = memo[stage, keys]
        assert isinstance(result, StageSpec)
        return result

    def miner(self, stage: StageSpec, size: str) -> tuple[str, str] | None:
        """(size, stage) of the embedder that mines a stage's negatives at a size; None where BM25 does it alone.

        What `by` says; else an embedder's own parent if that is one, and for a reranker the family's embedder: the one
        at its size, or at the first size that has one.
        """
        wanted = getattr(stage, "hard_negatives", None)
        if wanted is None or wanted.by == "bm25":
            return None
        if wanted.by is not None:
            return self.target(wanted.by, size)
        if stage.kind == "embed":
            parent = self.target(stage.from_, size) if stage.from_ else None
            return parent if parent and self.family.stages[parent[1]].kind == "embed" else None
        return self.embedder(size)

    def embedder(self, size: str) -> tuple[str, str] | None:
        """(size, stage) of the embedder that the family publishes at a size, or else at its first size."""
        for at in (size, *self.family.sizes):
            for name in self.family.variants:
                stage = self.family.stage_of(name, at)
                if stage in self.family.stages and stage and self.family.stages[stage].kind == "embed":
                    return at, stage
        return None

    def lineage(self, stage: str) -> list[str]:
        """A stage and what it starts from, nearest first, at its own size."""
        chain: list[str] = []
        current: str | None = stage
        while current and current in self.family.stages and current not in chain:
            chain.append(current)
            parent = self.family.stages[current].from_
            current = parent.partition("@")[0] if parent else None
            if current in self.family.variants and current not in self.family.stages:
                made = (self.family.stage_of(current, size) for size in self.family.sizes)
                current = next((s for s in made if s), None)
        return chain

    # --- data -----------------------------------------------------------------------------------------------

    def mix_of(self, stage: str, data: str | Mix) -> tuple[str, Mix, str]:
        """(name, mix, format) that a stage's `data` means: a mix, a source as it is, or a mix written in
        place.
        """
        mixes, sources = self.family.data.mixes, self.family.data.sources
        if isinstance(data, Mix):
            name, mix = f"{stage}.data", data
        elif data in mixes:
            name, mix = data, mixes[data]
        else:
            name, mix = data, _as_it_is(data)
        first = next(iter(mix.weights), "").partition(".")[0]
        return name, mix, format_of(sources[first]) if first in sources else "text"

    def sources_of(self, data: str | Mix | None) -> tuple[str, ...]:
        """Every source behind a mix or a source, those that generators start from included."""
        if data is None:
            return ()
        todo = [key.partition(".")[0] for key in self.mix_of("", data)[1].weights]
        found: dict[str, None] = {}
        while todo:
            name = todo.pop(0)
            source = self.family.data.sources.get(name)
            if source is not None and name not in found:
                found[name] = None
                todo += [source.from_] if source.from_ else []
        return tuple(found)

    def decontaminated(self, data: str | Mix) -> bool:
        """Whether some source of a mix has documents of evaluations taken out."""
        for key in self.mix_of("", data)[1].weights:
            source = self.family.data.sources.get(key.partition(".")[0])
            if source is not None:
                steps = self.family.data.clean.get(source.clean, RECIPES.get(source.clean, ()))
                if any(name == "decontaminate" for name, _ in recipe(steps)[0]):
                    return True
        return False

    @cached_property
    def rows(self) -> int:
        """Rows of every embedding of the family."""
        return vocab_rows(self.family)

    # --- evaluations ----------------------------------------------------------------------------------------

    @cached_property
    def suites(self) -> tuple[str, ...]:
        """Every suite that a variant or a gate names, in order of use."""
        used = [v.eval for v in self.family.variants.values() if v.eval]
        for gate in self.family.gates:
            used += [name for name in (gate.suite, gate.monotonic) if name]
        return tuple(dict.fromkeys(used))

    @cached_property
    def eval_sources(self) -> tuple[str, ...]:
        """Sources whose held-out part some evaluation reads."""
        found: list[str] = []
        for suite in self.suites:
            for task in self.family.evals.get(suite, ()):
                if task.data:
                    found.append(task.data)
            for name in others.FORMATS:
                declared = self.family.evals.get(suite)
                if declared is None or any(t.task == name for t in declared):
                    data = self.default_data(suite, name)
                    found += [data] if data else []
        return tuple(dict.fromkeys(found))

    def default_data(self, suite: str, task: str) -> str | None:
        """The source that a task reads when the spec names none: what its variants were trained on."""
        if (suite, task) not in self._defaults:
            self._defaults[suite, task] = self._default_data(suite, task)
        return self._defaults[suite, task]

    @cached_property
    def _defaults(self) -> dict[tuple[str, str], str | None]:
        return {}

    def _default_data(self, suite: str, task: str) -> str | None:
        wanted = others.FORMATS.get(task)
        if wanted is None:
            return None
        for declared in self.family.evals.get(suite, ()):
            if declared.task == task and declared.data:
                return declared.data
        for name, variant in self.family.variants.items():
            if variant.eval != suite:
                continue
            made = (self.family.stage_of(name, size) for size in self.family.sizes_of(variant.sizes))
            for stage in dict.fromkeys(s for s in made if s):
                for ancestor in self.lineage(stage):
                    data = getattr(self.family.stages[ancestor], "data", None)
                    if data is not None:
                        _, mix, fmt = self.mix_of(ancestor, data)
                        if fmt == wanted:
                            # what a model of the family writes can't be kept out of what that model learns from
                            own = [name.partition(".")[0] for name in mix.weights]
                            sources = self.family.data.sources
                            return next((n for n in own if n not in sources or not sources[n].by), None)
        return None

    def template(self) -> tuple[str | None, tuple[str, ...]]:
        """(the chat template's text, what is missing here)."""
        t = self.family.tokenizer
        if t.chat_template is None:
            return (None if t.adopt else others.CHATML), ()
        text = safe_text(self.spec.folder / t.chat_template)
        if text is None:
            return f"file: {t.chat_template}", (f"{t.chat_template} is not on this machine",)
        return text, ()


def spec_files(spec: Spec) -> Files:
    """Digests of the spec's local files; kept beside the spec's document so that they are read once."""
    files = spec.document.memo.setdefault("files", Files())
    assert isinstance(files, Files)
    return files


@lru_cache(maxsize=1024)
def _as_it_is(source: str) -> Mix:
    """A source alone, as a mix: asked once a step of a large family."""
    return Mix(weights={source: 1.0})
