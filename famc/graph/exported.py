"""From a variant to its files: exports, and the parity check of each."""

from __future__ import annotations

from typing import Any

from famc.graph.node import Node
from famc.graph.trained import Trained
from famc.spec.family import Export
from famc.steps import exports as exporting
from famc.steps import others
from famc.steps.mixes import format_of

# of embedders and rerankers: the evaluation whose pairs parity reads, and how many passages of them
PAIRS = {exporting.VECTORS: ("retrieval", 400), exporting.RANKING: ("rerank", 64)}


class Exported(Trained):
    """Follows an export to what it reads. One instance a resolve."""

    def export(
        self, size: str, variant: str, export: Export, gates: tuple[str, ...]
    ) -> list[tuple[str, str, str]]:
        """Export and parity nodes: [(export, parity or "", label)]. A variant that fails its gates is not
        exported.
        """
        made = []
        model = self.model(variant, size)
        shape, parameters = self.shapes[size], self.params[size]
        task = exporting.task_of(self.nodes[model].kind, shape.arch)
        for quant in exporting.quants(export):
            label = f"{export.format}-{quant}"
            params = {"task": task, **exporting.export_params(export, quant, shape, task)}
            if export.format == "gguf":  # the file says what it is called
                params["name"] = self.repo(size, variant, "").rpartition("/")[2]
            inputs = {"model": model}
            if "examples" in params and export.calibrate is not None:
                for data in export.calibrate.data:
                    inputs[f"data.{data}"] = self.mix(*self.names.mix_of("calibrate", data))
                inputs["tokenizer"] = self.tokenizer()
                params["seed"] = self.family.family.seed
            row = exporting.capability(shape.arch, task, export.format, quant)
            assert row is not None  # checks refuse the others
            missing: tuple[str, ...] = ()
            if row.status == "later":
                what = f"format '{export.format}' of {task} models"
                missing = (f"{what} can be planned, but this version of famc has no worker for it",)
            elif lack := exporting.lacking(export.format):
                missing = (lack,)
            node = Node(
                f"{size}/{variant}/export.{label}", "export", size, variant, params, inputs=inputs, after=gates,
                shape=shape, work=exporting.export_work(shape, parameters, params), missing=missing,
            )  # fmt: skip
            address = self.add(node)
            parity = self.parity(size, variant, node, label) if row.status == "yes" else ""
            made.append((address, parity, label))
        return made

    def parity(self, size: str, variant: str, export: Node, label: str) -> str:
        inputs = {"model": export.inputs["model"], "export": export.name, "tokenizer": self.tokenizer()}
        task = export.params["task"]
        params: dict[str, Any] = {
            "format": export.params["format"], "task": task, "context": min(self.shapes[size].context, 512), "texts": 24,
            "prompts": 8, "max_new_tokens": 24,
        }  # fmt: skip
        if task in PAIRS and (pairs := self.pairs_of(export.inputs["model"], PAIRS[task][0])):
            inputs[f"pairs.{pairs}"] = self.data(pairs)
            params["pairs"] = PAIRS[task][1]
        else:
            inputs |= self.held_out()
        if self.spec.smoke:
            params |= {"texts": 4, "prompts": 2, "max_new_tokens": 4}
            params |= {"pairs": 16} if "pairs" in params else {}
        shape = self.shapes[size]
        node = Node(
            f"{size}/{variant}/parity.{label}", "parity", size, variant, params, inputs=inputs, shape=shape,
            work=others.parity_work(shape), missing=export.missing,
        )  # fmt: skip
        return self.add(node)

    def held_out(self) -> dict[str, str]:
        """Text and conversations that evaluations read, by role."""
        found: dict[str, str] = {}
        for role, task in (("text", "bits_per_byte"), ("chat", "answers")):
            data = self.default_data(task)
            if data:
                found[f"{role}.{data}"] = self.data(data)
        return found

    def default_data(self, task: str) -> str | None:
        """The source that the first suite with such a task reads; else what such a task of some suite would read."""

        def measured(suite: str) -> bool:
            declared = self.family.evals.get(suite)
            return task in (others.SUITES.get(suite, ()) if declared is None else (t.task for t in declared))

        suites = sorted(self.names.suites, key=lambda suite: not measured(suite))
        found = (self.names.default_data(suite, task) for suite in suites)
        return next((data for data in found if data is not None), None)

    def pairs_of(self, model: str, task: str) -> str | None:
        """A source of pairs: what evaluations read; else the first that the model learnt from; else any."""
        if (data := self.default_data(task)) is not None:
            return data
        pairs = [n for n, source in self.family.data.sources.items() if format_of(source) == "pairs"]
        todo, above = [model], set()
        while todo:
            name = todo.pop()
            if name not in above:
                above.add(name)
                todo += self.nodes[name].inputs.values()
        learnt = [name for name in pairs if f"data/{name}" in above]
        return next(iter([*learnt, *pairs]), None)

    def repo(self, size: str, variant: str, suffix: str) -> str:
        """What a released folder is called; a format's suffix stands at {-export}, or at the end."""
        family, pattern = self.family.family, self.family.release.repo
        words = {
            "family": family.name, "org": family.org, "size": size, "variant": variant,
            "-variant": "" if variant == "base" else f"-{variant}", "-export": suffix, "export": suffix[1:],
        }  # fmt: skip
        return pattern.format_map(words) + ("" if "export}" in pattern else suffix)
