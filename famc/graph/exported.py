"""From a variant to its files: exports, and the parity check of each."""

from __future__ import annotations

from typing import Any

from famc.graph.node import Node
from famc.graph.trained import Trained
from famc.spec.family import Export
from famc.steps import exports as exporting
from famc.steps import others


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
        task = exporting.task_of(self.nodes[model].kind)
        shape, parameters = self.shapes[size], self.params[size]
        for quant in exporting.quants(export):
            label = f"{export.format}-{quant}"
            params = {"task": task, **exporting.export_params(export, quant, shape)}
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
        params: dict[str, Any] = {
            "format": export.params["format"], "task": export.params["task"], "context": min(self.shapes[size].context, 512), "texts": 24,
            "prompts": 8, "max_new_tokens": 24,
        }  # fmt: skip
        for role, task in (("text", "bits_per_byte"), ("chat", "answers")):
            data = next(
                (
                    d
                    for suite in self.names.suites
                    for d in [self.names.default_data(suite, task)]
                    if d is not None
                ),
                None,
            )
            if data:
                inputs[f"{role}.{data}"] = self.data(data)
        if self.spec.smoke:
            params |= {"texts": 4, "prompts": 2, "max_new_tokens": 4}
        shape = self.shapes[size]
        node = Node(
            f"{size}/{variant}/parity.{label}", "parity", size, variant, params, inputs=inputs, shape=shape,
            work=others.parity_work(shape), missing=export.missing,
        )  # fmt: skip
        return self.add(node)

    def repo(self, size: str, variant: str, suffix: str) -> str:
        """What a released folder is called; a format's suffix stands at {-export}, or at the end."""
        family, pattern = self.family.family, self.family.release.repo
        words = {
            "family": family.name, "org": family.org, "size": size, "variant": variant,
            "-variant": "" if variant == "base" else f"-{variant}", "-export": suffix, "export": suffix[1:],
        }  # fmt: skip
        return pattern.format_map(words) + ("" if "export}" in pattern else suffix)
