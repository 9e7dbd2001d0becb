"""Spec -> Graph: only the steps that some variant, teacher, gate or generated source needs, each once.

In: a checked Spec. Out: Graph, whose nodes carry every concrete value and where it came from. Pure, but
for reading the names, sizes and times of local data files. `inputs` bear identity; `after` is order only
(a gate before a release).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from famc.checks import Names, check, split_ref
from famc.cost.parameters import count
from famc.cost.shape import Shape
from famc.errors import Problem, SpecError, did_you_mean
from famc.spec.family import EvalTask, Export, Gate, Mix, StageSpec
from famc.spec.load import Spec, draft, rehearsal
from famc.spec.text import Path as Where
from famc.steps import KINDS, STAGES, others
from famc.steps.adopt import Adopt
from famc.steps.base import RUNTIME, Amount, Setting, Training, Work
from famc.steps.corpus import amount as corpus_amount
from famc.steps.corpus import work as corpus_work
from famc.steps.mixes import Wanted, mix_amount, mix_params, source_params
from famc.steps.shapes import shape_of
from famc.steps.trained import train_work


@dataclass(frozen=True)
class Node:
    """One step. `params` bear identity; `runtime` moves work around; `origins` say where values came from."""

    name: str
    kind: str
    size: str | None = None
    variant: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    runtime: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    shape: Shape | None = None
    work: Work = Work()
    backend: str | None = None
    missing: tuple[str, ...] = ()  # what is needed to run and is not on this machine

    @property
    def needs(self) -> tuple[str, ...]:
        """All steps that must be done before, in a stable order."""
        return tuple(dict.fromkeys((*self.inputs.values(), *self.after)))


@dataclass(frozen=True)
class Graph:
    """Steps in an order in which each stands after what it needs."""

    nodes: Mapping[str, Node]
    spec: Spec

    @cached_property
    def followers(self) -> dict[str, list[str]]:
        """For each step, those that need it."""
        result: dict[str, list[str]] = {name: [] for name in self.nodes}
        for node in self.nodes.values():
            for need in node.needs:
                result[need].append(node.name)
        return result

    def networkx(self) -> Any:
        """The graph as networkx.DiGraph: kinds and sizes on nodes, roles on edges. Imported here: it takes
        0.15 s.
        """
        import networkx

        graph = networkx.DiGraph()
        for node in self.nodes.values():
            graph.add_node(node.name, kind=node.kind, size=node.size, variant=node.variant)
        for node in self.nodes.values():
            for role, need in node.inputs.items():
                graph.add_edge(need, node.name, role=role, identity=True)
            for need in node.after:
                if not graph.has_edge(need, node.name):
                    graph.add_edge(need, node.name, role="after", identity=False)
        return graph

    def closure(self, names: Iterable[str], *, up: bool) -> set[str]:
        """The steps named and all that they need (up) or that needs them (down)."""
        todo, seen = list(names), set()
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo.extend(self.nodes[name].needs if up else self.followers[name])
        return seen


def open_family(
    file: Path, *, profile: str | None = None, sets: Sequence[str] = (), smoke: bool = False
) -> Graph:
    """A spec's file -> its graph. Raises SpecError with every mistake in it at once."""
    return resolve(draft(file, STAGES, profile=profile, sets=sets, smoke=smoke))


def resolve(spec: Spec) -> Graph:
    """The graph of a spec, mistakes and all as `draft` left it. Raises SpecError with every mistake.

    For a rehearsal the spec is checked as it is written, and made small afterwards.
    """
    problems = check(spec)
    if problems:
        raise SpecError(problems)
    if spec.smoke and spec.full is None:
        spec = rehearsal(spec, STAGES)
    builder = _Builder(spec)
    builder.build()
    problems = _unmatched(spec, builder.nodes, builder.gated)
    if problems:
        raise SpecError(problems)
    return Graph(_ordered(builder.nodes), spec)


