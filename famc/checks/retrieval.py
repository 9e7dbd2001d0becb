"""Embedders and rerankers: where they begin, what they compare, who finds their negatives, and what they must not lose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from famc.checks.names import Names, model_ref, safe_shape, split_ref
from famc.cost.shape import DECODERS, ENCODERS, Shape
from famc.errors import did_you_mean
from famc.spec.load import Spec
from famc.spec.text import Path
from famc.spec.words import Fault, label
from famc.steps.base import Amount, Setting
from famc.steps.embed import Embed
from famc.steps.rerank import LOSSES, Rerank
from famc.steps.retrieval import Contrastive

BOTH_WAYS = ("qwen3",)  # decoders that transformers can make see what follows
# what a stage must say anew where the one that it continues has it: how texts are read is no weight that is inherited
SAID_ANEW: Mapping[str, tuple[str, ...]] = {
    "embed": ("prompts", "pooling", "text", "bidirectional"),
    "rerank": ("text",),
}
AGENTS = {"embed": "embedders", "rerank": "rerankers"}
Wrong = tuple[Path, str, str, bool]  # (field, what is wrong, what to do, whether its key is meant)
NO_START: Mapping[str, Wrong] = {
    kind: ((), f"kind '{kind}' starts from a trained model: 'from' is missing", f"write it, or lexical: {{}} to begin {how} (bert)", True)
    for kind, how in (("embed", "as a bag of words"), ("rerank", "with the query's words"))
}  # fmt: skip


# --- what a stage says, wherever it runs --------------------------------------------------------------------


def embedders(spec: Spec) -> Iterator[Fault]:
    """Where an embedder begins, and which of its values fit each other, and its shape."""
    yield from _told(spec, Embed, _embed)
    yield from _teachers(spec, "embed")
    yield from _at_sizes(spec, Embed, _embed_at)


def rerankers(spec: Spec) -> Iterator[Fault]:
    """Losses of the objective, teachers where they teach, heads that the architecture has."""
    yield from _told(spec, Rerank, _rerank)
    yield from _teachers(spec, "rerank")
    yield from _at_sizes(spec, Rerank, _rerank_at)


def _embed(stage: Contrastive) -> Iterator[Wrong]:
    assert isinstance(stage, Embed)
    yield from _begins(stage)
    if stage.lexical is not None and stage.pooling not in (None, "cls"):
        what = "a lexical start gathers the words in the first token"
        yield ("pooling",), f"{what}, which '{stage.pooling}' does not read", "leave it out", False
    if stage.teacher is None and "alpha" in stage.model_fields_set:
        yield ("alpha",), "the weight of a teacher, and there is none", "set teacher, or remove it", True


def _begins(stage: Embed | Rerank) -> Iterator[Wrong]:
    """With a parent, or with words; not with both."""
    somewhere = any("lexical" in values for values in stage.by.values())  # told at the sizes that lack it
    if stage.from_ is None and stage.lexical is None and not somewhere:
        yield NO_START[stage.kind]
    if stage.lexical is not None and stage.from_ is not None:
        yield ("lexical",), "a lexical start has no parent, and 'from' names one", "keep one", True


def _rerank(stage: Contrastive) -> Iterator[Wrong]:
    assert isinstance(stage, Rerank)
    yield from _begins(stage)
    if stage.loss is not None and stage.loss not in LOSSES[stage.objective]:
        what = f"'{stage.loss}' is no loss of objective '{stage.objective}'"
        yield ("loss",), what, f"it has {', '.join(LOSSES[stage.objective])}", False
    if stage.objective == "distill" and stage.teacher is None:
        yield ("objective",), "'distill' needs 'teacher'", "a reranker: variant@size or stage@size", False
    if stage.objective != "distill" and stage.teacher is not None:
        what = f"objective '{stage.objective}' reads no teacher"
        yield ("teacher",), what, "set objective: distill", True


def _told(
    spec: Spec, kind: type[Contrastive], rule: Callable[[Contrastive], Iterator[Wrong]]
) -> Iterator[Fault]:
    """What a rule finds wrong in each stage of a kind; in `by` only what is not wrong without it."""
    for name, stage in spec.family.stages.items():
        if not isinstance(stage, kind):
            continue
        plain = list(rule(stage))
        yield from (_fault(("stages", name), wrong) for wrong in plain)
        if spec.touched("stages", name):
            continue
        for key, values in stage.by.items():
            view = Names(spec).overridden(name, (key,))
            assert isinstance(view, kind)
            for wrong in rule(view):
                if wrong not in plain:
                    above: Path = ("stages", name, "by", key)
                    yield _fault(above if wrong[0][0] in values else above[:2], wrong)


def _fault(above: Path, wrong: Wrong) -> Fault:
    field, what, hint, key = wrong
    path = (*above, *field)
    return Fault(path, f"{label((*above, *field[:1]))}: {what}", hint, key=key)


def _teachers(spec: Spec, kind: str) -> Iterator[Fault]:
    """Teachers of another kind than who learns from them: what they give is no vector, or no score."""
    family, names = spec.family, Names(spec)
    for name, stage in family.stages.items():
        if stage.kind != kind or spec.touched("stages", name):
            continue
        told: set[Path] = set()
        for size in family.sizes:
            teacher = getattr(names.stage_at(name, size), "teacher", None)
            target = names.target(teacher, size) if teacher else None
            path = _where(names, name, size, "teacher")
            if target is None or family.stages[target[1]].kind == kind or path in told:
                continue
            told.add(path)
            other = family.stages[target[1]].kind
            what = f"'{teacher}' is of kind '{other}', and {AGENTS[kind]} learn from {AGENTS[kind]}"
            fitting = [n for n, s in family.stages.items() if s.kind == kind and n != name]
            yield Fault(path, f"{label(path)}: {what}", did_you_mean("", fitting))


# --- what a stage says at a size ----------------------------------------------------------------------------


def _embed_at(stage: Contrastive, size: str, shape: Shape) -> Iterator[Wrong]:
    assert isinstance(stage, Embed)
    arch = shape.arch
    if stage.from_ is None and stage.lexical is None:
        yield NO_START["embed"]
    for index, dim in enumerate(stage.mrl):
        if dim > shape.hidden:
            what = f"{dim} dimensions are more than the {shape.hidden} of size '{size}'"
            yield ("mrl", index), what, f"at most {shape.hidden}", False
    if stage.lexical is not None and arch != "bert":
        what = f"only bert can begin as a bag of words, and size '{size}' is a {arch}"
        yield ("lexical",), what, "start from a trained model: set 'from'", True
    if stage.bidirectional and arch not in BOTH_WAYS:
        why = "sees both ways already" if arch in ENCODERS else "can't be made to see what follows"
        yield ("bidirectional",), f"{arch} {why} (size {size})", f"it is for {', '.join(BOTH_WAYS)}", False
    if stage.pooling == "cls" and arch in DECODERS:
        what = f"the first token of a {arch} has seen nothing (size {size})"
        yield ("pooling",), what, "last, or mean", False


def _rerank_at(stage: Contrastive, size: str, shape: Shape) -> Iterator[Wrong]:
    assert isinstance(stage, Rerank)
    if stage.from_ is None and stage.lexical is None:
        yield NO_START["rerank"]
    if stage.lexical is not None:
        wants, has = "a bert with 2 or more layers, 1 head and hidden 32 or more", f"size '{size}' has"
        if shape.arch != "bert" or shape.layers < 2 or shape.heads != 1 or shape.hidden < 32:
            what = f"a lexical start needs {wants}; {has} {shape.layers} layers, {shape.heads} heads, hidden {shape.hidden} ({shape.arch})"
            yield ("lexical",), what, "give the size arch: bert, layers: 2, heads: 1", True
    if stage.head == "yes_no" and shape.arch in ENCODERS:
        yield ("head",), f"a {shape.arch} says no next token (size {size})", "use classifier", False


def _at_sizes(
    spec: Spec, kind: type[Contrastive], rule: Callable[[Contrastive, str, Shape], Iterator[Wrong]]
) -> Iterator[Fault]:
    """What a rule finds wrong with a stage at the sizes that need it; each place is told once."""
    names, told = Names(spec), set()
    for size, name in _needed(spec, kind):
        stage, shape = names.stage_at(name, size), safe_shape(spec, size)
        if shape is None or not isinstance(stage, kind):
            continue
        for wrong in rule(stage, size, shape):
            field = wrong[0]
            above = _where(names, name, size, str(field[0]))[:-1] if field else ("stages", name)
            if (above, field) not in told:
                told.add((above, field))
                yield _fault(above, wrong)


def _needed(spec: Spec, kind: type[Contrastive]) -> Iterator[tuple[str, str]]:
    """(size, stage) of a kind that some variant publishes, starts from, learns from, or has its negatives from."""
    family, names = spec.family, Names(spec)
    if not any(isinstance(stage, kind) for stage in family.stages.values()):
        return
    todo = [
        (size, published)
        for variant, v in family.variants.items()
        for size in family.sizes_of(v.sizes)
        if (published := family.stage_of(variant, size)) in family.stages and published is not None
    ]
    met: set[tuple[str, str]] = set()
    for step in todo:  # grows while it is read
        size, name = step
        if step in met or spec.touched("stages", name):
            continue
        met.add(step)
        stage = names.stage_at(name, size)
        if isinstance(stage, kind):
            yield step
        refs = [ref for ref in (stage.from_, getattr(stage, "teacher", None)) if ref]
        reached = [*(names.target(ref, size) for ref in refs), names.miner(stage, size)]
        todo += [to for to in reached if to is not None]


def _where(names: Names, name: str, size: str, field: str) -> Path:
    """Where the value of a field that holds at a size is written."""
    by = names.family.stages[name].by
    keys = [key for key in reversed(names.overrides(name, size)) if field in by[key]]
    return ("stages", name, "by", keys[0], field) if keys else ("stages", name, field)


# --- between stages -----------------------------------------------------------------------------------------


def negatives(spec: Spec) -> Iterator[Fault]:
    """Who mines: an embedder that is there, or bm25."""
    family, names = spec.family, Names(spec)
    for name, stage in family.stages.items():
        if not isinstance(stage, Contrastive) or spec.touched("stages", name):
            continue
        yield from _miner(spec, stage, ("stages", name, "hard_negatives", "by"))
        for key, values in stage.by.items():
            changed = values.get("hard_negatives")
            if isinstance(changed, Mapping) and "by" in changed:
                path: Path = ("stages", name, "by", key, "hard_negatives", "by")
                yield from _miner(spec, names.overridden(name, (key,)), path)
    told: set[Path] = set()
    for size, name in _needed(spec, Contrastive):
        wanted = getattr(names.stage_at(name, size), "hard_negatives", None)
        if wanted is None or wanted.by in (None, "bm25"):
            continue
        ref, at = split_ref(wanted.by, size)
        made = [s for s in family.sizes if family.stage_of(ref, s)] if ref in family.variants else []
        path = (*_where(names, name, size, "hard_negatives"), "by")
        if made and at in family.sizes and at not in made and ref not in family.stages and path not in told:
            told.add(path)
            message = f"{label(path)}: variant '{ref}' is not made at size '{at}'"
            yield Fault(path, message, f"write {ref}@{made[0]}")


def _miner(spec: Spec, stage: Any, path: Path) -> Iterator[Fault]:
    """A name that means nothing, or a model that is no embedder."""
    family, names, where = spec.family, Names(spec), label(path)
    by = stage.hard_negatives.by if stage.hard_negatives else None
    if by is None or by == "bm25":
        return
    yield from model_ref(spec, by, path, where)
    made = (names.target(by, size) for size in family.sizes)
    kinds = {family.stages[to[1]].kind for to in made if to and not spec.touched("stages", to[1])}
    if others := sorted(kinds - {"embed"}):
        embedding = [name for name, one in family.stages.items() if one.kind == "embed"]
        message = f"{where}: '{by}' is of kind '{others[0]}', and embedders mine"
        yield Fault(path, message, did_you_mean("", [*embedding, "bm25"]))


def inherited(spec: Spec) -> Iterator[Fault]:
    """A stage that continues an embedder, and would read its texts in another way because it says nothing."""
    names = Names(spec)
    told: set[Path] = set()
    for size, name in _needed(spec, Contrastive):
        stage, shape = names.stage_at(name, size), safe_shape(spec, size)
        to = names.target(stage.from_, size) if stage.from_ else None
        if to is None or shape is None or spec.touched("stages", to[1]):
            continue
        parent = names.stage_at(to[1], to[0])
        for field in SAID_ANEW[stage.kind]:
            path: Path = ("stages", name, field)
            if field in stage.model_fields_set or not hasattr(parent, field) or path in told:
                continue
            theirs, ours = _value(parent, field, shape), _value(stage, field, shape)
            if theirs != ours:
                told.add(path)
                message = f"stages.{name}: '{to[1]}' was trained with {field}"
                hint = f"write {field}: {_shown(theirs)}"
                if field == "prompts":
                    message, hint = f"{message}, and this stage has none", "write the same, or prompts: {}"
                else:
                    message += f" {_shown(theirs)}, and this stage would have {_shown(ours)}"
                yield Fault(("stages", name), message, hint, key=True)


def _value(stage: Any, field: str, shape: Shape) -> Any:
    """What a field comes to at a shape."""
    value = getattr(stage, field)
    if value is None and field in stage.DEFAULTS:
        value, _ = stage.DEFAULTS[field](stage, Setting(shape, 0, Amount(0.0, 0.0)))
    return value


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
