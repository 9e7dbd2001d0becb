"""Exports on the devices that a spec names: what the checks refuse, and what a plan shows.

In: an export's parameters and a target of the spec. Out: famc.cost.deploy's Fit. Bears no identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from famc.backend import Accelerator, load_accelerator
from famc.cost import deploy
from famc.cost.shape import Shape
from famc.spec.family import Target
from famc.steps.exports import storage

# what is shown where neither the spec nor the command line names a device: one of each kind
USUAL = ("oneplus-12", "laptop-lpddr5x", "apple-m4", "jetson-orin-nano", "rtx4090", "h100-80g")


def target(name: str, wanted: Target, folder: Path) -> deploy.Target:
    """A target of a spec whose folder is `folder`. UnknownAccelerator, ValueError or OSError as load_accelerator."""
    memory = None if wanted.memory is None else float(wanted.memory)
    if wanted.device is None:
        return deploy.Target(name, wanted.context, memory=memory)
    return of_device(load_accelerator(wanted.device, folder), name, wanted.context, memory)


def of_device(
    chip: Accelerator, name: str = "", context: int = 4096, memory: float | None = None
) -> deploy.Target:
    """A target that is one accelerator, or one CPU host."""
    stack = chip.stack or ("cpu" if chip.kind == "cpu" else "cuda")
    return deploy.Target(name or chip.name, context, chip.device, stack, memory)


def fit(shape: Shape, params: Mapping[str, Any], where: deploy.Target) -> deploy.Fit:
    """One export on one target, by the parameters of its step. ValueError for a format that famc doesn't know."""
    fmt, quant = str(params["format"]), str(params["quant"])
    return deploy.fit(shape, fmt, quant, where, how=storage(shape, params))