class _Builder:
    """Follows names from what is published to what it needs. One instance a resolve."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.family = spec.family
        self.names = Names(spec)
        self.nodes: dict[str, Node] = {}
        self.written: dict[tuple[str, tuple[str, ...]], dict[str, str]] = {}
        self.published: dict[tuple[str, str], list[str]] = {}  # nodes by size and variant
        self.gated: set[int] = set()  # gates of the spec that became steps
        self.shapes = {size: shape_of(spec.family, size) for size in spec.family.sizes}
        self.params = {size: count(shape).total for size, shape in self.shapes.items()}
        full = spec.full or spec.family  # a rehearsal compares the sizes that the whole family would
        self.rank = {size: count(shape_of(full, size)).total for size in full.sizes}

    # --- what is published ----------------------------------------------------------------------------------

    def build(self) -> None:
        published: list[tuple[str, str]] = []
        for variant, v in self.family.variants.items():
            for size in self.family.sizes_of(v.sizes):
                self.stage(size, self.names.stage_of(variant, size))
                if v.eval:
                    self.eval(size, variant, v.eval)
                published.append((size, variant))
        gates = {(size, variant): self.gates(size, variant) for size, variant in published}
        exports: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
        for export in self.family.exports:
            for variant in export.variants:
                for size in self.family.sizes_of(export.sizes):
                    if (size, variant) in published:
                        made = self.export(size, variant, export, tuple(gates[size, variant]))
                        exports.setdefault((size, variant), []).extend(made)
        for size, variant in published:
            made_here = list({item[0]: item for item in exports.get((size, variant), [])}.values())
            checked = self.export_gates(size, variant, made_here)
            self.release(size, variant, [item[0] for item in made_here], [*gates[size, variant], *checked])
        for size, variant in published:
            self.guard(size, variant)

    def guard(self, size: str, variant: str) -> None:
        """What trains from a variant waits for the gates on the variant's own figures: nothing is spent on a
        base that failed. Comparisons (beats, monotonic) guard publication only: they may need what comes
        later.
        """
        model = self.model(variant, size)
        here = (self.nodes[name] for name in self.published[size, variant])
        own = [n for n in here if n.kind == "gate" and "require" in n.params and "beats" not in n.inputs]
        for gate in own:
            above = self.above(gate.name)
            for node in list(self.nodes.values()):
                trains = "model" in node.inputs and node.kind in STAGES and node.inputs["model"] == model
                if trains and node.name not in above and gate.name not in node.after:
                    self.nodes[node.name] = _replace(node, after=(*node.after, gate.name))

    def above(self, name: str) -> set[str]:
        """A step and all that it needs."""
        todo, seen = [name], set()
        while todo:
            current = todo.pop()
            if current not in seen:
                seen.add(current)
                todo += self.nodes[current].needs
        return seen

    def add(self, node: Node) -> str:
        if node.name in self.nodes:
            return node.name
        backend = self.names.backend(node.name)
        self.nodes[node.name] = node if backend is None else _replace(node, backend=backend)
        if node.size and node.variant:
            self.published.setdefault((node.size, node.variant), []).append(node.name)
        return node.name

    # --- stages ---------------------------------------------------------------------------------------------

    def stage(self, size: str, stage: str) -> str:
        """The node of a stage at a size, made with all it needs."""
        name = f"{size}/{stage}"
        if name in self.nodes:
            return name
        spec, origins = self.stage_at(size, stage)
        if isinstance(spec, Adopt):
            return self.add(self.adopt(name, size, spec, origins))
        assert isinstance(spec, Training)
        shape = self.shapes[size]
        inputs: dict[str, str] = {"tokenizer": self.tokenizer()}
        if spec.from_:
            inputs["model"] = self.model(spec.from_, size)
        if spec.data is not None:
            own = [k for k in self.names.overrides(stage, size) if "data" in spec.by[k]]
            data_name, mix, fmt = self.names.mix_of(".".join([stage, *own[-1:]]), spec.data)
            inputs["data"] = self.mix(data_name, mix, fmt)
            data = mix_amount(self.family, mix, fmt, self.source)
        else:
            data = Amount(0.0, 0.0)
        teacher = getattr(spec, "teacher", None)
        if teacher is not None:
            inputs["teacher"] = self.model(teacher, size)
        teacher_shape = self.shapes[self.nodes[inputs["teacher"]].size or size] if teacher is not None else None
        resolved = spec.resolve(Setting(shape, self.params[size], data), origins.get)
        values = dict(resolved.values)
        values["seed"] = self.family.family.seed
        parent = self.nodes[inputs["model"]].params.get("shape") if "model" in inputs else None
        values["shape"] = _shape_values(shape, values, parent)
        for key in ("teacher",):
            values.pop(key, None)
        runtime = {key: values.pop(key) for key in sorted(RUNTIME) if key in values}
        work = train_work(spec, shape, values, data, teacher_shape, self.params[size])
        node = Node(
            name, spec.kind, size, None, values, runtime, resolved.reasons, inputs,
            shape=shape, work=work, missing=self.not_ready(spec.kind, values),
        )  # fmt: skip
        return self.add(node)

    def stage_at(self, size: str, stage: str) -> tuple[StageSpec, dict[str, str]]:
        """A stage with the overrides of the size's groups, backend and own name laid over it; who wrote each
        field.
        """
        keys = tuple(self.names.overrides(stage, size))
        if (stage, keys) not in self.written:
            self.written[stage, keys] = self.origins_of(stage, keys)
        return self.names.stage_at(stage, size), self.written[stage, keys]

    def origins_of(self, stage: str, keys: tuple[str, ...]) -> dict[str, str]:
        """Who wrote each field of a stage, with the overrides of `keys` laid over it."""
        spec = self.family.stages[stage]
        path: Where = ("stages", stage)
        written = {key: self.spec.origin(where) or "" for key, where in _fields(_raw(spec), path)}
        for key in keys:
            for changed, where in _fields(spec.by[key], (*path, "by", key)):
                written[changed] = f"by {key}, {self.spec.origin(where) or ''}"
        return written

    def model(self, ref: str, size: str) -> str:
        """The node that `stage`, `variant`, `stage@size` or `variant@size` means at a size."""
        name, at = split_ref(ref, size)
        stage = name if name in self.family.stages else self.names.stage_of(name, at)
        return self.stage(at, stage)

    def adopt(self, name: str, size: str, spec: Adopt, origins: Mapping[str, str]) -> Node:
        folder = self.spec.folder / spec.path if spec.path else None
        files = self.names.files.listing(folder) if folder else None
        values = {
            "path": str(spec.path) if spec.path else None,
            "files": files.digest if files else None,
            "hf": spec.hf,
            "revision": spec.revision,
            "license": spec.license,
            "shape": _shape_values(self.shapes[size], {}),
        }
        missing = (f"{folder} is not on this machine",) if folder and (files is None or not files.count) else ()
        runtime = {"folder": str(folder.resolve())} if folder else {}
        return Node(
            name, "adopt", size, None, values, runtime, origins, {"tokenizer": self.tokenizer()},
            shape=self.shapes[size], work=others.export_work(self.params[size]), missing=missing,
        )  # fmt: skip

    def not_ready(self, kind: str, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Why this version of famc can plan a step but not run it."""
        missing = []
        if KINDS[kind].worker is None:
            missing.append(f"kind '{kind}' can be planned, but this version of famc has no worker for it")
        if values.get("fim"):
            missing.append("fill-in-the-middle (fim) can be planned, but this version of famc does not train it")
        if values.get("mode") == "on_policy":
            missing.append("on-policy distillation can be planned, but this version of famc does not run it")
        if values.get("modes"):
            missing.append("thinking modes can be planned, but this version of famc does not train them")
        return tuple(missing)

    # --- data -----------------------------------------------------------------------------------------------

    def source(self, name: str) -> Amount:
        return corpus_amount(self.nodes[self.data(name)].params)

    def data(self, name: str) -> str:
        """The corpus node of a source."""
        address = f"data/{name}"
        if address in self.nodes:
            return address
        source = self.family.data.sources[name]
        params, runtime, missing = source_params(self.spec, name, source, self.names.files)
        inputs: dict[str, str] = {}
        if source.from_:
            inputs["from"] = self.data(source.from_)
        if source.by:
            inputs["by"] = self.model(source.by, next(iter(self.family.sizes)))
        return self.add(
            Node(address, "corpus", params=params, runtime=runtime, inputs=inputs, work=corpus_work(params), missing=missing)
        )

    def mix(self, name: str, mix: Mix, fmt: str) -> str:
        """The mix node: decontaminated against the held-out part of every source that an evaluation reads."""
        address = f"mix/{name}"
        if address in self.nodes:
            return address
        sources = list(dict.fromkeys(key.partition(".")[0] for key in mix.weights))
        inputs = {f"source.{s}": self.data(s) for s in sources}
        if fmt == "text" or mix.tokens:
            inputs["tokenizer"] = self.tokenizer()
        wanted = Wanted(tuple(self.names.eval_sources))
        params, missing = mix_params(self.spec, mix, fmt, wanted)
        for other in params["decontaminate"]["against"] if params["decontaminate"] else ():
            inputs[f"eval.{other}"] = self.data(other)
        tokens = mix_amount(self.family, mix, fmt, self.source).tokens
        return self.add(Node(address, "mix", params=params, inputs=inputs, work=others.mix_work(tokens), missing=missing))

    def tokenizer(self) -> str:
        if "tokenizer" in self.nodes:
            return "tokenizer"
        t = self.family.tokenizer
        template, missing = self.names.template()
        inputs: dict[str, str] = {}
        params: dict[str, Any] = {"template": template, "kind": t.kind}
        runtime: dict[str, Any] = {}
        if t.adopt:
            folder = self.spec.folder / t.adopt
            files = self.names.files.listing(folder)
            params |= {"adopt": t.adopt, "files": files.digest if files else None, "bytes": 0, "rows": self.names.rows}
            runtime["folder"] = str(folder.resolve())
            if not files or not files.count:
                missing = (*missing, f"{folder} is not on this machine")
        else:
            assert t.train_on is not None
            _, mix, fmt = self.names.mix_of("tokenizer", t.train_on.mix)
            weights = {s: mix.weights[s] for s in mix.weights}
            for source in dict.fromkeys(key.partition(".")[0] for key in weights):
                inputs[f"source.{source}"] = self.data(source)
            params |= {
                "vocab": t.vocab or self.names.rows,
                "rows": self.names.rows,
                "bytes": t.train_on.bytes,
                "weights": weights,
                "special_tokens": list(others.SPECIAL_TOKENS),
                "seed": self.family.family.seed,
            }
        return self.add(
            Node("tokenizer", "tokenizer", params=params, runtime=runtime, inputs=inputs, work=others.tokenizer_work(params), missing=missing)
        )

    # --- scoring and publishing -----------------------------------------------------------------------------

    def eval(self, size: str, variant: str, suite: str) -> str:
        """The node that scores a variant (or, for comparisons, a stage) on a suite."""
        address = f"{size}/{variant}/eval.{suite}"
        if address in self.nodes:
            return address
        model = self.model(variant, size)
        tasks, missing = self.tasks(suite)
        inputs = {"model": model, "tokenizer": self.tokenizer()}
        if self.nodes[model].kind == "dpo":  # its implicit rewards are log-ratios to what it started from
            inputs["reference"] = self.nodes[model].inputs["model"]
        for task in tasks:
            if task["data"]:
                inputs[f"data.{task['data']}"] = self.data(task["data"])
        shape = self.shapes[size]
        return self.add(
            Node(
                address, "eval", size, variant, {"suite": suite, "tasks": tasks, "context": shape.context}, inputs=inputs,
                shape=shape, work=others.eval_work(shape, tasks), missing=missing,
            )  # fmt: skip
        )

    def tasks(self, suite: str) -> tuple[list[Mapping[str, Any]], tuple[str, ...]]:
        """A suite's tasks with their data, and why it can't run here (if so)."""
        declared = self.family.evals.get(suite)
        tasks: list[Mapping[str, Any]] = []
        missing: list[str] = []
        built_in = () if declared else others.SUITES[suite]
        # a built-in suite may name a task that has no worker yet, which a spec may not
        for task in declared or [EvalTask.model_construct(task=name) for name in built_in]:  # type: ignore[arg-type]
            if task.task not in others.TASKS_READY:
                missing.append(f"evaluation '{task.task}' can be planned, but this version of famc has no worker for it")
            data = task.data or self.names.default_data(suite, task.task)
            if data is None and task.task in others.FORMATS:
                if declared:  # a user asked for it by name
                    missing.append(f"suite '{suite}': no source of format {others.FORMATS[task.task]} for '{task.task}'")
                continue
            tasks.append(
                {
                    "task": task.task,
                    "data": data,
                    "n": task.n or others.EVAL_EXAMPLES.get(task.task),
                    "max_new_tokens": task.max_new_tokens,
                    "tasks": list(task.tasks),
                }
            )
        return tasks, tuple(missing)

    def export(self, size: str, variant: str, export: Export, gates: tuple[str, ...]) -> list[tuple[str, str, str]]:
        """Export and parity nodes: [(export, parity or "", label)]. A variant that fails its gates is not
        exported.
        """
        made = []
        model = self.model(variant, size)
        shape, parameters = self.shapes[size], self.params[size]
        for quant in (*export.quant, *([str(export.bits)] if export.bits else [])) or others.DEFAULT_QUANT[export.format]:
            label = f"{export.format}-{quant}"
            address = f"{size}/{variant}/export.{label}"
            params: dict[str, Any] = {"format": export.format, "quant": quant}
            if quant == "int4" and export.format == "onnx":
                params["block_size"] = export.block_size
            inputs = {"model": model}
            if export.calibrate:
                inputs["data"] = self.mix(*self.names.mix_of("calibrate", export.calibrate.data))
                params["examples"] = export.calibrate.n
            archs = others.EXPORTS.get((export.format, quant), others.EXPORTS.get((export.format, "*"), frozenset()))
            missing = () if archs else (f"format '{export.format}' can be planned, but this version of famc has no worker for it",)
            work = others.export_work(parameters)
            self.add(Node(address, "export", size, variant, params, inputs=inputs, after=gates, shape=shape, work=work, missing=missing))
            parity = ""
            if archs:
                parity = self.parity(size, variant, model, address, label, export.format)
            made.append((address, parity, label))
        return made

    def parity(self, size: str, variant: str, model: str, export: str, label: str, fmt: str) -> str:
        inputs = {"model": model, "export": export, "tokenizer": self.tokenizer()}
        params: dict[str, Any] = {"format": fmt, "context": min(self.shapes[size].context, 512), "texts": 24, "prompts": 8,
                                  "max_new_tokens": 24}  # fmt: skip
        for role, task in (("text", "bits_per_byte"), ("chat", "answers")):
            data = next(
                (d for suite in self.names.suites for d in [self.names.default_data(suite, task)] if d is not None), None
            )
            if data:
                inputs[f"{role}.{data}"] = self.data(data)
        if self.spec.smoke:
            params |= {"texts": 4, "prompts": 2, "max_new_tokens": 4}
        shape = self.shapes[size]
        name = f"{size}/{variant}/parity.{label}"
        return self.add(Node(name, "parity", size, variant, params, inputs=inputs, shape=shape, work=others.parity_work(shape)))

    def gates(self, size: str, variant: str) -> list[str]:
        """Gate nodes on a variant's scores."""
        made: list[str] = []
        for index, gate in enumerate(self.family.gates):
            if matches(gate, size, variant) and not (gate.parity or gate.max_drop):
                inputs = self.gate_inputs(gate, size, variant)
                if inputs is not None:
                    self.gated.add(index)
                    made.append(self.gate(size, variant, f"gate.{gate_name(gate)}", gate, inputs))
        return made

    def export_gates(self, size: str, variant: str, exports: list[tuple[str, str, str]]) -> list[str]:
        """Gate nodes on a variant's exports; an export that the spec says nothing of has famc's own."""
        made: list[str] = []
        gated: set[str] = set()
        for index, gate in enumerate(self.family.gates):
            for export, parity, label in exports:
                if (gate.parity or gate.max_drop) and fnmatch.fnmatchcase(export, gate.match):
                    self.gated.add(index)
                    if parity:
                        made.append(self.gate(size, variant, f"gate.{gate.name or label}", gate, {"parity": parity}))
                        gated.add(export)
        for export, parity, label in exports:
            if parity and export not in gated:
                made.append(self.gate(size, variant, f"gate.{label}", default_gate(label), {"parity": parity}))
        return made

    def gate_inputs(self, gate: Gate, size: str, variant: str) -> dict[str, str] | None:
        suite = gate.suite or gate.monotonic or self.family.variants[variant].eval
        if suite is None:
            return None
        inputs = {"score": self.eval(size, variant, suite)}
        if gate.beats:
            name, at = split_ref(gate.beats, size)
            if name in self.family.variants and self.family.stage_of(name, at) is None:
                return None  # the variant to beat does not exist at this size
            inputs["beats"] = self.eval(at, name, suite)
        if gate.across:
            made = self.family.sizes_of(self.family.variants[variant].sizes)
            sizes = [s for s in made if self.rank[s] < self.rank[size]]
            if not sizes:
                return None
            smaller = max(sizes, key=lambda s: self.rank[s])
            inputs["beats"] = self.eval(smaller, variant, suite)
        return inputs

    def gate(self, size: str, variant: str, label: str, gate: Gate, inputs: dict[str, str]) -> str:
        params = {k: v for k, v in gate.model_dump(exclude={"match", "name", "suite"}).items() if v not in (None, (), {})}
        if self.spec.smoke:
            params["advisory"] = True
        address = base = f"{size}/{variant}/{label}"
        copy = 2
        while address in self.nodes and (self.nodes[address].params != params or self.nodes[address].inputs != inputs):
            address, copy = f"{base}-{copy}", copy + 1
        return self.add(Node(address, "gate", size, variant, params, inputs=inputs, work=others.SMALL))

    def release(self, size: str, variant: str, exports: list[str], gates: list[str]) -> None:
        model = self.model(variant, size)
        family, release = self.family, self.family.release
        inputs = {"model": model, "tokenizer": self.tokenizer()}
        evals = [self.nodes[n] for n in self.published.get((size, variant), ()) if self.nodes[n].kind == "eval"]
        scores = {f"eval.{n.name.rpartition('eval.')[2]}": n.name for n in evals}
        for export in exports:
            inputs[f"export.{export.rpartition('export.')[2]}"] = export
        if release.card == "auto":
            parity = {f"parity.{n.rpartition('gate.')[2]}": self.nodes[n].inputs["parity"] for n in gates if "parity" in self.nodes[n].inputs}
            lineage = self.lineage(model)
            params = {
                "family": family.family.model_dump(), "size": size, "variant": variant, "lineage": lineage,
                "shape": self.nodes[model].params["shape"], "parameters": self.params[size],
                "licenses": self.licenses(model),
            }  # fmt: skip
            gated = {f"gate.{n.rpartition('/gate.')[2]}": n for n in gates}
            card_inputs = {"model": model, "tokenizer": self.tokenizer(), **scores, **parity, **gated}
            card = Node(f"{size}/{variant}/card", "card", size, variant, params, inputs=card_inputs, work=others.SMALL)
            inputs["card"] = self.add(card)
        after = tuple(gates)
        dash = "" if variant == "base" else f"-{variant}"
        repo = release.repo.format_map(
            {"family": family.family.name, "org": family.family.org, "size": size, "-variant": dash, "variant": variant,
             "-export": "", "export": ""}  # fmt: skip
        )
        max_context = self.nodes[model].params["shape"]["context"]
        params = {"repo": repo, "license": family.family.license, "max_context": max_context}
        runtime = {"path": release.path, "collection": release.collection, "to": release.to, "dry_run": release.dry_run}
        missing: tuple[str, ...] = ()
        if release.to == "hf" and not release.dry_run:
            missing = ("uploading to the hub can be planned, but this version of famc prepares the folder only: set release.dry_run",)
        self.add(Node(f"{size}/{variant}/release", "release", size, variant, params, runtime, inputs=inputs, after=after,
                      work=others.SMALL, missing=missing))  # fmt: skip

    def lineage(self, model: str) -> list[str]:
        """Trained steps from the first to the model itself."""
        chain = [model]
        while "model" in self.nodes[chain[-1]].inputs:
            chain.append(self.nodes[chain[-1]].inputs["model"])
        return chain[::-1]

    def licenses(self, model: str) -> dict[str, str]:
        """Licence by source, over everything that the model was trained on."""
        todo, found, seen = [model], {}, set()
        while todo:
            node = self.nodes[todo.pop()]
            if node.name in seen:
                continue
            seen.add(node.name)
            if node.kind == "corpus":
                source = node.name.removeprefix("data/")
                found[source] = self.family.data.sources[source].license or node.params.get("license") or "unknown"
            if node.kind == "adopt":
                found[node.name] = node.params["license"] or "unknown"
            todo += [need for role, need in node.inputs.items() if not role.startswith("eval.")]
        return dict(sorted(found.items()))


