"""What is wrong with a spec once names are followed: every rule a small function, all of them run, all problems told.

In: a Spec whose sections are each valid. Out: problems with places. `Names` answers what a name means; graph.py uses it too.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

from famc.backend import UnknownAccelerator, load_accelerator
from famc.cost.memory import inference
from famc.cost.parameters import count
from famc.errors import Problem, did_you_mean
from famc.spec.family import Family, Gate, Mix
from famc.spec.load import Spec
from famc.steps import Kind, others
from famc.steps.adopt import Adopt
from famc.steps.base import Training
from famc.steps.corpus import FILTERS, RECIPES, recipe
from famc.steps.distill import Distill
from famc.steps.files import Files
from famc.steps.mixes import PYSTDLIB_FORMATS, SYNTH, format_of
from famc.steps.shapes import shape_of, vocab_rows

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
NEEDS_PARENT = {"sft", "dpo", "grpo", "embed", "rerank", "vlm", "audio"}
CHAT = {"sft", "dpo", "grpo"}
BUILTIN_TARGETS = ("cpu", "cuda")


def split_ref(ref: str, size: str) -> tuple[str, str]:
    """`instruct@32b` -> (instruct, 32b); without @, at the size given."""
    name, at, where = ref.partition("@")
    return name, where if at else size


class Names:
    """What the names of a spec mean."""

    def __init__(self, spec: Spec, files: Files | None = None) -> None:
        self.spec = spec
        self.family: Family = spec.family
        self.files = files or spec_files(spec)

    def stage_of(self, variant: str, size: str) -> str:
        """The stage behind a variant at a size. The checks have made sure that there is one."""
        stage = self.family.stage_of(variant, size)
        assert stage is not None, (variant, size)
        return stage

    def mix_of(self, stage: str, data: str | Mix) -> tuple[str, Mix, str]:
        """(name, mix, format) that a stage's `data` means: a mix, a source as it is, or a mix written in place."""
        mixes, sources = self.family.data.mixes, self.family.data.sources
        if isinstance(data, Mix):
            name, mix = f"{stage}.data", data
        elif data in mixes:
            name, mix = data, mixes[data]
        else:
            name, mix = data, Mix(weights={data: 1.0})
        first = next(iter(mix.weights)).partition(".")[0]
        return name, mix, format_of(sources[first])

    @cached_property
    def rows(self) -> int:
        """Rows of every embedding of the family."""
        return vocab_rows(self.family)

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
                data = self.default_data(suite, name)
                if data and (suite not in self.family.evals or any(t.task == name for t in self.family.evals[suite])):
                    found.append(data)
        return tuple(dict.fromkeys(found))

    def default_data(self, suite: str, task: str) -> str | None:
        """The source that a task reads when the spec names none: what the suite's variants were trained on."""
        wanted = others.FORMATS.get(task)
        if wanted is None:
            return None
        for declared in self.family.evals.get(suite, ()):
            if declared.task == task and declared.data:
                return declared.data
        for name, variant in self.family.variants.items():
            if variant.eval != suite:
                continue
            for size in self.family.sizes_of(variant.sizes):
                stage = self.family.stage_of(name, size)
                for ancestor in self.lineage(stage) if stage else ():
                    spec = self.family.stages[ancestor]
                    data = getattr(spec, "data", None)
                    if data is not None:
                        _, mix, fmt = self.mix_of(ancestor, data)
                        if fmt == wanted:
                            return next(iter(mix.weights)).partition(".")[0]
        return None

    def lineage(self, stage: str) -> list[str]:
        """A stage and what it starts from, nearest first, at its own size."""
        chain: list[str] = []
        current: str | None = stage
        while current and current in self.family.stages and current not in chain:
            chain.append(current)
            parent = self.family.stages[current].from_
            current = parent.partition("@")[0] if parent else None
            if current in self.family.variants:
                current = next((self.family.stage_of(current, s) for s in self.family.sizes if self.family.stage_of(current, s)), None)
        return chain

    def template(self) -> tuple[str | None, tuple[str, ...]]:
        """(the chat template's text, what is missing here)."""
        t = self.family.tokenizer
        if t.chat_template is None:
            return (None if t.adopt else others.CHATML), ()
        file = self.spec.folder / t.chat_template
        if not file.is_file():
            return f"file: {t.chat_template}", (f"{t.chat_template} is not on this machine",)
        return file.read_text(encoding="utf-8"), ()


