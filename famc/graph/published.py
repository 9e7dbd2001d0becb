"""From variants to what is published: scores, gates, exports with their parity checks, cards, releases."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from famc.checks import split_ref
from famc.checks.publish import gate_means
from famc.cost.parameters import bare, ranker
from famc.errors import Problem, did_you_mean
from famc.graph.exported import Exported
from famc.graph.node import Node
from famc.spec.family import EvalTask, Gate, Parity
from famc.spec.load import Spec
from famc.steps import STAGES, others
from famc.steps import exports as exporting
from famc.steps.corpus import held_out


class Published(Exported):
    """Follows names from what is published to what it needs. One instance a resolve."""

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
                    self.nodes[node.name] = replace(node, after=(*node.after, gate.name))

    def above(self, name: str) -> set[str]:
        """A step and all that it needs."""
        todo, seen = [name], set()
        while todo:
            current = todo.pop()
            if current not in seen:
                seen.add(current)
                todo += self.nodes[current].needs
        return seen

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
            if task["task"] == "rerank" and (embedder := self.names.embedder(size)):
                inputs["retriever"] = self.stage(*embedder)
        shape = self.shapes[size]
        held = {t["data"]: held_out(self.nodes[self.data(t["data"])].params) for t in tasks if t["data"]}
        return self.add(
            Node(
                address,
                "eval",
                size,
                variant,
                {"suite": suite, "tasks": tasks, "context": shape.context},
                inputs=inputs,
                shape=shape,
                work=others.eval_work(shape, tasks, held),
                missing=missing,
            )
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
                missing.append(
                    f"evaluation '{task.task}' can be planned, but this version of famc has no worker for it"
                )
            data = task.data or self.names.default_data(suite, task.task)
            if data is None and task.task in others.FORMATS:
                if declared:  # a user asked for it by name
                    missing.append(
                        f"suite '{suite}': no source of format {others.FORMATS[task.task]} for '{task.task}'"
                    )
                continue
            tasks.append(
                {
                    "task": task.task,
                    "data": data,
                    "n": task.n or others.EVAL_EXAMPLES.get(task.task),
                    "max_new_tokens": task.max_new_tokens,
                    "tasks": list(task.tasks),
                    **({"top": task.top} if task.task == "rerank" else {}),
                }
            )
        return tasks, tuple(missing)

    def gates(self, size: str, variant: str) -> list[str]:
        """Gate nodes on a variant's scores."""
        made: list[str] = []
        for index, gate in enumerate(self.family.gates):
            if gate_means(gate, size, variant) and not (gate.parity or gate.max_drop):
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
                    fitted = self.fitted(gate, label, export, parity)
                    if fitted is None:
                        continue
                    self.gated.add(index)
                    if parity:
                        name = f"gate.{gate.name or label}"
                        made.append(self.gate(size, variant, name, fitted, {"parity": parity}))
                        gated.add(export)
        for export, parity, label in exports:
            if parity and export not in gated:
                made.append(
                    self.gate(
                        size,
                        variant,
                        f"gate.{label}",
                        self.default_gate(label, export, parity),
                        {"parity": parity},
                    )
                )
        return made

    def fitted(self, gate: Gate, label: str, export: str, parity: str) -> Gate | None:
        """A gate as far as it can be measured of an export: one glob may mean a chat model's and an embedder's. Where
        something can't, famc's own limits stand in; None if nothing can."""
        task = self.nodes[export].params["task"]
        if task == exporting.TEXT:
            return gate
        asked = gate.parity.model_dump(exclude_none=True) if gate.parity else {}
        kept = {name: limit for name, limit in asked.items() if name in exporting.PARITY.get(task, asked)}
        if not kept:
            return None
        if kept == asked and gate.max_drop is None:
            return gate
        own = self.default_gate(label, export, parity).parity
        assert own is not None
        whole = own.model_dump(exclude_none=True) | kept
        return gate.model_copy(update={"parity": Parity.model_validate(whole), "max_drop": None})

    def default_gate(self, label: str, export: str, parity: str) -> Gate:
        """What an export of which the spec says nothing must satisfy."""
        pairs = bool(parity) and "pairs" in self.nodes[parity].params
        return default_gate(label, self.nodes[export].params["task"], pairs)

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
        params = {
            k: v
            for k, v in gate.model_dump(exclude={"match", "name", "suite"}).items()
            if v not in (None, (), {})
        }
        if self.spec.smoke:
            params["advisory"] = True
        address = base = f"{size}/{variant}/{label}"
        copy = 2
        while address in self.nodes and (
            self.nodes[address].params != params or self.nodes[address].inputs != inputs
        ):
            address, copy = f"{base}-{copy}", copy + 1
        return self.add(Node(address, "gate", size, variant, params, inputs=inputs, work=others.SMALL))

    def release(self, size: str, variant: str, exports: list[str], gates: list[str]) -> None:
        """A variant's folders: the model with its ONNX files, and one more for each format that has its own.

        A folder waits for the variant's gates and those of the exports in it: a GGUF that fails stops nothing else.
        """
        folders: dict[str, list[str]] = {"": []}
        for export in exports:
            params = self.nodes[export].params
            folders.setdefault(exporting.folder_suffix(params["format"], params["quant"]), []).append(export)
        of_export = {gate: self.export_of(gate) for gate in gates}
        for suffix, here in folders.items():
            wanted = [gate for gate, export in of_export.items() if export is None or export in here]
            self.folder(size, variant, suffix, here, wanted)

    def export_of(self, gate: str) -> str | None:
        """The export that a gate is about; None for a gate on the variant itself."""
        parity = self.nodes[gate].inputs.get("parity")
        return None if parity is None else self.nodes[parity].inputs["export"]

    def folder(self, size: str, variant: str, suffix: str, exports: list[str], gates: list[str]) -> None:
        """One released folder, with its card."""
        model = self.model(variant, size)
        family, release = self.family, self.family.release
        inputs = {"model": model, "tokenizer": self.tokenizer()}
        label = suffix.lower().replace("-", ".")
        evals = [
            self.nodes[n] for n in self.published.get((size, variant), ()) if self.nodes[n].kind == "eval"
        ]
        scores = {f"eval.{n.name.rpartition('eval.')[2]}": n.name for n in evals}
        for export in exports:
            inputs[f"export.{export.rpartition('export.')[2]}"] = export
        if release.card == "auto":
            parity = {
                f"parity.{n.rpartition('gate.')[2]}": self.nodes[n].inputs["parity"]
                for n in gates
                if "parity" in self.nodes[n].inputs
            }
            lineage = self.lineage(model)
            params = {
                "family": family.family.model_dump(), "size": size, "variant": variant, "lineage": lineage,
                "shape": self.nodes[model].params["shape"], "parameters": self.parameters(model, size),
                "licenses": self.licenses(model), "repo": self.repo(size, variant, suffix),
                "base": self.repo(size, variant, "") if suffix else None,
                "exports": {e.rpartition("export.")[2]: exporting.shown(self.nodes[e].params) for e in exports},
            }  # fmt: skip
            gated = {f"gate.{n.rpartition('/gate.')[2]}": n for n in gates}
            card_inputs = {"model": model, "tokenizer": self.tokenizer(), **scores, **parity, **gated}
            card = Node(
                f"{size}/{variant}/card{label}", "card", size, variant, params, inputs=card_inputs,
                work=others.SMALL,
            )  # fmt: skip
            inputs["card"] = self.add(card)
        max_context = self.nodes[model].params["shape"]["context"]
        params = {
            "repo": self.repo(size, variant, suffix), "license": family.family.license, "max_context": max_context,
            "format": next((self.nodes[e].params["format"] for e in exports), "") if suffix else "",
        }  # fmt: skip
        runtime = {
            "path": release.path,
            "collection": release.collection,
            "to": release.to,
            "dry_run": release.dry_run,
        }
        missing: tuple[str, ...] = ()
        if release.to == "hf" and not release.dry_run:
            missing = (
                "uploading to the hub can be planned, but this version of famc prepares the folder only: set release.dry_run",
            )
        node = Node(
            f"{size}/{variant}/release{label}", "release", size, variant, params, runtime, inputs=inputs,
            after=tuple(gates), work=others.SMALL, missing=missing,
        )  # fmt: skip
        self.add(node)

    def parameters(self, model: str, size: str) -> int:
        """How many the published weights are: embedders and rerankers have left the language model's head behind."""
        kept = {exporting.VECTORS: bare, exporting.RANKING: ranker}
        task = exporting.task_of(self.nodes[model].kind, self.shapes[size].arch)
        return kept[task](self.shapes[size]) if task in kept else self.params[size]

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
                found[source] = (
                    self.family.data.sources[source].license or node.params.get("license") or "unknown"
                )
            if node.kind == "adopt":
                found[node.name] = node.params["license"] or "unknown"
            todo += [need for role, need in node.inputs.items() if not role.startswith("eval.")]
        return dict(sorted(found.items()))