def matches(gate: Gate, size: str, variant: str) -> bool:
    """Whether a gate is about a variant at a size: `*/instruct`, or just `instruct`."""
    return fnmatch.fnmatchcase(f"{size}/{variant}", gate.match) or gate.match == variant


def gate_name(gate: Gate) -> str:
    """What a gate is called in addresses."""
    if gate.name:
        return gate.name
    if gate.beats:
        return f"beats-{gate.beats.replace('@', '-')}"
    if gate.monotonic:
        return f"monotonic-{gate.monotonic}"
    return "limits"


def default_gate(label: str) -> Gate:
    """What every export must satisfy when the spec says nothing: the same ids and template, and nearly the
    same model.
    """
    kl = {"onnx-fp32": 1e-4, "safetensors-fp32": 1e-6}.get(label, 0.05)
    return Gate.model_validate({"match": "*", "parity": {"tokenizer": "exact", "template": "exact", "kl": kl}})


def _shape_values(
    shape: Shape, values: Mapping[str, Any], parent: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Dimensions as the worker reads them; a stage's own context and rope_theta win, then those of its parent, whose
    positions an earlier stage may have extended."""
    moe, inherited = shape.moe, parent or {}
    return {
        "arch": shape.arch, "vocab": shape.vocab, "layers": shape.layers, "hidden": shape.hidden, "ffn": shape.ffn,
        "heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "tie": shape.tie,
        "context": max(inherited.get("context") or shape.context, values.get("context") or 0),
        "rope_theta": values.get("rope_theta") or inherited.get("rope_theta") or shape.rope_theta,
        "moe": None if moe is None else {"experts": moe.experts, "active": moe.active, "ffn": moe.ffn},
    }  # fmt: skip


def _raw(stage: StageSpec) -> dict[str, Any]:
    return stage.model_dump(exclude_unset=True, by_alias=True)


def _fields(values: Mapping[str, Any], path: Where) -> list[tuple[str, Where]]:
    """Fields that are written, with their places; those of `lr` one by one."""
    found: list[tuple[str, Where]] = [(key, (*path, key)) for key in values]
    lr = values.get("lr")
    names = list(lr) if isinstance(lr, Mapping) else ["peak"] if lr is not None else []
    return found + [(f"lr.{name}", (*path, "lr", name)) for name in names]


def _replace(node: Node, **changes: Any) -> Node:
    values = {f: getattr(node, f) for f in node.__dataclass_fields__}
    return Node(**(values | changes))


def _ordered(nodes: Mapping[str, Node]) -> dict[str, Node]:
    """Needs first; among the ready, the order in which they were found."""
    done: dict[str, Node] = {}
    for start in nodes:
        stack: list[tuple[str, int]] = [(start, 0)]
        while stack:
            name, position = stack.pop()
            if name in done:
                continue
            needs = nodes[name].needs
            while position < len(needs) and needs[position] in done:
                position += 1
            if position == len(needs):
                done[name] = nodes[name]
            else:
                stack += [(name, position + 1), (needs[position], 0)]
    return done


def _unmatched(spec: Spec, nodes: Mapping[str, Node], gated: set[int]) -> list[Problem]:
    """Gates and places that came to nothing: one that is misspelt must not pass for one that holds."""
    problems = []
    for index, gate in enumerate(spec.family.gates):
        if index not in gated:
            what = f"'{gate.beats}' is made at none of its sizes" if gate.beats else "it has no two sizes to compare"
            message = f"gates.{index}: '{gate.match}' compares nothing: {what}"
            problems.append(spec.problem(("gates", index, "match"), message))
    for pattern in spec.family.place:
        if pattern != "default" and not any(fnmatch.fnmatchcase(name, pattern) for name in nodes):
            hint = did_you_mean(pattern, nodes) if "*" not in pattern else f"steps are called {next(iter(nodes))}"
            message = f"place: '{pattern}' matches no step"
            problems.append(spec.problem(("place", pattern), message, hint, key=True))
    return problems