def spec_files(spec: Spec) -> Files:
    """Digests of the spec's local files; kept beside the spec's document so that they are read once."""
    files = getattr(spec.document, "files", None)
    if files is None:
        files = Files()
        spec.document.files = files  # type: ignore[attr-defined]  # a memo, not part of the document
    assert isinstance(files, Files)
    return files


def check(spec: Spec, kinds: Mapping[str, Kind]) -> list[Problem]:
    """Every problem that following names brings to light."""
    problems: list[Problem] = []
    for rule in RULES:
        problems += rule(spec)
    if not problems:
        for rule in AFTER:
            problems += rule(spec)
    return problems


def _sizes(spec: Spec) -> Iterator[Problem]:
    family = spec.family
    for name in family.sizes:
        try:
            shape_of(family, name)
        except ValueError as error:
            text, _, hint = str(error).partition("; ")
            if text.startswith(("unknown architecture", "architecture")):
                yield spec.problem(("arch", "type"), f"arch.type: {text}", hint)
            else:
                yield spec.problem(("sizes", name), f"sizes.{name}: {text}", hint, key=True)
    for group, members in family.groups.items():
        if group in family.sizes or group == "all":
            yield spec.problem(("groups", group), f"groups.{group}: the name already means a size", "call the group something else", key=True)
        for index, member in enumerate(members):
            if member not in family.sizes:
                yield spec.problem(("groups", group, index), f"groups.{group}: unknown size '{member}'", did_you_mean(member, family.sizes))


def _tokenizer(spec: Spec) -> Iterator[Problem]:
    family, t = spec.family, spec.family.tokenizer
    if t.adopt is None and t.train_on is None:
        yield spec.problem(("tokenizer",), "tokenizer needs 'train_on' (a mix to learn from) or 'adopt' (a folder)", key=True)
    if t.adopt is not None and t.train_on is not None:
        yield spec.problem(("tokenizer", "adopt"), "tokenizer: 'adopt' and 'train_on' exclude each other", "keep one", key=True)
    if t.train_on is not None:
        names = {**family.data.mixes, **family.data.sources}
        if t.train_on.mix not in names:
            yield spec.problem(("tokenizer", "train_on", "mix"), f"tokenizer.train_on.mix: unknown mix or source '{t.train_on.mix}'", did_you_mean(t.train_on.mix, names))
        else:
            mix = family.data.mixes.get(t.train_on.mix)
            first = next(iter(mix.weights), "") if mix else t.train_on.mix
            source = family.data.sources.get(first.partition(".")[0])
            if source is not None and format_of(source) in ("image_text", "audio_text"):
                yield spec.problem(("tokenizer", "train_on", "mix"), f"tokenizer.train_on.mix: '{t.train_on.mix}' holds no text")
    if t.vocab and family.arch.vocab_pad and t.vocab > family.arch.vocab_pad:
        yield spec.problem(("tokenizer", "vocab"), f"tokenizer.vocab: {t.vocab} entries do not fit the {family.arch.vocab_pad} rows of arch.vocab_pad", "raise vocab_pad")
    chat = [name for name, stage in family.stages.items() if stage.kind in CHAT]
    if chat and t.adopt and not t.chat_template:
        folder = spec.folder / t.adopt
        config = folder / "tokenizer_config.json"
        if config.is_file() and "chat_template" not in config.read_text(encoding="utf-8") and not (folder / "chat_template.jinja").is_file():
            yield spec.problem(("stages", chat[0], "kind"), f"stages.{chat[0]} trains on conversations, but the adopted tokenizer has no chat template", "set tokenizer.chat_template")
    if t.chat_template:
        file = spec.folder / t.chat_template
        if file.is_file() and "{% generation %}" not in file.read_text(encoding="utf-8").replace("{%- ", "{% ").replace(" -%}", " %}"):
            yield spec.problem(("tokenizer", "chat_template"), f"tokenizer.chat_template: {t.chat_template} has no {{% generation %}} marks: which tokens are the assistant's can't be told", "wrap the assistant's words in {% generation %} … {% endgeneration %}")