def gate_name(gate: Gate) -> str:
    """What a gate is called in addresses."""
    if gate.name:
        return gate.name
    if gate.beats:
        return f"beats-{gate.beats.replace('@', '-')}"
    if gate.monotonic:
        return f"monotonic-{gate.monotonic}"
    return "limits"


def default_gate(label: str, task: str, pairs: bool = False) -> Gate:
    """What every export must satisfy when the spec says nothing: the same ids and template, and nearly the
    same model.

    `pairs`: whether the parity check reads held-out pairs. Embedders, rerankers and masked LMs have no template.
    """
    same: dict[str, Any] = {"tokenizer": "exact"}
    if task in (exporting.VECTORS, exporting.RANKING):
        cosine, ranking, drop = ENCODER_LIMITS.get(label, ENCODER_LIMITS["onnx-int8"])
        near = {"ranking": ranking} | ({"cosine": cosine} if task == exporting.VECTORS else {})
        near |= {"ndcg": drop} if pairs else {}
        return Gate.model_validate({"match": "*", "parity": same | near})
    if task == exporting.TEXT:
        same |= {"template": "exact"}
    near = {"kl": {"onnx-fp32": 1e-4, "safetensors-fp32": 1e-6}.get(label, 0.05)}
    return Gate.model_validate({"match": "*", "parity": same | near})


