"""Where a family's exports run: for each of them, on each device, whether it fits and how fast it answers.

In: a Graph and targets. Out: rows for `famc plan`. What must fit (an export's `target`) is refused when the spec is read
(checks/exports.py), by the same arithmetic; here it is shown. Bears no identity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from famc.backend import UnknownAccelerator, load_accelerator
from famc.cost.deploy import Fit, Target
from famc.cost.parameters import count
from famc.cost.shape import Shape
from famc.errors import UsageError, did_you_mean
from famc.graph import Graph, Node
from famc.steps import deployed
from famc.steps.exports import quants


@dataclass(frozen=True)
class Deployed:
    """An export (its step's name) on a target. `required`: whether the spec says that it must run there."""

    export: str
    fit: Fit
    required: bool

    def to_dict(self) -> dict[str, Any]:
        """As `famc plan --json` shows it: bytes, tokens/s at batch 1."""
        fit, speed = self.fit, self.fit.speed
        return {
            "export": self.export, "target": fit.target, "required": self.required, "fits": fit.fits,
            "context": fit.context,
            "memory": {
                "weights": fit.weights, "kv_cache": fit.cache, "overhead": fit.overhead, "total": fit.total,
                "limit": fit.limit,
            },
            "decode_tokens_per_second": speed.decode if speed else None,
            "decode_interval": list(speed.decode_band) if speed and speed.decode_band else None,
            "decode_full_tokens_per_second": speed.decode_full if speed else None,
            "prefill_tokens_per_second": speed.prefill if speed else None,
            "prefill_interval": list(speed.prefill_band) if speed else None,
            "basis": speed.basis if speed else "modelled",
            "largest_size": fit.largest,
        }  # fmt: skip


def deployments(
    graph: Graph, names: Iterable[str], devices: Sequence[str] | None = None
) -> tuple[Deployed, ...]:
    """Every export among the steps `names` on the devices named; without any on the spec's own targets: there only those that must run on it, or
    all where none must. UsageError for an unknown device."""
    here = set(names)
    exports = [
        n for n in graph.nodes.values() if n.name in here and n.kind == "export" and n.shape is not None
    ]
    if devices is not None:
        where = [_named(name, graph.spec.folder) for name in devices]
        return tuple(_rows(graph, exports, where))
    family, folder = graph.spec.family, graph.spec.folder
    rows: list[Deployed] = []
    for name, wanted in family.targets.items():
        target = deployed.target(name, wanted, folder)
        bound = [node for node in exports if name in _required(graph, node)]
        rows += _rows(graph, bound or exports, [target])
    return tuple(rows)


def _rows(graph: Graph, exports: Iterable[Node], targets: Sequence[Target]) -> Iterable[Deployed]:
    shapes = {n.size: n.shape for n in graph.nodes.values() if n.size is not None and n.shape is not None}
    sizes = {size: (shape, count(shape).total) for size, shape in shapes.items()}
    for target in targets:
        for node in exports:
            assert node.shape is not None  # the caller has looked
            fit = deployed.fit(node.shape, node.params, target)
            if not fit.fits:
                fit = replace(fit, largest=_largest(node, target, sizes))
            yield Deployed(node.name, fit, target.name in _required(graph, node))


def _largest(node: Node, target: Target, sizes: Mapping[str, tuple[Shape, int]]) -> str | None:
    """The size of most parameters that would fit in this format; its blocks are those of the export."""
    fitting = {
        size: total for size, (shape, total) in sizes.items() if deployed.fit(shape, node.params, target).fits
    }
    return max(fitting, key=lambda size: fitting[size]) if fitting else None


def _required(graph: Graph, node: Node) -> frozenset[str]:
    """The targets that the spec names for an export."""
    family = graph.spec.family
    return frozenset(
        target
        for export in family.exports
        if node.variant in export.variants
        and node.size in family.sizes_of(export.sizes)
        and (export.format, node.params["quant"]) in {(node.params["format"], q) for q in quants(export)}
        for target in export.target
    )


def _named(name: str, folder: Path) -> Target:
    try:
        return deployed.of_device(load_accelerator(name, folder))
    except UnknownAccelerator as error:
        raise UsageError(f"no device is called '{name}'", did_you_mean(name, error.candidates)) from None
    except (ValueError, OSError) as error:
        raise UsageError(f"device '{name}' can't be read: {error}") from None