def _sources(spec: Spec) -> Iterator[Problem]:
    family = spec.family
    for name, source in family.data.sources.items():
        path = ("data", "sources", name)
        origins = [o for o in ("path", "hf", "pystdlib", "synth") if getattr(source, o) is not None]
        if len(origins) != 1:
            what = " and ".join(origins) if origins else "nothing"
            yield spec.problem(path, f"data.sources.{name} says where from by {what}", "give one of path, hf, pystdlib, synth", key=True)
        if source.hf is not None and source.revision is None:
            yield spec.problem(path, f"data.sources.{name}: a hub dataset needs 'revision'", "pin the commit, so that the data can't move", key=True)
        if source.revision is not None and source.hf is None:
            yield spec.problem((*path, "revision"), f"data.sources.{name}: 'revision' is only for hub datasets (hf)", key=True)
        if source.synth is not None and source.synth not in SYNTH:
            yield spec.problem((*path, "synth"), f"data.sources.{name}: unknown generator '{source.synth}'", did_you_mean(source.synth, SYNTH))
        if source.pystdlib is not None and "format" in source.model_fields_set and source.format != PYSTDLIB_FORMATS[source.pystdlib]:
            yield spec.problem((*path, "format"), f"data.sources.{name}: pystdlib {source.pystdlib} is of format '{PYSTDLIB_FORMATS[source.pystdlib]}', not '{source.format}'")
        for key, value in (("from", source.from_), ("by", source.by), ("keep", source.keep)):
            if value is not None and source.synth is None:
                yield spec.problem((*path, key), f"data.sources.{name}: '{key}' is only for generators (synth)", key=True)
        if source.from_ is not None and source.from_ not in family.data.sources:
            yield spec.problem((*path, "from"), f"data.sources.{name}: unknown source '{source.from_}'", did_you_mean(source.from_, family.data.sources))
        if source.by is not None:
            yield from _model_ref(spec, source.by, (*path, "by"), f"data.sources.{name}.by", None)
        if source.rate is not None and format_of(source) != "audio_text":
            yield spec.problem((*path, "rate"), f"data.sources.{name}: 'rate' is only for audio", key=True)
        if source.clean not in family.data.clean and source.clean not in RECIPES:
            yield spec.problem((*path, "clean"), f"data.sources.{name}: unknown cleaning recipe '{source.clean}'", did_you_mean(source.clean, {**family.data.clean, **RECIPES}))
        if source.path is not None and (source.path.startswith("~") or "\0" in source.path):
            yield spec.problem((*path, "path"), f"data.sources.{name}: {source.path!r} is taken as it is, relative to the spec", "write the folder out")
    for name, steps in family.data.clean.items():
        _, wrong = recipe(steps)
        for index, message, word in wrong:
            known = FILTERS if message.startswith("unknown filter") else FILTERS[message.split("'")[-2]].defaults if word else ()
            yield spec.problem(("data", "clean", name, index), f"data.clean.{name}: {message}", did_you_mean(word, known) if word else "")


def _mixes(spec: Spec) -> Iterator[Problem]:
    family = spec.family
    mixes: list[tuple[tuple[str | int, ...], str, Mix]] = [(("data", "mixes", n), f"data.mixes.{n}", m) for n, m in family.data.mixes.items()]
    for name, stage in family.stages.items():
        data = getattr(stage, "data", None)
        if isinstance(data, Mix):
            mixes.append((("stages", name, "data"), f"stages.{name}.data", data))
    for name in family.data.mixes:
        if name in family.data.sources:
            yield spec.problem(("data", "mixes", name), f"data.mixes.{name}: a source has the same name", "call one of them something else", key=True)
    for path, label, mix in mixes:
        formats: dict[str, str] = {}
        for key, weight in mix.weights.items():
            source, dot, tier = key.partition(".")
            if source not in family.data.sources:
                yield spec.problem((*path, "weights", key), f"{label}: unknown source '{source}'", did_you_mean(source, family.data.sources), key=True)
                continue
            formats[key] = format_of(family.data.sources[source])
            if dot and not _has_tiers(family, source):
                yield spec.problem((*path, "weights", key), f"{label}: '{key}' names a tier, but the recipe of '{source}' makes none", "add {tier: …} to its cleaning recipe", key=True)
            if weight < 0:
                yield spec.problem((*path, "weights", key), f"{label}: the weight of '{key}' is negative")
        if not mix.weights or sum(w for w in mix.weights.values() if w > 0) <= 0:
            yield spec.problem((*path, "weights"), f"{label}: the weights sum to nothing", "give at least one source a weight above 0", key=True)
        if len(set(formats.values())) > 1:
            yield spec.problem((*path, "weights"), f"{label}: sources of different formats can't be mixed: {', '.join(f'{k} is {v}' for k, v in formats.items())}", key=True)