# cosine and Kendall's tau at least, relative drop of nDCG@10 at most
ENCODER_LIMITS = {
    "safetensors-fp32": (0.999, 0.99, 0.001),
    "onnx-fp32": (0.999, 0.99, 0.001),
    "safetensors-bf16": (0.99, 0.9, 0.02),
    "onnx-int8": (0.98, 0.85, 0.05),
    "onnx-int4": (0.95, 0.75, 0.05),
    "gguf-f16": (0.999, 0.98, 0.005),
    "gguf-q8_0": (0.999, 0.85, 0.05),
    "gguf-q4_0": (0.95, 0.75, 0.05),
    "gguf-q4_k_m": (0.95, 0.75, 0.05),
}


def unmatched(spec: Spec, nodes: Mapping[str, Node], gated: set[int]) -> list[Problem]:
    """Gates and places that came to nothing: one that is misspelt must not pass for one that holds."""
    problems = []
    for index, gate in enumerate(spec.family.gates):
        if index not in gated:
            what = "it has no two sizes to compare"
            if gate.beats:
                what = f"'{gate.beats}' is made at none of its sizes"
            if gate.parity or gate.max_drop:
                what = "none of its limits is measured of the exports that it matches"
            message = f"gates.{index}: '{gate.match}' compares nothing: {what}"
            problems.append(spec.problem(("gates", index, "match"), message))
    for pattern in spec.family.place:
        if pattern != "default" and not any(fnmatch.fnmatchcase(name, pattern) for name in nodes):
            hint = (
                did_you_mean(pattern, nodes)
                if "*" not in pattern
                else f"steps are called {next(iter(nodes))}"
            )
            message = f"place: '{pattern}' matches no step"
            problems.append(spec.problem(("place", pattern), message, hint, key=True))
    return problems