def _has_tiers(family: Family, source: str) -> bool:
    name = family.data.sources[source].clean
    filters, _ = recipe(family.data.clean.get(name, RECIPES.get(name, ())))
    return any(f[0] == "tier" for f in filters)


def _model_ref(spec: Spec, ref: str, path: tuple[str | int, ...], label: str, stage: str | None) -> Iterator[Problem]:
    """A reference to a model: stage or variant, with or without @size."""
    family = spec.family
    name, at, size = ref.partition("@")
    known = {**family.stages, **family.variants}
    if name not in known:
        yield spec.problem(path, f"{label}: no stage or variant is called '{name}'", did_you_mean(name, known))
        return
    if at and size not in family.sizes:
        yield spec.problem(path, f"{label}: unknown size '{size}'", did_you_mean(size, family.sizes))
        return
    if name not in family.stages and at and family.stage_of(name, size) is None:
        made = [s for s in family.sizes if family.stage_of(name, s)]
        yield spec.problem(path, f"{label}: variant '{name}' is not made at size '{size}'", f"it is made at {', '.join(made)}")
    if stage is not None and ref == stage:
        yield spec.problem(path, f"{label}: stages.{stage} can't start from itself")


def _stages(spec: Spec) -> Iterator[Problem]:
    family = spec.family
    data_names = {**family.data.mixes, **family.data.sources}
    for name, stage in family.stages.items():
        path = ("stages", name)
        label = f"stages.{name}"
        if stage.from_ is not None:
            yield from _model_ref(spec, stage.from_, (*path, "from"), f"{label}.from", name)
        elif stage.kind in NEEDS_PARENT:
            yield spec.problem(path, f"{label}: kind '{stage.kind}' starts from a trained model: 'from' is missing", did_you_mean("", [s for s in family.stages if s != name]), key=True)
        if isinstance(stage, Adopt):
            if (stage.path is None) == (stage.hf is None):
                yield spec.problem(path, f"{label}: give one of 'path' and 'hf'", key=True)
            if stage.hf is not None and stage.revision is None:
                yield spec.problem(path, f"{label}: a hub checkpoint needs 'revision'", "pin the commit", key=True)
            if stage.from_ is not None:
                yield spec.problem((*path, "from"), f"{label}: an adopted checkpoint starts from nothing", "remove 'from'", key=True)
            continue
        data = getattr(stage, "data", None)
        if data is None:
            yield spec.problem(path, f"{label}: 'data' is missing", did_you_mean("", data_names), key=True)
        elif isinstance(data, str) and data not in data_names:
            yield spec.problem((*path, "data"), f"{label}.data: no mix or source is called '{data}'", did_you_mean(data, data_names))
        else:
            first = data if isinstance(data, str) else next(iter(data.weights), "")
            if first in family.data.mixes:
                first = next(iter(family.data.mixes[first].weights), "")
            source = family.data.sources.get(first.partition(".")[0])
            allowed = FORMATS.get(stage.kind, ())
            if source is not None and allowed and format_of(source) not in allowed:
                yield spec.problem((*path, "data"), f"{label}.data: '{first}' is of format '{format_of(source)}', kind '{stage.kind}' reads {' or '.join(allowed)}")
        if isinstance(stage, Distill):
            yield from _model_ref(spec, stage.teacher, (*path, "teacher"), f"{label}.teacher", None)
        for key in stage.by:
            if key not in family.sizes and key not in family.groups and key not in family.backends:
                yield spec.problem((*path, "by", key), f"{label}.by: no size, group or backend is called '{key}'", did_you_mean(key, {**family.sizes, **family.groups, **family.backends}), key=True)
        if isinstance(stage, Training) and stage.batch_tokens and stage.batch_tokens % (stage.context or family.arch.context):
            yield spec.problem((*path, "batch_tokens"), f"{label}.batch_tokens: {stage.batch_tokens} is not a whole number of rows of {stage.context or family.arch.context} tokens", f"for example {max(1, round(stage.batch_tokens / (stage.context or family.arch.context))) * (stage.context or family.arch.context)}")


def _cycles(spec: Spec) -> Iterator[Problem]:
    """Edges between stages by from, teacher and generated data, at each size."""
    family = spec.family

    def target(ref: str, size: str) -> tuple[str, str] | None:
        name, at = split_ref(ref, size)
        stage = name if name in family.stages else family.stage_of(name, at) if name in family.variants else None
        return (at, stage) if stage in family.stages and at in family.sizes else None

    def edges(node: tuple[str, str]) -> Iterator[tuple[tuple[str, str], tuple[str | int, ...], str]]:
        size, name = node
        stage = family.stages[name]
        refs = [(stage.from_, "from"), (getattr(stage, "teacher", None), "teacher")]
        for ref, key in refs:
            if ref and (to := target(ref, size)):
                yield to, ("stages", name, key), key
        data = getattr(stage, "data", None)
        mix = data if isinstance(data, Mix) else family.data.mixes.get(data) if data else None
        names = [k.partition(".")[0] for k in mix.weights] if mix else [data] if data else []
        seen: set[str] = set()
        while names:
            source_name = names.pop()
            source = family.data.sources.get(source_name or "")
            if source is None or source_name in seen:
                continue
            seen.add(str(source_name))
            if source.from_:
                names.append(source.from_)
            if source.by and (to := target(source.by, next(iter(family.sizes)))):
                yield to, ("data", "sources", str(source_name), "by"), f"data '{source_name}'"

    state: dict[tuple[str, str], int] = {}
    told: set[frozenset[str]] = set()
    for size in family.sizes:
        for name in family.stages:
            stack: list[tuple[tuple[str, str], Iterator[tuple[tuple[str, str], tuple[str | int, ...], str]]]] = []
            if state.get((size, name)):
                continue
            state[(size, name)] = 1
            stack.append(((size, name), edges((size, name))))
            while stack:
                node, rest = stack[-1]
                step = next(rest, None)
                if step is None:
                    state[node] = 2
                    stack.pop()
                    continue
                to, path, key = step
                if state.get(to) == 1:
                    chain = [n for n, _ in stack]
                    loop = [f"{s}/{n}" for s, n in chain[chain.index(to) :]]
                    if frozenset(loop) not in told and not (len(loop) == 1 and key == "from" and "@" not in str(family.stages[name].from_)):
                        told.add(frozenset(loop))
                        what = "data is needed before the step that makes it" if key.startswith("data") else "a step would need itself"
                        yield spec.problem(path, f"{what}: {' <- '.join([*loop, loop[0]])}", f"cut it at '{path[-1]}'")
                elif not state.get(to):
                    state[to] = 1
                    stack.append((to, edges(to)))
    for name, source in family.data.sources.items():
        chain_names, current = [name], source.from_
        while current and current in family.data.sources and current not in chain_names:
            chain_names.append(current)
            current = family.data.sources[current].from_
        if current == name:
            yield spec.problem(("data", "sources", name, "from"), f"data.sources: {' <- '.join([*chain_names, name])} goes in a circle")


def _variants(spec: Spec) -> Iterator[Problem]:
    family = spec.family
    suites = {**family.evals, **others.SUITES}
    for name, variant in family.variants.items():
        path = ("variants", name)
        yield from _size_names(spec, variant.sizes, (*path, "sizes"), f"variants.{name}.sizes")
        stages = {"": variant.stage} if isinstance(variant.stage, str) else variant.stage
        for where, stage in stages.items():
            spot = (*path, "stage", where) if where else (*path, "stage")
            if stage not in family.stages:
                yield spec.problem(spot, f"variants.{name}: no stage is called '{stage}'", did_you_mean(stage, family.stages))
            if where and where not in family.sizes and where not in family.groups:
                yield spec.problem(spot, f"variants.{name}.stage: no size or group is called '{where}'", did_you_mean(where, {**family.sizes, **family.groups}), key=True)
        for size in family.sizes_of(variant.sizes):
            if family.stage_of(name, size) is None:
                yield spec.problem((*path, "stage"), f"variants.{name}: size '{size}' has no stage", f"add '{size}' to variants.{name}.stage", key=True)
        if variant.eval is not None and variant.eval not in suites:
            yield spec.problem((*path, "eval"), f"variants.{name}.eval: unknown suite '{variant.eval}'", did_you_mean(variant.eval, suites))


def _size_names(spec: Spec, sizes: str | tuple[str, ...], path: tuple[str | int, ...], label: str) -> Iterator[Problem]:
    family = spec.family
    names = (sizes,) if isinstance(sizes, str) else sizes
    if not names:
        yield spec.problem(path, f"{label} is empty", "write all, a group, or a list of sizes")
    for name in names:
        if name != "all" and name not in family.sizes and name not in family.groups:
            yield spec.problem(path, f"{label}: no size or group is called '{name}'", did_you_mean(name, {**family.sizes, **family.groups, "all": 0}))


def _evals(spec: Spec) -> Iterator[Problem]:
    family = spec.family
    for suite, tasks in family.evals.items():
        for index, task in enumerate(tasks):
            path = ("evals", suite, index)
            if task.task == "lm_eval" and not task.tasks:
                yield spec.problem(path, f"evals.{suite}: task 'lm_eval' needs 'tasks'", "for example [arc_easy]")
            if task.task != "lm_eval" and task.tasks:
                yield spec.problem((*path, "tasks"), f"evals.{suite}: 'tasks' is only for lm_eval", key=True)
            if task.data is None:
                continue
            source = family.data.sources.get(task.data)
            if source is None:
                yield spec.problem((*path, "data"), f"evals.{suite}: no source is called '{task.data}'", did_you_mean(task.data, family.data.sources))
                continue
            wanted = others.FORMATS.get(task.task)
            if wanted and format_of(source) != wanted:
                yield spec.problem((*path, "data"), f"evals.{suite}: '{task.task}' reads {wanted}, '{task.data}' is of format '{format_of(source)}'")
            if source.heldout.fraction == 0:
                yield spec.problem((*path, "data"), f"evals.{suite}: '{task.data}' keeps nothing back (heldout.fraction is 0)", "evaluations read the held-out part")


def _exports(spec: Spec) -> Iterator[Problem]:
    family = spec.family
    for index, export in enumerate(family.exports):
        path = ("exports", index)
        label = f"exports.{index}"
        for position, variant in enumerate(export.variants):
            if variant not in family.variants:
                yield spec.problem((*path, "variants", position), f"{label}: no variant is called '{variant}'", did_you_mean(variant, family.variants))
        yield from _size_names(spec, export.sizes, (*path, "sizes"), f"{label}.sizes")
        known = [quant for fmt, quant in others.EXPORTS if fmt == export.format and quant != "*"]
        for quant in export.quant:
            if known and quant not in known:
                yield spec.problem((*path, "quant"), f"{label}: {export.format} has no '{quant}'", did_you_mean(quant, known))
        if export.bits is not None and export.format not in ("gptq", "awq"):
            yield spec.problem((*path, "bits"), f"{label}: 'bits' is for gptq and awq; {export.format} takes 'quant'", key=True)
        if export.calibrate is not None:
            names = {**family.data.mixes, **family.data.sources}
            if export.calibrate.data not in names:
                yield spec.problem((*path, "calibrate", "data"), f"{label}.calibrate: no mix or source is called '{export.calibrate.data}'", did_you_mean(export.calibrate.data, names))
            if export.format not in ("gptq", "awq"):
                yield spec.problem((*path, "calibrate"), f"{label}: {export.format} is not calibrated", "calibrate is for gptq and awq", key=True)
        for target in export.target:
            if target not in family.targets and target not in BUILTIN_TARGETS:
                yield spec.problem((*path, "target"), f"{label}: unknown target '{target}'", did_you_mean(target, (*family.targets, *BUILTIN_TARGETS)))


def _supported(spec: Spec) -> Iterator[Problem]:
    """Exports that an architecture can't have, and exports that do not fit their target."""
    family = spec.family
    for index, export in enumerate(family.exports):
        for size in family.sizes_of(export.sizes):
            if not any(family.stage_of(v, size) for v in export.variants):
                continue
            shape = shape_of(family, size)
            for quant in export.quant or others.DEFAULT_QUANT[export.format]:
                archs = others.EXPORTS.get((export.format, quant), frozenset())
                if archs and shape.arch not in archs:
                    near = [f"{f} {q}" for (f, q), a in others.EXPORTS.items() if shape.arch in a]
                    yield spec.problem(("exports", index, "format"), f"exports.{index}: {export.format} {quant} does not support architecture '{shape.arch}' (size {size})", f"supported: {', '.join(near)}")
                for name in export.target:
                    target = family.targets.get(name)
                    if target is None:
                        continue
                    kv = inference(shape, 1, min(target.context, shape.context)).kv_cache
                    needed = others.export_bytes(count(shape).total, quant) + kv
                    if needed > target.memory:
                        fits = [
                            other for other in family.sizes
                            if others.export_bytes(count(shape_of(family, other)).total, quant)
                            + inference(shape_of(family, other), 1, min(target.context, shape_of(family, other).context)).kv_cache <= target.memory
                        ]  # fmt: skip
                        hint = f"largest size that fits: {fits[-1]}" if fits else "no size of the family fits"
                        yield spec.problem(("exports", index, "target"), f"exports.{index}: {size} as {export.format} {quant} needs {needed / 1e9:.2f} GB, target '{name}' has {target.memory / 1e9:.2f} GB", hint)


def _gates(spec: Spec) -> Iterator[Problem]:
    family = spec.family
    suites = {**family.evals, **others.SUITES}
    for index, gate in enumerate(family.gates):
        path = ("gates", index)
        label = f"gates.{index}"
        if not _conditions(gate):
            yield spec.problem(path, f"{label} states no condition", "write one of parity, max_drop, require, beats, monotonic")
        for key, suite in (("suite", gate.suite), ("monotonic", gate.monotonic)):
            if suite is not None and suite not in suites:
                yield spec.problem((*path, key), f"{label}: unknown suite '{suite}'", did_you_mean(suite, suites))
        if gate.monotonic and gate.across is None:
            yield spec.problem((*path, "monotonic"), f"{label}: 'monotonic' needs 'across: sizes'", key=True)
        if gate.across and not gate.monotonic:
            yield spec.problem((*path, "across"), f"{label}: 'across' needs 'monotonic: SUITE'", key=True)
        if gate.within is not None and not gate.beats:
            yield spec.problem((*path, "within"), f"{label}: 'within' needs 'beats'", key=True)
        if gate.beats is not None:
            yield from _model_ref(spec, gate.beats, (*path, "beats"), f"{label}.beats", None)
        for metric in gate.metrics:
            if metric not in others.HIGHER_IS_BETTER:
                yield spec.problem((*path, "metrics"), f"{label}: unknown metric '{metric}'", did_you_mean(metric, others.HIGHER_IS_BETTER))
        for metric, bound in (gate.require or {}).items():
            if metric not in others.HIGHER_IS_BETTER:
                yield spec.problem((*path, "require", metric), f"{label}: unknown metric '{metric}'", did_you_mean(metric, others.HIGHER_IS_BETTER), key=True)
            if bound.min is None and bound.max is None:
                yield spec.problem((*path, "require", metric), f"{label}: '{metric}' needs min or max", key=True)
            if bound.min is not None and bound.max is not None and bound.min > bound.max:
                yield spec.problem((*path, "require", metric), f"{label}: '{metric}' can't be at least {bound.min:g} and at most {bound.max:g}", key=True)


def _conditions(gate: Gate) -> int:
    return sum(x is not None for x in (gate.parity, gate.max_drop, gate.require, gate.beats, gate.monotonic))


def _backends(spec: Spec) -> Iterator[Problem]:
    family = spec.family
    for name, use in family.backends.items():
        path = ("backends", name)
        if use.gpu is not None and use.cpu is not None:
            yield spec.problem((*path, "cpu"), f"backends.{name}: 'gpu' and 'cpu' exclude each other", key=True)
        for key, chip in (("gpu", use.gpu), ("use", use.use)):
            if chip is None:
                continue
            try:
                accelerator = load_accelerator(chip, spec.folder)
            except UnknownAccelerator as error:
                yield spec.problem((*path, key), f"backends.{name}: no backend is called '{chip}'", did_you_mean(chip, error.candidates))
            except ValueError as error:
                yield spec.problem((*path, key), f"backends.{name}: {chip}: {str(error).splitlines()[0]}")
            else:
                if key == "gpu" and accelerator.kind != "gpu":
                    yield spec.problem((*path, key), f"backends.{name}: '{chip}' is no GPU", "write it under 'use'")
    for pattern, backend in family.place.items():
        if backend not in family.backends:
            yield spec.problem(("place", pattern), f"place: no backend is called '{backend}'", did_you_mean(backend, family.backends))


def _release(spec: Spec) -> Iterator[Problem]:
    known = ("family", "org", "size", "variant", "-variant", "export", "-export")
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(spec.family.release.repo) if field is not None]
    except ValueError as error:
        yield spec.problem(("release", "repo"), f"release.repo: {error}")
        return
    for field in fields:
        if field not in known:
            yield spec.problem(("release", "repo"), f"release.repo: unknown field '{{{field}}}'", did_you_mean(field, known))
    variants = [n for n in spec.family.variants if n != "base"]
    if not {"variant", "-variant"} & set(fields) and variants:
        yield spec.problem(("release", "repo"), "release.repo: without {variant} all variants of a size would have one name", "write {family}-{size}{-variant}")
    if "size" not in fields and len(spec.family.sizes) > 1:
        yield spec.problem(("release", "repo"), "release.repo: without {size} all sizes would have one name", "write {family}-{size}{-variant}")
    parts = spec.family.release.path.replace("\\", "/").split("/")
    if spec.family.release.path.startswith("/") or ".." in parts:
        yield spec.problem(("release", "path"), f"release.path: '{spec.family.release.path}' leaves the output folder", "use a folder name")


def _positions(spec: Spec) -> Iterator[Problem]:
    """A context beyond the positions of the model that a stage starts from."""
    family, names = spec.family, Names(spec)
    for name, stage in family.stages.items():
        if not isinstance(stage, Training) or not stage.context:
            continue
        reach = family.arch.context
        for ancestor in reversed(names.lineage(name)):
            spec_of = family.stages[ancestor]
            if isinstance(spec_of, Training) and spec_of.rope_theta and spec_of.context:
                reach = max(reach, spec_of.context)
        if stage.context > reach:
            yield spec.problem(("stages", name, "context"), f"stages.{name}.context: {stage.context} is beyond the {reach} positions of the model", "set rope_theta as well to extend them, or raise arch.context")
    for name, stage in family.stages.items():
        data = getattr(stage, "data", None)
        if isinstance(stage, Training) and stage.kind == "pretrain" and data is not None:
            _, mix, _ = names.mix_of(name, data)
            if mix.tokens is not None and mix.tokens < (stage.context or family.arch.context):
                yield spec.problem(("stages", name, "data"), f"stages.{name}.data: {mix.tokens} tokens are less than one row of {stage.context or family.arch.context}")


def _teachers(spec: Spec) -> Iterator[Problem]:
    """A teacher, or a parent, with another vocabulary than the family's."""
    import json

    family = spec.family
    rows = vocab_rows(family)
    for name, stage in family.stages.items():
        if not isinstance(stage, Adopt) or not stage.path:
            continue
        config = spec.folder / stage.path / "config.json"
        if not config.is_file():
            continue
        try:
            values = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            yield spec.problem(("stages", name, "path"), f"stages.{name}: {config} can't be read: {error}")
            continue
        if values.get("vocab_size") != rows:
            users = [n for n, s in family.stages.items() if isinstance(s, Distill) and s.teacher.partition("@")[0] == name]
            what = f"stages.{users[0]}.teacher: '{name}' has another vocabulary" if users else f"stages.{name}: another vocabulary"
            path = ("stages", users[0], "teacher") if users else ("stages", name, "path")
            yield spec.problem(path, f"{what}: {values.get('vocab_size')} rows, the family has {rows}", "adopt its tokenizer and set arch.vocab_pad")


Rule = Callable[[Spec], Iterator[Problem]]
# each rule stands alone on a spec whose sections are valid …
RULES: tuple[Rule, ...] = (_sizes, _tokenizer, _sources, _mixes, _stages, _cycles, _variants, _evals, _exports, _gates, _backends, _release)
# … and these follow names, which must all be known
AFTER: tuple[Rule, ...] = (_positions, _supported, _teachers)
